"""`d2v-fast export` writes checkpoints of any number of shards as Transformers folders, file by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.commands.console import main
from d2v_fast.config import (
    VisionModelConfig,
)
from d2v_fast.errors import OptionError, RunError
from d2v_fast.interop import export
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.speech.fairseq import read_fairseq_speech
from d2v_fast.modalities.speech.huggingface import import_speech
from d2v_fast.modalities.vision.huggingface import export_vision, import_vision
from tests.helpers.common import run_python
from tests.helpers.runs import failure_status
from tests.helpers.speech_models import make_config
from tests.helpers.written_runs import CONFIG, assert_holds_run, write_run


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export_is_exact(processes: int, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_run(tmp_path / "r", CONFIG, processes)
    assert main(["export", str(tmp_path / "r"), "--weights", weights, "--to", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out'} ({weights}, step 7" in capsys.readouterr().out
    imported, config = import_vision(tmp_path / "out")
    assert config.depth == 2
    factor = 2 if weights == "teacher" else 1
    state = imported.state_dict()
    for name, p in model.student.named_parameters():
        assert torch.equal(state[name], factor * p), name


@pytest.mark.parametrize("positions", ["shared", "averaged"])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export_of_speech_holds_the_whole_encoder(positions: str, weights: str, tmp_path: Path) -> None:
    """An exported teacher has the student's values for parameters that are not averaged."""
    config = make_config(position_in_teacher=positions)
    model = write_run(tmp_path / "r", config, 2)
    target = tmp_path / "r" / ("export" if weights == "student" else "export-teacher")
    assert f"{target} ({weights}" in export_run(tmp_path / "r", weights=weights)
    imported, found = import_speech(target)
    assert found == config.model.model_copy(update={"position_in_teacher": "shared"})
    expected = {name: p.detach() for name, p in model.student.named_parameters()}
    if weights == "teacher":
        expected |= {name: 2 * value for name, value in expected.items() if name.startswith("context.")}
    for name, value in imported.state_dict().items():
        other = f"context.{name}" if name.startswith("positions.") and positions == "averaged" else name
        assert torch.equal(value, expected[other]), name


@pytest.mark.parametrize("positions", ["shared", "averaged"])
def test_export_for_fairseq_holds_student_head_and_teacher(
    positions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(position_in_teacher=positions)
    model = write_run(tmp_path / "r", config, 2)
    assert main(["export", str(tmp_path / "r"), "--format", "fairseq"]) == 0
    assert "(student and teacher, step 7, for fairseq)" in capsys.readouterr().out
    found = read_fairseq_speech(tmp_path / "r" / "export.pt")
    assert found.config == config.model
    assert_holds_run(found, model)


def test_a_teacher_does_not_replace_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_run(tmp_path / "r", CONFIG, 1)
    export_run(tmp_path / "r")
    assert main(["export", str(tmp_path / "r"), "--weights", "teacher"]) == 0
    assert f"export: {tmp_path / 'r' / 'export-teacher'} (teacher" in capsys.readouterr().out
    bias = model.student.norm.bias
    for name, factor in (("export", 1), ("export-teacher", 2)):
        assert torch.equal(import_vision(tmp_path / "r" / name)[0].norm.bias, factor * bias)
        weights = "student" if factor == 1 else "teacher"
        assert f"| weights | {weights} |" in (tmp_path / "r" / name / "README.md").read_text()


def test_large_weights_become_several_files(tmp_path: Path) -> None:
    model = write_run(tmp_path / "r", CONFIG, 2)
    export_run(tmp_path / "r", to=tmp_path / "out", max_file_bytes=8_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(index.values())) == files
    for name, file in index.items():
        assert name in load_file(tmp_path / "out" / file)
    imported, _ = import_vision(tmp_path / "out")
    assert torch.equal(imported.state_dict()["norm.weight"], model.student.norm.weight)
    if find_spec("transformers") is not None:
        from transformers import Data2VecVisionModel

        theirs = Data2VecVisionModel.from_pretrained(tmp_path / "out")
        assert torch.equal(theirs.encoder.layer[1].output.dense.bias, model.student.encoder.blocks[1].mlp.fc2.bias)
    # a later, smaller export leaves no file of this one
    export_vision(model.student, CONFIG, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_no_more_than_one_file_is_in_memory(tmp_path: Path) -> None:
    """An export of 100 MB in files of 25 MB keeps at most two files and one copy of each tensor in memory."""
    large = CONFIG.model_copy(
        update={"model": VisionModelConfig(image_size=8, patch_size=2, channels=1, width=512, depth=8, heads=8)}
    )
    write_run(tmp_path / "r", large, 2)
    # the system can drop mapped pages of the checkpoint, so only the process's own memory counts
    code = f"""
import pathlib, threading, time, safetensors.torch, d2v_fast.interop.export, d2v_fast.interop.huggingface
def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1000
before, peak, done = held(), 0.0, False
def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
d2v_fast.interop.export.export_run(pathlib.Path({str(tmp_path / "r")!r}), max_file_bytes=25_000_000)
done = True
watcher.join()
print(peak - before)
"""
    grown = float(run_python(code).split()[-1])
    size = sum(path.stat().st_size for path in (tmp_path / "r" / "export").glob("*.safetensors")) / 1e6
    assert size > 95
    assert 20 < grown < 85, (grown, size)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        status, said = main(["export", *map(str, arguments)]), capsys.readouterr().err
        assert status == failure_status(said)
        return said

    assert "must be the folder of a run, but holds no config.json" in complaint(tmp_path)
    write_run(tmp_path / "r", CONFIG, 2)
    assert "`--format` must be transformers, beit or onnx for vision, but is fairseq" in complaint(
        tmp_path / "r", "--format", "fairseq"
    )
    write_run(tmp_path / "s", make_config(), 1)
    assert "holds both" in complaint(tmp_path / "s", "--format", "fairseq", "--weights", "teacher")
    assert "`--step` must be of a checkpoint in" in complaint(tmp_path / "r", "--step", 3)
    path = tmp_path / "r" / "checkpoints" / "step-7" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "shard-00001.safetensors has another content than was written" in complaint(tmp_path / "r")
    assert not (tmp_path / "r" / "export").exists()


def test_export_at_the_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no folder can hold does not end a run; what a user can repair ends it in words."""

    def failing(error: Exception) -> Callable[..., str]:
        def export_run(*_: object, **__: object) -> str:
            raise error

        return export_run

    write_run(tmp_path / "r", CONFIG, 1)
    monkeypatch.setattr(export, "export_run", failing(OptionError("`a` must be 0 for Transformers.")))
    assert export.export_student(tmp_path / "r") == "no export: `a` must be 0 for Transformers."
    monkeypatch.setattr(export, "export_run", failing(ValueError("The tokenizer is gone.")))
    with pytest.raises(RunError, match=r"saved, but cannot be exported: The tokenizer is gone\. .* --resume"):
        export.export_student(tmp_path / "r")
