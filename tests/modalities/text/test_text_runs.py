"""Whole runs on text: resuming, several processes, the loader's steps, the probe, and changes of the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from d2v_fast.commands.console import main
from d2v_fast.config import BatchSplit, TextConfig, parse_config
from d2v_fast.data import batch_maker
from d2v_fast.evaluation.probing import Probed
from d2v_fast.modalities.text import probe
from d2v_fast.modalities.text.probe import filled_in, masked_words, run_text_probe
from d2v_fast.modalities.text.reference_pages import docs_for_probe
from d2v_fast.modalities.text.tasks import TextDataset, tokenizer_of
from d2v_fast.objectives.build import build_model
from tests.helpers.loaders import make_loader
from tests.helpers.marks import needs_deepspeed
from tests.helpers.masked_models import masked_config, random_masked_pair
from tests.helpers.runs import TINY_TEXT, figures, leave_out_reports, run_forked, run_here, tiny_file
from tests.helpers.tokenizer_folders import tokenizer_with_padding_at, unigrams, word_pieces


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tokens, shared by all tests of this file."""
    return str(tmp_path_factory.mktemp("tokens"))


def text_file(folder: Path, cache: str, **changes: Any) -> Path:
    return tiny_file(folder, TINY_TEXT, d2v__data__tokens_path=cache, **changes)


def make_config(folder: Path, cache: str, **changes: Any) -> TextConfig:
    config = parse_config(json.loads(text_file(folder, cache, **changes).read_text())).d2v
    assert isinstance(config, TextConfig)
    return config


