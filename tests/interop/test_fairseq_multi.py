"""fairseq's checkpoints of data2vec 2.0: every name and shape, both ways without a changed bit, and clear refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2v_fast.commands.console import main
from d2v_fast.config import D2VConfig, check_d2v, load_config
from d2v_fast.interop import fairseq_multi_model
from d2v_fast.interop.fairseq_recipe import Settings
from d2v_fast.interop.huggingface import export_model
from d2v_fast.interop.layout import Misfit
from d2v_fast.interop.published import open_published, read_published
from d2v_fast.modalities import modality_of, modality_of_model
from d2v_fast.objectives.build import build_model
from tests.golden2.__main__ import FOLDER
from tests.golden2.cases import Case, cases_of

CASES = {case.kind: case for case in cases_of(FOLDER)}
PAGE = (FOLDER / "checkpoint_layout_v2.md").read_text()
KINDS = {"vision": "IMAGE", "speech": "AUDIO", "text": "TEXT"}
# sizes that differ between Base and Large, as the page has them
LARGE = {
    "vision": {
        "model": {
            "width": 1024,
            "heads": 16,
            "context_depth": 0,
            "depth": 24,
            "decoder": {"width": 1024, "depth": 3, "kernel": 5, "groups": 16},
        }
    },
    "speech": {
        "model": {
            "width": 1024,
            "heads": 16,
            "context_depth": 8,
            "depth": 16,
            "decoder": {"width": 768, "depth": 4, "kernel": 7, "groups": 16},
        }
    },
    "text": {
        "model": {
            "width": 1024,
            "heads": 16,
            "depth": 24,
            "decoder": {"width": 768, "depth": 5, "kernel": 9, "groups": 1, "residual": False, "projection": 2},
        }
    },
}


def section_of(modality: str, **sections: Any) -> D2VConfig:
    config, problems = check_d2v({"modality": modality, "objective": "data2vec2", **sections})
    assert config is not None, problems
    return config


def written(config: D2VConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Names and shapes of `model` and `_ema` in a file of this configuration, of tensors without memory."""
    kept: list[Any] = []
    monkeypatch.setattr(fairseq_multi_model, "write_checkpoint", lambda path, weights, cfg, steps: kept.append(weights))
    published = modality_of(config).published
    assert published is not None
    with FakeTensorMode():
        model = build_model(config)
        published().write(model.student, model.head, model.student, config, Path("none.pt"))
    weights = kept[0]
    average = weights.pop("_ema")
    assert {one.dtype for one in (*weights.values(), *average.values())} == {torch.float32}
    return tuple({name: tuple(one.shape) for name, one in part.items()} for part in (weights, average))


def numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


SECTIONS = {"vision": ("## 2.", "## 3."), "speech": ("## 3.", "## 4."), "text": ("## 4.", "## 5.")}


