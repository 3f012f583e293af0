"""A modality whose record has no formats, probes, pictures or inputs: every command says so in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from d2v_fast import modalities
from d2v_fast.commands.console import main
from d2v_fast.evaluation.run import advice, has_labels
from d2v_fast.interop.export import export_student
from d2v_fast.interop.huggingface import export_model
from d2v_fast.interop.onnx import export_onnx
from d2v_fast.modalities.vision import MODALITY
from d2v_fast.modalities.vision.config import VisionConfig, VisionModelConfig
from d2v_fast.objectives.build import build_model
from tests.helpers.runs import TINY
from tests.helpers.written_runs import CONFIG, write_run


class PlainModelConfig(VisionModelConfig):
    """The model section of a modality that no other library has."""


class PlainConfig(VisionConfig):
    """Its section."""

    modality: Literal["plain"] = "plain"  # type: ignore[assignment]
    model: PlainModelConfig = PlainModelConfig()


NOTHING: dict[str, Any] = dict.fromkeys(("huggingface", "published", "onnx", "open_inputs", "probing", "draw"))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> PlainConfig:
    monkeypatch.setitem(modalities._registered, "plain", replace(MODALITY, name="plain", config=PlainConfig, **NOTHING))
    raw = CONFIG.model_dump()
    return PlainConfig.model_validate({**raw, "modality": "plain"})


def test_commands_refuse_it_in_words(config: PlainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "r", config, 1)
    (tmp_path / "images").mkdir()
    section = {**config.model_dump(mode="json"), "modality": "plain"}
    (tmp_path / "c.json").write_text(json.dumps({**TINY, "d2v": section}))
    to = str(tmp_path / "out.npy")
    for words, said in {
        "export r": '`export` has no format for runs of modality "plain": no other library has such an encoder.',
        "export r --format onnx": '`export` has no format for runs of modality "plain"',
        "import images --to new/r --ds_config c.json": '`import` has no format for runs of modality "plain"',
        "embed r images --to out.npy": '`embed` reads no files for models of modality "plain".',
        "probe r": 'there is no probe for runs of modality "plain"',
        "probe r --data images": 'there is no probe for runs of modality "plain"',
        "draw r": "`RUN_FOLDER` must be a run on vision or speech to be drawn, but",
        "tokenize c.json": '`d2v.modality` must be "text", but is "plain" instead.',
    }.items():
        paths = ("r", "images", "c.json", "new/r", "out.npy")
        arguments = [str(tmp_path / word) if word in paths else word for word in words.split()]
        assert main(arguments) in (1, 2), words
        assert said in capsys.readouterr().err, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "images", "r"]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["checkpoints", "config.json"]
    assert not Path(to).exists()


def test_a_run_ends_without_export_and_probe(config: PlainConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "r", config, 1)
    assert export_student(tmp_path / "r") == 'no export: Transformers has no model of modality "plain"'
    assert not has_labels(config)
    assert advice(config, tmp_path / "r") == 'there is no probe for runs of modality "plain"'


def test_functions_refuse_it_in_words(config: PlainConfig, tmp_path: Path) -> None:
    student = build_model(config).student
    for call, name in (
        (lambda: export_model(student, config, tmp_path / "a"), "Transformers model"),
        (lambda: export_model(student, config.model, tmp_path / "a"), "Transformers model"),
        (lambda: export_onnx(student, config, tmp_path / "a.onnx"), "ONNX graph"),
    ):
        said = f'there is no {name} for modality "plain": its weights stay in the run.s checkpoints'
        with pytest.raises(ValueError, match=said):
            call()
    assert not list(tmp_path.iterdir())
