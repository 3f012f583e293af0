"""Import and export of fairseq's text checkpoints, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.commands.console import main
from d2v_fast.config import TextConfig, TextModelConfig, load_config
from d2v_fast.interop.fairseq import load_fairseq, read_fairseq
from d2v_fast.modalities.speech.fairseq import load_fairseq_speech
from d2v_fast.modalities.text import fairseq as fairseq_text
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.fairseq import load_fairseq_text, read_fairseq_text, save_fairseq_text
from d2v_fast.modalities.text.huggingface import export_text, import_text
from d2v_fast.modalities.text.layout import text_layout
from d2v_fast.modalities.text.tokenizer import load_tokenizer
from d2v_fast.objectives.build import build_model
from tests.helpers.checkpoint_files import opened
from tests.helpers.fairseq_speech_files import pretrained as pretrained_speech
from tests.helpers.fairseq_text_files import PREFIX, pretrained, shapes
from tests.helpers.runs import TINY_TEXT, figures, leave_out_reports, run_here, tiny_file
from tests.helpers.speech_reference import randomize_
from tests.helpers.text_files import small_tokenizer
from tests.helpers.text_models import make_config, make_pair
from tests.helpers.tokenizer_folders import word_piece
from tests.helpers.written_runs import assert_holds_run, write_run


def saved_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    small_tokenizer().save(folder)
    return folder


def saved(content: dict[str, Any], folder: Path) -> Path:
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def assert_state_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("head", ["regression", "lm"])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_hand_made_checkpoint(head: str, weights: str, tmp_path: Path) -> None:
    content = pretrained(head)
    given = content["model"]
    model, found_head, config = load_fairseq_text(saved(content, tmp_path), weights=weights)
    assert config == TextModelConfig(
        vocab_size=40,
        padding_id=1,
        max_positions=16,
        width=32,
        depth=2,
        heads=4,
        mlp_ratio=1.5,
        dropout=0.2,
        attention_dropout=0.0,
        activation_dropout=0.05,
        layer_drop=0.1,
    )
    if head == "lm":
        assert found_head is None
    else:
        assert found_head is not None
        own = build_model(TextConfig(model=config, target={"top_k": 1}, data={"block_size": 16})).head
        own.load_state_dict(found_head)
        assert torch.equal(own[2].bias, given["encoder.regression_head.2.bias"])
    factor = 2 if weights == "teacher" else 1
    state = model.state_dict()
    assert torch.equal(state["embedding.token.weight"], given[f"{PREFIX}embed_tokens.weight"])
    assert torch.equal(state["embedding.position"], given[f"{PREFIX}embed_positions.weight"])
    assert torch.equal(state["embedding.norm.bias"], given[f"{PREFIX}layernorm_embedding.bias"])
    layer = f"{PREFIX}layers.1"
    q, k, v = (given[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(state["context.encoder.blocks.1.attention.qkv.weight"], factor * torch.cat([q, k, v]))
    assert torch.equal(
        state["context.encoder.blocks.1.norm1.bias"], factor * given[f"{layer}.self_attn_layer_norm.bias"]
    )
    assert torch.equal(state["context.encoder.blocks.1.fc2.weight"], factor * given[f"{layer}.fc2.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_hand_made_checkpoint_computes_what_fairseq_does(tmp_path: Path) -> None:
    """fairseq's formulas with fairseq's names: positions counted from the padding token, post-norm blocks."""
    content = pretrained()
    for name, value in content["model"].items():
        if name.endswith("weight") and value.dim() == 2:
            value.mul_(1 / math.sqrt(value.shape[1]))
    model, _, config = load_fairseq_text(saved(content, tmp_path))
    w = {n.removeprefix(PREFIX): v for n, v in content["model"].items() if n.startswith(PREFIX)}
    tokens = torch.randint(4, 40, (2, 9))
    tokens[1, 6:] = 1
    kept = tokens != 1

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    positions = kept.cumsum(1) * kept + 1
    x = norm(w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][positions], "layernorm_embedding")
    for i in range(2):
        heads = [
            linear(x, f"layers.{i}.self_attn.{name}_proj").unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for name in "qkv"
        ]
        logits = heads[0] @ heads[1].mT / math.sqrt(8)
        mixed = logits.masked_fill(~kept[:, None, None], -math.inf).softmax(-1) @ heads[2]
        attended = linear(mixed.transpose(1, 2).flatten(2), f"layers.{i}.self_attn.out_proj")
        x = norm(x + attended, f"layers.{i}.self_attn_layer_norm")
        x = norm(x + linear(F.gelu(linear(x, f"layers.{i}.fc1")), f"layers.{i}.fc2"), f"layers.{i}.final_layer_norm")
    ours = model.eval()(tokens, torch.tensor([9, 6])).last_hidden
    torch.testing.assert_close(ours[kept], x[kept], rtol=0, atol=1e-5)


def test_names_and_shapes_of_the_base_size() -> None:
    config = TextModelConfig()
    with torch.device("meta"):
        model = TextModel(config)
    layout = text_layout(config, fairseq_text.NAMES)
    state = {name: value.shape for name, value in model.state_dict().items()}
    found = {"version": (1,)}
    for name, their_names in layout.names.items():
        for their_name in their_names:
            shape = tuple(layout._their_shape(their_name, list(state[name]), len(their_names)))
            found[their_name.removeprefix(PREFIX)] = shape
    assert found == shapes(50_265, 514, 768, 3072, 12)
    # the counts of the average in the published checkpoint
    assert len(found) == 197
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 124_054_273


def test_without_cfg_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    content = pretrained(width=128)
    del content["cfg"]
    path = saved(content, tmp_path)
    published = {"vocab_size": 40, "padding_id": 1, "max_positions": 16, "width": 128, "depth": 2, "heads": 2}
    published["mlp_ratio"] = 0.375
    assert load_fairseq_text(path)[2] == TextModelConfig(**published)
    assert load_fairseq_text(path, heads=8)[2].heads == 8
    wanted = TextModelConfig(**{**published, "heads": 4, "dropout": 0.0})
    assert load_fairseq_text(path, config=wanted)[2] == wanted


def test_low_precision_and_a_teacher_with_its_own_embeddings(tmp_path: Path) -> None:
    content = pretrained()
    average = content["model"].pop("encoder._ema")
    content["model"] = {name: value.half() for name, value in content["model"].items()}
    content["model"]["encoder._ema"] = {name: 3 * value for name, value in average.items()}
    found = read_fairseq_text(saved(content, tmp_path))
    assert found.teacher is not None
    assert {p.dtype for model in (found.student, found.teacher) for p in model.parameters()} == {torch.float32}
    assert torch.equal(found.teacher.embedding.token.weight, 3 * average["embed_tokens.weight"])


def test_an_average_of_the_blocks_alone(tmp_path: Path) -> None:
    content = pretrained()
    average = content["model"]["encoder._ema"]
    content["model"]["encoder._ema"] = {name: value for name, value in average.items() if name.startswith("layers.")}
    found = read_fairseq_text(saved(content, tmp_path))
    assert found.teacher is not None
    assert found.teacher.embedding.position.data_ptr() == found.student.embedding.position.data_ptr()
    assert torch.equal(found.teacher.context.encoder.blocks[0].fc1.bias, average["layers.0.fc1.bias"])


def test_fine_tuned_model(tmp_path: Path) -> None:
    content = pretrained()
    model = {name: value for name, value in content["model"].items() if name.startswith(PREFIX)}
    model |= {"classification_heads.sentence.dense.weight": torch.randn(32, 32)}
    path = saved({**content, "model": model}, tmp_path)
    student, head, _ = load_fairseq_text(path)
    assert head is None
    assert torch.equal(student.embedding.token.weight, model[f"{PREFIX}embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"`weights` must be student with .* which holds no average `encoder._ema`"):
        load_fairseq_text(path, weights="teacher")


def test_round_trip_is_exact(tmp_path: Path) -> None:
    config = make_config()
    model, average = make_pair(config)
    randomize_(average)
    teacher = model.student.with_averaged(average)
    save_fairseq_text(model.student, model.head, teacher, config, tmp_path / "a.pt", num_updates=12)
    found = read_fairseq_text(tmp_path / "a.pt")
    assert found.config == config.model
    assert found.teacher is not None
    assert found.head is not None
    assert_state_equal(found.student, model.student)
    assert_state_equal(found.teacher, teacher)
    assert found.head.keys() == model.head.state_dict().keys()
    assert all(torch.equal(value, found.head[name]) for name, value in model.head.state_dict().items())
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert raw["cfg"]["model"]["transformer"]["encoder"]["attention_heads"] == config.model.heads
    assert raw["cfg"]["model"]["loss_scale"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_hand_made_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Export after import restores every name and every bit."""
    content = pretrained()
    found = read_fairseq_text(saved(content, tmp_path))
    config = make_config().model_copy(update={"model": found.config})
    save_fairseq_text(found.student, found.head, found.teacher, config, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    averages = back.pop("encoder._ema"), content["model"].pop("encoder._ema")
    averages[1]["version"] = torch.tensor([3.0])
    for part, other in (averages, (back, content["model"])):
        assert part.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in part.items())
    save_fairseq_text(found.student, None, None, config, tmp_path / "bare.pt")
    bare = read_fairseq_text(tmp_path / "bare.pt")
    assert bare.head is None
    assert bare.teacher is None