@pytest.mark.parametrize("modality", KINDS)
def test_a_base_file_has_the_names_and_shapes_of_the_page(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = SECTIONS[modality]
    page = PAGE[PAGE.index(begin) : PAGE.index(end)]
    expected: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = {}, {}
    row = re.compile(r"\| `([\w.{}]+)`(?: \([ij] = (\d+)(?: to (\d+))?\))? \| \[([\d, ]+)\] \| (yes|no)(.*)\|")
    for line in page.splitlines():
        if (found := row.match(line)) is None:
            continue
        pattern, first, last, shape, averaged, as_ = found.groups()
        short = re.search(r"as `([\w.{}]+)`", as_)
        for index in range(int(first or 0), int(last or first or 0) + 1):
            sizes = tuple(map(int, shape.split(",")))
            expected[0][re.sub(r"\{[ij]\}", str(index), pattern)] = sizes
            if averaged == "yes":
                expected[1][re.sub(r"\{[ij]\}", str(index), pattern if short is None else short[1])] = sizes
    found_here = written(section_of(modality), monkeypatch)
    assert found_here[0] == expected[0]
    assert found_here[1] == expected[1]
    for shapes, name in zip(found_here, ("`model` without `_ema`", "`_ema`"), strict=True):
        assert f"{name}: {len(shapes)} tensors, {numbers(shapes):,} numbers" in page


@pytest.mark.parametrize("modality", KINDS)
def test_a_large_file_has_the_tensors_of_the_page(modality: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = SECTIONS[modality]
    page = " ".join(PAGE[PAGE.index(begin) : PAGE.index(end)].split())
    model, average = written(section_of(modality, **LARGE[modality]), monkeypatch)
    counts = f"{len(model)} tensors, {numbers(model):,}"
    assert f"{counts} numbers; `_ema` {len(average)} tensors, {numbers(average):,}" in page or (
        f"{counts}; `_ema` {len(average)} tensors, {numbers(average):,}" in page
    )


def saved(case: Case, folder: Path, **changes: Any) -> Path:
    path = folder / f"{case.name}.pt"
    torch.save({**case.checkpoint, **changes}, path)
    return path


def config_of(case: Case, path: Path) -> tuple[Any, Any, D2VConfig]:
    """The format of a case's file, what it holds, and the configuration of its step."""
    form, found = open_published(path)
    modality = modality_of_model(found.config)
    assert form.step is not None
    sections = form.step(case.checkpoint, path)
    return form, found, section_of(modality.name, model=found.config.model_dump(), **sections)


@pytest.mark.parametrize("kind", CASES)
def test_reading_and_writing_change_no_bit(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    form, found, config = config_of(case, saved(case, tmp_path))
    form.write(found.student, found.head, found.teacher, config, tmp_path / "again.pt", num_updates=5)
    content = torch.load(tmp_path / "again.pt", weights_only=True)
    average = content["model"].pop("_ema")
    for part, prefix in ((content["model"], "student."), (average, "teacher.")):
        expected = case.below(prefix)
        assert part.keys() == expected.keys()
        assert all(torch.equal(part[name], one) for name, one in expected.items())
    again = read_published(tmp_path / "again.pt")
    assert again.config == found.config
    assert not again.assumed
    assert again.pending_decay is None
    assert {"criterion", "lr_scheduler", "ema", "optimizer", "scoring"} <= content["cfg"].keys()


# of a file's `cfg.model`, what no run states: how the model began, and when fairseq stops it
FREE = {"seed", "max_update", "min_target_var", "min_pred_var", "mae_init"}


@pytest.mark.parametrize("kind", CASES)
def test_the_configuration_comes_back(kind: str, tmp_path: Path) -> None:
    """`cfg.model` has every key of fairseq's, and the values of the file that it was read from."""
    case = CASES[kind]
    form, found, config = config_of(case, saved(case, tmp_path))
    form.write(found.student, found.head, found.teacher, config, tmp_path / "again.pt")
    model = torch.load(tmp_path / "again.pt", weights_only=True)["cfg"]["model"]
    assert flat(model).keys() == flat(case.model).keys()
    spec = "modalities.audio.feature_encoder_spec"
    differing = {key for key, one in flat(case.model).items() if flat(model)[key] != one} - FREE
    assert differing <= {spec}
    assert form.step({"cfg": {"model": model}}, tmp_path) == form.step(case.checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("scale", "loss"), [(0.5, ("sum", 0.5)), (1, ("sum", 1.0)), (1 / 32, ("mean", 1.0)), (None, ("rsqrt", 1.0))]
)
def test_any_scale_of_the_loss_comes_back(scale: float | None, loss: tuple[str, float], tmp_path: Path) -> None:
    case = replace(CASES["IMAGE"], model={**CASES["IMAGE"].model, "loss_scale": scale})
    form, found, config = config_of(case, saved(case, tmp_path))
    assert (config.loss.channel_reduction, config.loss.scale) == loss
    assert config.loss.divisor(32) == pytest.approx(32**0.5 if scale is None else 1 / scale)
    form.write(found.student, found.head, found.teacher, config, tmp_path / "again.pt")
    assert torch.load(tmp_path / "again.pt", weights_only=True)["cfg"]["model"]["loss_scale"] == scale
    for wrong in (0, -1.0, "a"):
        bad = replace(case, model={**case.model, "loss_scale": wrong})
        with pytest.raises(ValueError, match=r"`loss_scale` in the `cfg` of .* must be null or a number > 0"):
            config_of(bad, saved(bad, tmp_path))


def flat(section: dict[str, Any], front: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{front}{key}.") if isinstance(value, dict) else {f"{front}{key}": value}
    return found


FINE_TUNED = {
    "IMAGE": ("model.", "pretrained_model_args", {"fc_norm.weight": (32,), "head.weight": (10, 32)}),
    "AUDIO": ("w2v_encoder.w2v_model.", "w2v_args", {"w2v_encoder.proj.weight": (30, 36)}),
    "TEXT": (
        "model.",
        "pretrained_model_args",
        {"classification_heads.sentence_classification_head.dense.weight": (32, 32)},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_fine_tuned_file_gives_its_encoder(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[kind]
    prefix, key, heads = FINE_TUNED[kind]
    own = {name: one for name, one in case.below("student.").items() if ".decoder." not in name}
    model = {prefix + name: one for name, one in own.items()} | {n: torch.ones(s) for n, s in heads.items()}
    cfg = {"model": {"_name": "some_fine_tuning", key: {"model": dict(case.model), "task": {"sample_rate": 16_000}}}}
    found = read_published(saved(case, tmp_path, model=model, cfg=cfg))
    whole = read_published(saved(case, tmp_path))
    assert found.head is None
    assert found.teacher is None
    assert found.config == whole.config
    for name, one in whole.student.state_dict().items():
        assert torch.equal(found.student.state_dict()[name], one)
    assert "is read without the parts" in caplog.text


def test_old_and_halved_files_are_read(tmp_path: Path) -> None:
    """A scale without its first dimension, a dropped tensor, and weights in fp16."""
    case = CASES["AUDIO"]
    model: dict[str, Any] = {name: one.half() for name, one in case.below("student.").items()}
    model["modality_encoders.AUDIO.alibi_scale"] = model["modality_encoders.AUDIO.alibi_scale"][0]
    model["modality_encoders.AUDIO.encoder_mask"] = torch.zeros(36)
    model["_ema"] = case.below("teacher.")
    found = read_published(saved(case, tmp_path, model=model))
    state = found.student.state_dict()
    assert {one.dtype for one in state.values()} == {torch.float32}
    expected = case.tensors["student.modality_encoders.AUDIO.alibi_scale"].half().float()
    assert torch.equal(state["context.alibi.scale"], expected.flatten())


def test_a_file_without_cfg_needs_what_no_tensor_shows(tmp_path: Path) -> None:
    """Sizes come from the tensors; heads must be given where the width is no multiple of 64."""
    case = CASES["IMAGE"]
    path = saved(case, tmp_path, cfg=None)
    with pytest.raises(ValueError, match="`--heads` must be given"):
        read_published(path)
    found = read_published(path, Settings.of(None, 4))
    assert found.config == read_published(saved(case, tmp_path)).config
    assert any("norm_eps" in one for one in found.assumed)
    assert any("decoder.residual" in one for one in found.assumed)


def changed(case: Case, name: str, value: Tensor | None) -> dict[str, Any]:
    model = dict(case.checkpoint["model"])
    if value is None:
        del model[name]
    else:
        model[name] = value
    return model


def test_misfits_are_named(tmp_path: Path) -> None:
    case = CASES["IMAGE"]
    table = "modality_encoders.IMAGE.fixed_positional_encoder.positions"
    for name, value, message in (
        ("blocks.1.norm2.bias", None, r"`blocks\.1\.norm2\.bias` is missing"),
        ("blocks.0.attn.proj.bias", torch.zeros(7), r"`blocks\.0\.attn\.proj\.bias` must be \[32\], but is \[7\]"),
        ("mystery.weight", torch.zeros(3), "`mystery.weight` has no place in this encoder"),
        (table, torch.randn(1, 25, 32), "must hold the published table"),
        ("modality_encoders.IMAGE.decoder.proj.bias", None, r"decoder\.proj\.bias` is missing"),
    ):
        with pytest.raises(Misfit, match=message):
            read_published(saved(case, tmp_path, model=changed(case, name, value)))
    only = {"modality_encoders.IMAGE.extra_tokens": torch.zeros(1, 1, 768)}
    with pytest.raises(Misfit, match=r"width 768:\n  `modality_encoders\.IMAGE\.fixed_positional.* is missing"):
        read_published(saved(case, tmp_path, model=only, cfg=None))
    lacking = {**case.checkpoint["model"], "_ema": {"blocks.0.norm1.weight": torch.ones(32)}}
    with pytest.raises(Misfit, match=r"`_ema\..*` is missing"):
        read_published(saved(case, tmp_path, model=lacking))
    two = {**case.checkpoint["model"], "modality_encoders.AUDIO.alibi_scale": torch.ones(1, 1, 4, 1, 1)}
    with pytest.raises(ValueError, match="alone, but also holds AUDIO"):
        read_published(saved(case, tmp_path, model=two))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("IMAGE", "fixed_positions", False),
        ("IMAGE", "transformer_decoder", True),
        ("AUDIO", "learned_alibi_scale_per_head", False),
        ("AUDIO", "conv_pos_pre_ln", True),
        ("TEXT", "prenet_depth", 2),
        ("TEXT", "no_scale_embedding", False),
    ],
)
def test_another_encoder_is_refused_by_the_name_of_its_key(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    case = CASES[kind]
    name = kind.lower()
    modalities = {**case.model["modalities"], name: {**case.model["modalities"][name], key: value}}
    other = replace(case, model={**case.model, "modalities": modalities})
    with pytest.raises(ValueError, match=f"`{key}` in `modalities.{name}` in the `cfg` of"):
        read_published(saved(other, tmp_path))


def run_file(case: Case, folder: Path) -> Path:
    """A configuration whose run begins with the case."""
    _, _, config = config_of(case, saved(case, folder))
    content = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "d2v": config.model_dump(mode="json"),
    }
    if case.kind == "IMAGE":
        # the sample set is gray
        content["d2v"]["data"] |= {"kind": "images", "path": str(folder)}
    (folder / "run.json").write_text(json.dumps(content))
    return folder / "run.json"


@pytest.mark.parametrize("kind", CASES)
def test_a_run_begins_with_a_file_and_gives_it_back(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import` into a run, then `export` of its first checkpoint: not a bit has changed."""
    case = CASES[kind]
    file, run = run_file(case, tmp_path), tmp_path / "runs" / "a"
    assert main(["import", str(tmp_path / f"{case.name}.pt"), "--to", str(run), "--ds_config", str(file)]) == 0
    assert "its own teacher" in capsys.readouterr().out
    assert main(["export", str(run), "--format", "fairseq"]) == 0
    found = torch.load(run / "export.pt", weights_only=True)["model"]
    average = found.pop("_ema")
    for part, prefix in ((found, "student."), (average, "teacher.")):
        assert all(torch.equal(part[name], one) for name, one in case.below(prefix).items())
    # a model without decoder: the run's is new, and the student is its own teacher
    export_model(read_published(tmp_path / f"{case.name}.pt").student, load_config(file).d2v, tmp_path / "folder")
    assert main(["import", str(tmp_path / "folder"), "--to", str(tmp_path / "runs/b"), "--ds_config", str(file)]) == 0
    assert "the student as teacher" in capsys.readouterr().out


def test_another_model_is_refused_with_every_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES["TEXT"]
    file = run_file(case, tmp_path)
    begin = ["import", str(tmp_path / "text_1.pt"), "--to", str(tmp_path / "runs/a"), "--ds_config", str(file)]
    wrong = ["--set", "d2v.model.decoder.kernel=5", "--set", "d2v.model.heads=2"]
    assert main([*begin, *wrong, "--set", "d2v.model.decoder.dropout=0.5"]) != 0
    told = capsys.readouterr().err
    assert "`d2v.model.decoder.kernel` must be 9, but is 5 instead" in told
    assert "`d2v.model.heads` must be 4, but is 2 instead" in told
    assert "dropout" not in told
