"""`d2v-fast import --ds_config` begins runs with given weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.commands.console import main
from d2v_fast.interop.huggingface import export_model
from d2v_fast.modalities.speech.config import SpeechModelConfig
from d2v_fast.modalities.speech.fairseq import save_fairseq_speech
from d2v_fast.modalities.text.config import TextModelConfig
from d2v_fast.modalities.text.encoder import TextModel
from tests.helpers.checkpoint_files import opened
from tests.helpers.given_models import given
from tests.helpers.runs import TINY_SPEECH, TINY_TEXT, failure_status, figures, leave_out_reports, run_forked, tiny_file


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, said = main(["import", *map(str, arguments)]), capsys.readouterr().err
    assert status == failure_status(said)
    return said


@pytest.mark.parametrize("positions", ["shared", "averaged"])
def test_run_begins_with_a_fairseq_checkpoint(
    positions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Positions may be shared or averaged, both in the checkpoint and in the run."""
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, TINY_SPEECH, d2v__model__position_in_teacher=positions, d2v__schedule={"steps": 2})
    config, model, teacher = given(file)
    save_fairseq_speech(model.student, model.head, teacher, config, tmp_path / "a.pt")
    run = tmp_path / "runs" / "more"
    other = "averaged" if positions == "shared" else "shared"
    arguments = [tmp_path / "a.pt", "--to", run, "--ds_config", file, "--set"]
    assert main(["import", *map(str, arguments), f"d2v.model.position_in_teacher={other}"]) == 0
    assert "begins with a.pt (its own teacher); to train: " in capsys.readouterr().out

    folder = run / "checkpoints" / "step-0"
    for weights, whole in (("student", model.student), ("teacher", teacher)):
        saved = SavedWeights(opened(folder), weights, "context.")
        assert len(saved) == len(whole.state_dict())
        for name, value in whole.state_dict().items():
            moved = name.removeprefix("context.") if other == "shared" else f"context.{name}"
            if weights == "teacher" and ".positions." in f".{name}" and other == "shared":
                # a teacher that shares the positions takes the student's
                value = model.student.state_dict()[name]
            assert torch.equal(saved[name if "positions." not in name else moved], value), name
    assert torch.equal(SavedWeights(opened(folder), "student").head()["weight"], model.head.weight)

    output = tmp_path / "output"
    assert run_forked("--run", "more", "--resume", "--set", f"d2v.run.dir={run.parent}", output=output) == [0]
    assert "resumed after step 0" in output.read_text()
    assert len(figures(tmp_path, "more")) == 2


@pytest.mark.parametrize("modality", ["vision", "speech"])
def test_run_begins_with_a_transformers_folder(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_reports(monkeypatch.setattr)
    raw: dict[str, Any] = {"raw": TINY_SPEECH} if modality == "speech" else {}
    file = tiny_file(tmp_path, *raw.values(), d2v__schedule={"steps": 2})
    config, model, _ = given(file)
    export_model(model.student, config, tmp_path / "folder")
    run = tmp_path / "runs" / "more"
    assert main(["import", *map(str, [tmp_path / "folder", "--to", run, "--ds_config", file])]) == 0
    assert "begins with folder (the student as teacher)" in capsys.readouterr().out
    prefix = model.student.averaged_prefix()
    for weights in ("student", "teacher"):
        saved = SavedWeights(opened(run / "checkpoints" / "step-0"), weights, prefix)
        for name, value in model.student.state_dict().items():
            if name in saved:
                assert torch.equal(saved[name], value), name
    output = tmp_path / "output"
    assert run_forked("--run", "more", "--resume", "--set", f"d2v.run.dir={run.parent}", output=output) == [0]
    assert len(figures(tmp_path, "more")) == 2
    assert "exists: choose another name with --run, or continue it: " in complaint(
        capsys, tmp_path / "folder", "--to", run, "--ds_config", file
    )


def test_another_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, TINY_SPEECH)
    config, model, _ = given(file)
    assert isinstance(config.model, SpeechModelConfig)
    export_model(model.student, config, tmp_path / "folder")
    raw = json.loads((tmp_path / "folder" / "config.json").read_text())
    arguments = [tmp_path / "folder", "--to", tmp_path / "runs" / "r", "--ds_config", file]
    told = complaint(capsys, *arguments, "--set", f"d2v.model.heads={config.model.width}", "--set", "d2v.model.depth=4")
    assert "is of another encoder than" in told
    assert f"`d2v.model.heads` must be {raw['num_attention_heads']}, but is {config.model.width} instead" in told
    assert f"`d2v.model.depth` must be {raw['num_hidden_layers']}, but is 4 instead" in told
    assert "dropout" not in told
    vision = tmp_path / "v"
    vision.mkdir()
    told = complaint(capsys, *arguments[:-1], tiny_file(vision))
    assert "`d2v.modality` in" in told
    assert 'must be "speech"' in told
    (tmp_path / "a.pt").write_bytes(b"")
    told = complaint(capsys, tmp_path / "a.pt", *arguments[1:-1], tiny_file(vision))
    assert "must be a checkpoint that torch.save wrote, but cannot be read" in told
    assert not (tmp_path / "runs").exists()


def test_run_takes_the_vocabulary_of_given_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The vocabulary size comes from the weights if the configuration leaves it open, even for a smaller tokenizer."""
    source = {"vocab_size": 50, "padding_id": 0, "width": 16, "depth": 3, "heads": 2, "max_positions": 32}
    model = TextModelConfig.model_validate(source)
    export_model(TextModel(model), model, tmp_path / "folder")
    file = tiny_file(tmp_path, TINY_TEXT, d2v__model__vocab_size=None)
    arguments = ["import", str(tmp_path / "folder"), "--ds_config", str(file), "--to", str(tmp_path / "runs" / "r")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())["d2v"]["model"]
    assert (found["vocab_size"], found["padding_id"]) == (50, 0)
    capsys.readouterr()
    arguments[-1] = str(tmp_path / "runs" / "other")
    assert main([*arguments, "--set", "d2v.model.padding_id=1"]) == 1
    assert "`d2v.model.padding_id` must be 0, but is 1 instead" in capsys.readouterr().err
