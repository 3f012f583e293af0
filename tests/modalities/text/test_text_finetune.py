"""Fine-tuned runs on text: classes and scores, their export, and Transformers' answers, which equal ours."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_fast.commands.console import main
from d2v_fast.commands.predict import load_finetuned
from d2v_fast.config import load_config
from d2v_fast.data.order import MicroStep
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.text.config_finetune import TextRegressConfig
from d2v_fast.modalities.text.head import TextHead
from d2v_fast.modalities.text.huggingface_head import head_of_folder
from d2v_fast.modalities.text.labeled import held_out_batches
from tests.helpers.finetuning import check_killed_run, check_two_processes, validations
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY_2_TEXT, TINY_TEXT, run_here, tiny_file
from tests.helpers.text_files import sentences, small_tokenizer

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("quick_runs")

ENCODERS = {"data2vec": TINY_TEXT, "data2vec2": TINY_2_TEXT}


def finetune_file(folder: Path, objective: str, encoder: str = "data2vec", **changes: Any) -> Path:
    """A tiny configuration of fine-tuning on 24 pairs of texts, of 2 classes or with scores."""
    base = ENCODERS[encoder]
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir()
        small_tokenizer().save(folder / "tokenizer")
        texts = sentences(24, seed=5)
        rows = [f"{one}\t{other}\t{number % 2}" for number, (one, other) in enumerate(itertools.pairwise(texts))]
        (folder / "train.tsv").write_text("\n".join(["first\tsecond\tlabel", *rows]) + "\n")
    raw = copy.deepcopy(base)
    raw["d2v"] = {
        "modality": "text",
        "objective": objective,
        "encoder": encoder,
        "model": {**base["d2v"]["model"], "vocab_size": 360, "padding_id": 1, "layer_drop": 0.0},
        "data": {
            "path": str(folder / "train.tsv"),
            "field": "first",
            "pair_field": "second",
            "tokenizer": str(folder / "tokenizer"),
            "block_size": 32,
            "num_workers": 0,
        },
        "valid": {"fraction": 0.3, "metric": "accuracy" if objective == "classify" else "mse"},
        "schedule": {"steps": 4},
        "run": copy.deepcopy(base["d2v"]["run"]),
    }
    return tiny_file(folder, raw, **changes)


def held_out(run: Path) -> torch.Tensor:
    """Predictions of the best checkpoint of a run for its held-out pairs."""
    _, model = load_finetuned(run)
    maker = held_out_batches(model.config)
    ids = np.arange(maker.num_samples)
    with torch.no_grad():
        return model.eval()(maker.make(MicroStep(0, ids, ids), 0).batch).predictions


@pytest.mark.parametrize(
    ("objective", "encoder", "pooling"),
    [
        ("classify", "data2vec", "token"),
        ("regress", "data2vec", "token"),
        ("regress", "data2vec", "mean"),
        ("classify", "data2vec2", "mean"),
    ],
)
def test_transformers_answers_as_the_run_does(objective: str, encoder: str, pooling: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = finetune_file(tmp_path, objective, encoder, d2v__head={"pooling": pooling})
    assert run_here(file, "--run", "r") == 0
    run = tmp_path / "runs" / "r"
    result = json.loads((run / "result.json").read_text())
    assert result["best"]["value"] is not None
    export_run(run, to=tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "text-classification" in card
    trust = {"trust_remote_code": True} if encoder == "data2vec2" or pooling == "mean" else {}
    assert ("trust_remote_code=True" in card) == bool(trust)
    if trust:
        # no other head takes its place in silence
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            transformers.pipeline("text-classification", str(tmp_path / "export"), trust_remote_code=False)
    pipe = transformers.pipeline("text-classification", str(tmp_path / "export"), device="cpu", **trust)
    table, answers = tmp_path / "train.tsv", tmp_path / "answers.jsonl"
    assert main(["predict", str(run), str(table), "--to", str(answers)]) == 0
    ours = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["path"] for row in ours] == [f"train.tsv:{number}" for number in range(2, 25)]
    pairs = [line.split("\t")[:2] for line in table.read_text().splitlines()[1:]]
    inputs = [{"text": one, "text_pair": other} for one, other in pairs]
    theirs = pipe(inputs, truncation=True, max_length=32, top_k=None, batch_size=8)
    for row, found in zip(ours, theirs, strict=True):
        if objective == "regress":
            assert found[0]["score"] == pytest.approx(row["score"], abs=1e-5)
        else:
            assert found[0]["label"] == row["label"]
            probabilities = {one["label"]: one["probability"] for one in row["top"]}
            assert {one["label"]: one["score"] for one in found} == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_a_folder_with_a_head_goes_on(pooling: str, tmp_path: Path) -> None:
    """The encoder, and the head of the same classes."""
    head = {"d2v__head": {"pooling": pooling}}
    assert run_here(finetune_file(tmp_path, "classify", **head), "--run", "r") == 0
    export_run(tmp_path / "runs" / "r", to=tmp_path / "export")
    saved = head_of_folder(tmp_path / "export")
    assert saved is not None
    assert saved.labels == ("0", "1")
    assert saved.keys == {"pooling": pooling}
    source = {"d2v__finetune": {"source": str(tmp_path / "export")}, "d2v__schedule": {"steps": 1}}
    file = finetune_file(tmp_path, "classify", **source, **head)
    raw = json.loads(file.read_text())
    del raw["d2v"]["model"], raw["d2v"]["data"]["tokenizer"]
    raw["optimizer"]["params"]["lr"] = 1e-12
    file.write_text(json.dumps(raw))
    assert run_here(file, "--run", "more") == 0
    again, before = held_out(tmp_path / "runs" / "more"), held_out(tmp_path / "runs" / "r")
    torch.testing.assert_close(again, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_head_reads_no_padding(pooling: str, tmp_path: Path) -> None:
    """Two texts together are scored as each of them alone."""
    config = load_config(finetune_file(tmp_path, "regress", d2v__head={"pooling": pooling})).d2v
    assert isinstance(config, TextRegressConfig)
    head = TextHead(config).eval()
    torch.nn.init.normal_(head.dense.weight)
    torch.nn.init.normal_(head.out.weight)
    hidden = torch.randn(2, 7, config.model.width)
    alone = torch.cat([head(hidden[:1]), head(hidden[1:, :4])])
    hidden[1, 4:] = torch.nan
    torch.testing.assert_close(head(hidden, torch.tensor([7, 4])), alone)
    hidden[:, 2] += 1.0
    changes = (head(hidden, torch.tensor([7, 4])) - alone).abs().min() > 1e-3
    assert changes == (pooling == "mean")


def test_predictions_of_lines_and_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(finetune_file(tmp_path, "classify"), "--run", "r") == 0
    run, table = tmp_path / "runs" / "r", tmp_path / "more.tsv"
    table.write_text("second\tfirst\nb\ta\nonly one\n\tno second\nd\tc\n")
    answers = tmp_path / "answers.csv"
    assert main(["predict", str(run), str(table), "--to", str(answers)]) == 0
    assert [line.split(",")[0] for line in answers.read_text().splitlines()] == ["path", "more.tsv:2", "more.tsv:5"]
    said = capsys.readouterr().err
    assert "2 of 4 rows are unreadable and left out" in said
    assert "more.tsv, line 3: 1 fields instead of 2" in said
    (tmp_path / "lines.txt").write_text("one text\n")
    assert main(["predict", str(run), str(tmp_path / "lines.txt"), "--to", str(answers), "--overwrite"]) == 1
    assert "since this model reads pairs" in capsys.readouterr().err


def test_another_tokenizer_than_the_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2v_fast.modalities.text.tokenizer import train_tokenizer

    assert run_here(finetune_file(tmp_path, "classify"), "--run", "r") == 0
    (tmp_path / "other").mkdir()
    train_tokenizer(sentences(300, seed=9), 330).save(tmp_path / "other")
    changes = {
        "d2v__finetune": {"source": str(tmp_path / "runs" / "r")},
        "d2v__data__tokenizer": str(tmp_path / "other"),
    }
    file = finetune_file(tmp_path, "classify", **changes)
    capsys.readouterr()
    assert run_here(file, "--run", "more") == 2
    assert "`d2v.data.tokenizer` must be the tokenizer that" in capsys.readouterr().err


@pytest.mark.slow  # three runs in processes of their own
def test_killed_regression_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = {"d2v__finetune": {"freeze_encoder_steps": 2, "layer_decay": 0.8}, "d2v__schedule": {"steps": 7}}
    changes |= {"d2v__model__dropout": 0.1, "d2v__head": {"dropout": 0.2}, "d2v__run__save_every": 2}
    file = finetune_file(tmp_path, "regress", **changes)

    check_killed_run(tmp_path, file)


@needs_deepspeed
@pytest.mark.slow  # DeepSpeed in two processes
@pytest.mark.parametrize("stage", [2, 3])
def test_regression_in_two_processes_equals_one(stage: int, tmp_path: Path) -> None:
    """The head of one output makes the number of parameters odd."""
    changes: dict[str, Any] = {"d2v__model__dropout": 0.0, "d2v__model__attention_dropout": 0.0}
    changes |= {"d2v__schedule": {"steps": 4}}
    # a small epsilon makes large steps out of the rounding of tiny gradients
    changes |= {"zero_optimization__stage": stage, "optimizer__params": {"lr": 1e-3, "eps": 1e-4}}
    file = finetune_file(tmp_path, "regress", **changes)
    check_two_processes(tmp_path, file)
    # the correlations of an untrained head's scores, which hardly differ, would show their rounding
    for mine, other in zip(validations(tmp_path, "one"), validations(tmp_path, "two"), strict=True):
        assert mine["mse"] == pytest.approx(other["mse"], rel=1e-4)
        assert mine["samples"] == other["samples"] == 7