def test_norms_that_fairseq_does_not_have(tmp_path: Path) -> None:
    config = make_config(norm_eps=1e-3)
    model = build_model(config)
    with pytest.raises(ValueError, match=r"`d2v.model.norm_eps` must be 1e-05 for fairseq, but is 0.001 instead"):
        save_fairseq_text(model.student, model.head, None, config, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in names:
            del content["model"][name]

    return change


def drop_average(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"]["encoder._ema"].pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["model"].update({name: value})


def option(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        transformer = content["cfg"]["model"]["transformer"]
        (transformer["encoder"] if section == "encoder" else transformer).update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop(f"{PREFIX}embed_tokens.weight"),
            r"is no data2vec text model of 2 blocks of width 32:\n  `[\w.]+embed_tokens.weight` is missing$",
        ),
        (drop(f"{PREFIX}layers.1.fc1.bias"), r"`encoder.sentence_encoder.layers.1.fc1.bias` is missing"),
        (drop("encoder.regression_head.2.bias"), r"`encoder.regression_head.2.bias` is missing"),
        (drop_average("layers.0.fc1.bias"), r"`encoder._ema.layers.0.fc1.bias` is missing"),
        (
            put(f"{PREFIX}embed_positions.weight", torch.zeros(18, 31)),
            r"embed_positions.weight` must be \[18, 32\], but is \[18, 31\] instead",
        ),
        (put(f"{PREFIX}layer_norm.weight", torch.zeros(32)), r"sentence_encoder.layer_norm.weight` has no place in"),
        (
            put("encoder.regression_head.0.weight", torch.zeros(32, 32)),
            r"`encoder.regression_head.0.weight` must be \[64, 32\], but is \[32, 32\] instead",
        ),
        (
            put("encoder.regression_head.4.weight", torch.zeros(32, 32)),
            r"`encoder.regression_head.4.weight` has no place in a head of 2 layers",
        ),
        (put(f"{PREFIX}embed_tokens.weight", [1.0]), r"embed_tokens.weight` is no tensor"),
        (put("mask_emb", torch.zeros(32)), r"`mask_emb` has no place in this encoder"),
        (
            put("feature_extractor.x", torch.zeros(1)),
            r"must hold a data2vec text model, but holds a speech model: `feature_extractor.x`",
        ),
        (put("modality_encoders.TEXT.x", torch.zeros(1)), r"holds a model of data2vec 2.0: `modality_encoders.TEXT.x`"),
        (option("encoder", normalize_before=True), r"`normalize_before` in the `cfg` of .* must be false"),
        (option("encoder", learned_pos=False), r"`learned_pos` in the `cfg` of .* must be true, but is false instead"),
        (option("encoder", attention_heads=5), r"`heads` must divide `width`"),
        (option("", activation_fn="relu"), r'`activation_fn` in .* must be "gelu", but is "relu" instead'),
        (option("", no_scale_embedding=False), r"`no_scale_embedding` in .* must be true"),
        (option("", layernorm_embedding=False), r"`layernorm_embedding` in .* must be true"),
        (option("", dropout=1.5), r"`dropout` must be in \[0, 1\), but is 1.5 instead"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    content = pretrained()
    change(content)
    with pytest.raises(ValueError, match=message):
        load_fairseq_text(saved(content, tmp_path))


def test_each_kind_is_identified_by_its_names(tmp_path: Path) -> None:
    path = saved(pretrained(), tmp_path)
    assert isinstance(read_fairseq(path).config, TextModelConfig)
    assert torch.equal(
        load_fairseq(path, weights="teacher")[0].state_dict()["context.encoder.blocks.0.fc1.bias"],
        2 * load_fairseq(path)[0].state_dict()["context.encoder.blocks.0.fc1.bias"],
    )
    with pytest.raises(ValueError, match=r"must hold a data2vec speech model, but holds a text model"):
        load_fairseq_speech(path)
    path = saved(pretrained_speech(), tmp_path)
    with pytest.raises(ValueError, match=r"must hold a data2vec text model, but holds a speech model"):
        load_fairseq_text(path)
    assert read_fairseq(path).config.width == 32
    with pytest.raises(ValueError, match=r"`weights` must be student or teacher, but is ema instead"):
        load_fairseq(path, weights="ema")


def test_no_dictionary_of_fairseq_has_other_special_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """fairseq would treat the token of id 1 as padding, whatever it stands for here."""
    config = make_config(padding_id=0)
    model = TextModel(config.model)
    with pytest.raises(ValueError, match=r"`d2v.model.padding_id` must be 1 for fairseq, .* but is 0 instead"):
        save_fairseq_text(model, None, None, config, tmp_path / "a.pt")
    # the configuration of the run does not hold the padding id
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(word_piece()))
    data = {"kind": "text", "path": "?", "tokenizer": str(tmp_path / "tok"), "block_size": 16}
    config = TextConfig.model_validate({**make_config(padding_id=None).model_dump(), "data": data})
    write_run(tmp_path / "r", config, 1)
    assert main(["export", str(tmp_path / "r"), "--format", "fairseq"]) == 2
    assert "fairseq numbers begin, padding, end and unknown token (0, 1, 2, 3)" in capsys.readouterr().err
    assert not (tmp_path / "r" / "export.pt").exists()


def test_export_for_fairseq_holds_student_head_and_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    model = write_run(tmp_path / "r", config, 2)
    assert main(["export", str(tmp_path / "r"), "--format", "fairseq"]) == 0
    assert "(student and teacher, step 7, for fairseq)" in capsys.readouterr().out
    found = read_fairseq_text(tmp_path / "r" / "export.pt")
    assert found.config == config.model
    assert_holds_run(found, model)


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_import_to_transformers(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = pretrained()
    path = saved(content, tmp_path)
    out = tmp_path / "out"
    assert main(["import", str(path), "--to", str(out), "--weights", weights]) == 0
    assert f"({weights} of checkpoint.pt, for Transformers)" in capsys.readouterr().out
    model, config = import_text(out)
    assert (config.heads, config.max_positions) == (4, 16)
    factor = 2 if weights == "teacher" else 1
    assert torch.equal(
        model.context.encoder.blocks[0].fc1.bias, factor * content["model"][f"{PREFIX}layers.0.fc1.bias"]
    )
    assert "The tokenizer is not in this folder" in (out / "README.md").read_text()

    given = ["--tokenizer", str(saved_tokenizer(tmp_path / "tokenizer"))]
    assert main(["import", str(path), "--to", str(tmp_path / "none"), *given]) == 1
    assert "`d2v.model.vocab_size` must be >= 360" in capsys.readouterr().err
    content["model"][f"{PREFIX}embed_tokens.weight"] = torch.randn(360, 32)
    content["model"]["encoder._ema"]["embed_tokens.weight"] = torch.randn(360, 32)
    again = ["--to", str(out), "--overwrite", *given]
    assert main(["import", str(saved(content, tmp_path)), *again]) == 0
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 16
    assert main(["import", str(saved(pretrained_speech(), tmp_path)), *again]) == 2
    assert "`--tokenizer` is for text" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fairseq", "transformers"])
def test_run_begins_with_given_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_reports(monkeypatch.setattr)
    tokens = str(tmp_path / "tokens")
    file = tiny_file(tmp_path, TINY_TEXT, d2v__schedule={"steps": 1}, d2v__data__tokens_path=tokens)
    config = load_config(file).d2v
    assert isinstance(config, TextConfig)
    model, other = build_model(config), build_model(config)
    randomize_(model)
    randomize_(other)
    teacher = model.student.with_averaged(other.student.averaged if kind == "fairseq" else model.student.averaged)
    source = tmp_path / kind
    if kind == "fairseq":
        save_fairseq_text(model.student, model.head, teacher, config, source)
    else:
        export_text(model.student, config, source, tokenizer=small_tokenizer())
    run = tmp_path / "runs" / "more"
    arguments = ["import", str(source), "--to", str(run), "--ds_config", str(file)]
    assert main([*arguments, "--set", "d2v.model.max_positions=64"]) == 1
    assert "`d2v.model.max_positions` must be 32, but is 64 instead" in capsys.readouterr().err
    assert main([*arguments, "--tokenizer", "x"]) == 2
    assert "a run names its own as `d2v.data.tokenizer`" in capsys.readouterr().err
    assert main(arguments) == 0
    for weights, whole in (("student", model.student), ("teacher", teacher)):
        saved_weights = SavedWeights(opened(run / "checkpoints" / "step-0"), weights, "context.")
        assert len(saved_weights) == len(whole.state_dict())
        for name, value in whole.state_dict().items():
            assert torch.equal(saved_weights[name], value), name
    if kind == "fairseq":
        head = SavedWeights(opened(run / "checkpoints" / "step-0"), "student").head()
        assert all(torch.equal(head[name], value) for name, value in model.head.state_dict().items())
    resume = ["--run", "more", "--resume", "--set", f"d2v.run.dir={run.parent}"]
    if kind == "transformers":
        # the folder's tokenizer is not that of the sample set
        assert run_here(*resume) == 1
        assert "`d2v.data.tokenizer` must be the tokenizer that the checkpoint" in capsys.readouterr().err
        resume += ["--set", f"d2v.data.tokenizer={source}"]
    assert run_here(*resume) == 0
    assert len(figures(tmp_path, "more")) == 1
    assert main(["export", str(run)]) == 0
    assert (load_tokenizer(run / "export").digest == small_tokenizer().digest) == (kind == "transformers")
    if kind == "fairseq":
        assert main(["export", str(run), "--tokenizer", str(saved_tokenizer(tmp_path / "other"))]) == 1
        assert f"must be the tokenizer that {run} was trained with" in capsys.readouterr().err


def test_a_text_model_is_no_model_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(pretrained(), tmp_path)
    assert main(["import", str(path), "--to", str(tmp_path / "r"), "--ds_config", "configs/speech.json"]) == 1
    assert '`d2v.modality` in configs/speech.json must be "text" as in' in capsys.readouterr().err