# slow: two processes resume on images and on speech in every run
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=[needs_deepspeed, pytest.mark.slow])])
def test_resume_is_bit_exact(num_processes: int, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    output = tmp_path / "output"
    file = text_file(tmp_path, cache, d2v__schedule={"steps": 6, "kind": "constant"})
    arguments = ["--ds_config", file, "--run"]
    options: dict[str, Any] = {"output": output, "num_processes": num_processes}
    success = [0] * num_processes
    assert run_forked(*arguments, "whole", **options) == success, output.read_text()
    assert run_forked(*arguments, "r", "--set", "d2v.schedule.steps=3", **options) == success, output.read_text()
    assert run_forked(*arguments, "r", "--resume", **options) == success, output.read_text()
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")


# slow: the stages of images and speech are compared in every run
@pytest.mark.slow
@needs_deepspeed
def test_stages_agree(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    changes = {f"d2v__model__{name}": 0.0 for name in ("dropout", "attention_dropout")}
    losses = {}
    for stage, num_processes in ((0, 1), (2, 2), (3, 2)):
        name, output = f"stage-{stage}", tmp_path / f"output-{stage}"
        file = text_file(tmp_path, cache, **changes, d2v__schedule={"steps": 3}, zero_optimization__stage=stage)
        statuses = run_forked("--ds_config", file, "--run", name, output=output, num_processes=num_processes)
        assert statuses == [0] * num_processes, output.read_text()
        losses[stage] = [(step[2], step[7]) for step in figures(tmp_path, name)]
    for stage in (2, 3):
        np.testing.assert_allclose(losses[stage], losses[0], rtol=1e-4)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("packing", ["document", "stream"])
def test_any_split_gives_the_same_samples(separate: bool, packing: str, tmp_path: Path, cache: str) -> None:
    changes = {"d2v__data__separate_documents": separate, "d2v__data__packing": packing}
    config = make_config(tmp_path, cache, **changes)
    maker = batch_maker(config)

    def steps(micro_batch: int, accumulation: int, world_size: int) -> list[dict[int, tuple[bytes, ...]]]:
        split = BatchSplit.of(micro_batch, accumulation, world_size)
        ranks = [make_loader(maker, config, split, rank=rank, num_steps=4) for rank in range(world_size)]
        found = []
        for parts in zip(*ranks, strict=True):
            seen: dict[int, tuple[bytes, ...]] = {}
            batches = [batch for part in parts for batch in part.micro_batches]
            assert {part.num_rows for part in parts} == {sum(len(batch.rows) for batch in batches)}
            for batch in batches:
                width = batch.inputs.shape[1]
                assert (batch.offsets is not None) == separate
                hidden = (batch.inputs != batch.masked_inputs).flatten().nonzero()[:, 0]
                # neither unchanged nor random tokens are in the loss
                assert set(batch.rows.tolist()) <= set(hidden.tolist())
                for b, sample in enumerate(batch.sample_ids.tolist()):
                    length = width if batch.lengths is None else int(batch.lengths[b])
                    of_sample = batch.rows[batch.rows // width == b] % width
                    parts_of_sample = batch.inputs[b, :length], batch.masked_inputs[b, :length], of_sample
                    seen[sample] = tuple(part.numpy().tobytes() for part in parts_of_sample)
            found.append(seen)
        return found

    whole = steps(24, 1, 1)
    assert steps(4, 3, 2) == whole
    assert all(len(step) <= 24 for step in whole)


def test_vocabulary_and_padding_follow_the_tokenizer(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With padding id 0, as in BERT, the token of id 1 is an ordinary token, also in the export."""
    leave_out_reports(monkeypatch.setattr)
    tokenizer = tokenizer_with_padding_at(0, tmp_path / "bert")
    (tmp_path / "text.txt").write_text("the student\n" * 200)
    data = {"kind": "text", "path": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "bert")}
    given = {f"d2v__data__{key}": value for key, value in data.items()}
    file = text_file(tmp_path, cache, **given, d2v__schedule={"steps": 4}, d2v__model__vocab_size=None)
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=2") == 0
    model = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())["d2v"]["model"]
    assert (model["vocab_size"], model["padding_id"]) == (tokenizer.vocab_size, 0) == (9, 0)
    assert main(["export", str(tmp_path / "runs" / "r")]) == 0
    rows = load_file(tmp_path / "runs" / "r" / "export" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert (rows == 0).all(1).tolist() == [True] + [False] * 8
    capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    # the number of steps is the only change
    assert "applied from here on: d2v.schedule.steps: 2 -> 4\n" in capsys.readouterr().out
    assert run_here("--ds_config", file, "--set", "d2v.model.vocab_size=8", "--dry-run") == 1
    assert "`d2v.model.vocab_size` must be >= 9" in capsys.readouterr().err


def test_another_tokenizer_is_refused(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = text_file(tmp_path, cache, d2v__schedule={"steps": 6})
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=3") == 0
    # another vocabulary with the same number of embeddings
    from d2v_fast.modalities.text.tasks import make_tokenizer

    text = tmp_path / "text.txt"
    text.write_text("quite another text, with other words in it\n" * 50)
    data = {"kind": "text", "path": str(text), "tokenizer": str(tmp_path / "tokenizer"), "documents": "line"}
    config = make_config(tmp_path, cache, **{f"d2v__data__{key}": value for key, value in data.items()})
    make_tokenizer(config.data, 300, tmp_path / "tokenizer", 32)
    other = ["--set", f"d2v.data.tokenizer={tmp_path / 'tokenizer'}"]
    assert run_here("--ds_config", text_file(tmp_path, cache), "--run", "r", "--resume", *other) == 1
    assert "`d2v.data.tokenizer` must be the tokenizer that the checkpoint was trained with" in capsys.readouterr().err


def test_masked_words(tmp_path: Path, cache: str) -> None:
    config = make_config(tmp_path, cache, d2v__model__vocab_size=2000)
    masked = masked_words(config)
    assert 0 < masked.num_train < len(masked.words)
    assert masked.words.max() < 200
    assert sum(len(place) for place in masked.places) == len(masked.words)
    mask_id = masked.tokens[0][masked.places[0][0]]
    for tokens, places in zip(masked.tokens, masked.places, strict=True):
        assert (tokens[places] == mask_id).all()
        assert (tokens == mask_id).sum() == len(places) <= 0.15 * len(tokens)
    again = masked_words(config)
    np.testing.assert_array_equal(again.words, masked.words)


def test_masked_words_of_data2vec_2() -> None:
    """The other tokens alone are encoded and the decoder fills the gaps, as in training, but without noise."""
    model, _ = random_masked_pair(masked_config("text"))
    student, head = model.student.train(), model.head.train()
    tokens, masked = torch.randint(4, 20, (12,)), torch.tensor([0, 4, 5, 11])
    found = filled_in(student, head, tokens, masked)
    assert student.training
    assert head.training
    assert torch.equal(found, filled_in(student, head, tokens.index_fill(0, masked, 3), masked))
    # attention knows positions by their embeddings only
    kept = torch.tensor([1, 2, 3, 6, 7, 8, 9, 10])
    embedded = student.embedding(tokens[None])[:, kept]
    with torch.no_grad():
        hidden = student.eval().context(embedded).last_hidden
        whole = torch.zeros(1, 12, hidden.shape[2]).index_copy(1, kept, hidden)
        for convolution in head.eval().convolutions:
            mapped = convolution(whole.mT).mT
            whole = F.gelu(F.layer_norm(mapped, mapped.shape[2:], eps=1e-5))
        torch.testing.assert_close(found, head.projection(whole)[0, masked])


@pytest.mark.parametrize("kind", [word_pieces, unigrams], ids=lambda kind: kind.__name__)
def test_words_of_other_tokenizers_are_masked(kind: Callable[[Path], Path], tmp_path: Path, cache: str) -> None:
    """Word tokens of these tokenizers do not begin with a blank."""
    config = make_config(tmp_path, cache, d2v__data__tokenizer=str(kind(tmp_path / "given")))
    tokenizer, masked = tokenizer_of(config.data, config.model), masked_words(config)
    assert 0 < masked.num_train < len(masked.words)
    row = TextDataset(config.data, config.model).read(np.zeros(1, np.int64)).tokens[0]
    assert tokenizer.specials.mask not in row


def test_a_tokenizer_without_words_leaves_out_their_probe(
    tmp_path: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, cache, d2v__model__vocab_size=262)
    assert len(masked_words(config).words) == 0
    torch.manual_seed(0)
    model = build_model(config).student
    probed = Probed({"untrained": model}, {"untrained": model.make_head()})
    report = run_text_probe(probed, docs_for_probe(config.data, config.model), config)
    assert list(report.to_dict()) == ["topic"]
    assert "the probe of masked words is skipped" in caplog.text


def test_probe_and_dry_run(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # classifying all of them is most of the work
    monkeypatch.setattr(probe, "MAX_TRAIN", 3000)
    monkeypatch.setattr(probe, "MAX_TEST", 1000)
    # a vocabulary large enough to contain frequent words
    file = text_file(tmp_path, cache, d2v__schedule={"steps": 2}, d2v__model__vocab_size=1000)
    assert run_here("--ds_config", file, "--dry-run") == 0
    assert "blocks" in capsys.readouterr().out
    assert run_here("--ds_config", file, "--run", "r") == 0
    found = json.loads((tmp_path / "runs" / "r" / "probe.json").read_text())[-1]
    assert list(found["word"]) == ["untrained", "student", "teacher", "most frequent word"]
    assert list(found["topic"]) == ["untrained", "student", "teacher", "bag of words"]
    assert found["word"]["most frequent word"]["linear"] < 30
    assert found["topic"]["bag of words"]["linear"] > 50
    out = capsys.readouterr().out
    assert "accuracy in % on masked words" in out
    assert "accuracy in % on topics" in out
