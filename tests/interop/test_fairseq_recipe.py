"""The configuration of a fairseq checkpoint is kept by the strip program, given by options, or assumed."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.interop.fairseq_recipe import pending_decay, told_by
from d2v_fast.modalities.speech.fairseq import load_fairseq_speech, read_fairseq_speech, save_fairseq_speech
from d2v_fast.modalities.text.fairseq import load_fairseq_text, save_fairseq_text
from d2v_fast.objectives.build import build_model
from tests.helpers.checkpoint_files import opened
from tests.helpers.fairseq_reference import closed_as_fine_tuning_sets_it
from tests.helpers.fairseq_speech_files import pretrained as speech
from tests.helpers.fairseq_speech_files import saved
from tests.helpers.fairseq_text_files import pretrained as text
from tests.helpers.runs import TINY_SPEECH, fork, tiny_file, wait
from tests.helpers.speech_models import make_config, make_pair
from tests.helpers.speech_reference import randomize_
from tests.helpers.text_models import make_config as text_config
from tests.helpers.text_models import make_pair as text_pair

# classes of packages that the importer does not have, as those of fairseq and omegaconf: written by a process that has
# a module of them, read by one that has not
CLASSES = """
import enum
class Choice(str, enum.Enum):
    layer_norm = "layer_norm"
class Node:
    def __init__(self, value):
        self._val, self._metadata = value, ("node", type(value))
class Config:
    def __init__(self, content):
        self._content, self._parent, self._flags_cache = content, None, {}
        self.__dict__["_metadata"] = Node(0)
    def __getstate__(self):
        return dict(self.__dict__)
    def __setstate__(self, state):
        self.__dict__.update(state)
def wrap(value):
    if isinstance(value, dict):
        return Config({key: wrap(inner) for key, inner in value.items()})
    return Config([wrap(inner) for inner in value]) if isinstance(value, list) else Node(value)
"""


def nested(value: Any) -> Any:
    """Sections as `argparse.Namespace`."""
    return argparse.Namespace(**{k: nested(v) for k, v in value.items()}) if isinstance(value, dict) else value


def with_foreign_classes(content: dict[str, Any], path: Path, change: str) -> None:
    """Write a checkpoint of whose classes the module is then gone; `change` sees `content` and `foreign`."""
    (path.parent / "foreign.py").write_text(CLASSES)
    torch.save(content, path)
    code = f"import torch, foreign; content = torch.load({str(path)!r}, weights_only=True); {change}"
    run_program(f"{code}; torch.save(content, {str(path)!r})", path.parent)
    (path.parent / "foreign.py").unlink()


def run_program(code: str, folder: Path) -> None:
    """Run a program in a forked process, in this folder, whose modules it can import."""

    def work() -> int:
        # a run in this process forbids it to itself and to its children
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
        return 0

    output = folder / "program-output"
    assert wait(fork(work, output)) == [0], output.read_text()
    output.unlink()


def strip(path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Import a file that is refused, and run the program that the error prints, as its reader would."""
    assert main(["import", str(path), "--to", str(path.parent / "none")]) == 1
    message, _, program = capsys.readouterr().err.partition("\n\n")
    assert "could execute code" in message
    run_program(program, path.parent)
    return path.with_name(f"{path.stem}-weights.pt")


def imported_config(path: Path, *options: str) -> dict[str, Any]:
    assert main(["import", str(path), "--to", str(path.parent / "out"), "--overwrite", *options]) == 0
    config: dict[str, Any] = json.loads((path.parent / "out" / "config.json").read_text())
    return config


FORMS = ("args beside cfg", "cfg of namespaces", "args alone", "enumerations", "omegaconf")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("speech", "args beside cfg"),
        ("speech", "enumerations"),
        ("text", "omegaconf"),
        *[pytest.param("speech", form, marks=pytest.mark.slow) for form in FORMS if form not in FORMS[::3]],
        *[pytest.param("text", form, marks=pytest.mark.slow) for form in FORMS[:-1]],
    ],
)
def test_what_is_plain_of_the_configuration_is_kept(
    kind: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = text() if kind == "text" else speech()
    path = tmp_path / "it's.pt"
    if what == "args beside cfg":
        content["args"] = argparse.Namespace(arch=f"data2vec_{kind}")
    elif what == "cfg of namespaces":
        content["cfg"] = nested(content["cfg"])
    elif what == "args alone":
        model = content.pop("cfg")["model"]
        if kind == "text":
            encoder = model["transformer"].pop("encoder")
            model = {**model["transformer"], **{f"encoder_{key}": value for key, value in encoder.items()}}
        content["args"] = argparse.Namespace(**model, sample_rate=8_000)
    if what == "enumerations":
        where = "content['cfg']['model']" + ("['transformer']" if kind == "text" else "")
        with_foreign_classes(content, path, f"{where}.update(extractor_mode=foreign.Choice.layer_norm)")
    elif what == "omegaconf":
        with_foreign_classes(content, path, "content['cfg'] = foreign.wrap(content['cfg'])")
    else:
        torch.save(content, path)
    config = imported_config(strip(path, capsys))
    assert config["num_attention_heads"] == 4
    dropout, layer_drop = ("hidden_dropout_prob", None) if kind == "text" else ("hidden_dropout", "layerdrop")
    assert config[dropout] == 0.2
    assert layer_drop is None or config[layer_drop] == 0.1
    assert "Assumed" not in capsys.readouterr().out
    if kind == "speech":
        preprocessor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
        assert preprocessor["sampling_rate"] == 8_000


class Odd:
    """No value at all, of a class that can be imported."""


def test_what_is_not_plain_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numpy = pytest.importorskip("numpy")
    content = speech()
    content["cfg"]["model"] |= {"mask": Odd(), "dropout": numpy.float64(0.2), "encoder_layerdrop": numpy.float32(0.5)}
    content["cfg"]["common"] = {"values": (1, {2}, torch.ones(3), math.inf), None: True}
    stripped = torch.load(strip(saved(content, tmp_path), capsys), weights_only=True)
    model, common = stripped["cfg"]["model"], stripped["cfg"]["common"]
    assert (model["mask"], model["dropout"], model["encoder_layerdrop"]) == (None, 0.2, 0.5)
    assert common == {"values": [1, [2], None, math.inf], "None": True}
    assert stripped["extra_state"] == {"a": [1]}


def test_references_are_followed() -> None:
    model = {"ema_anneal_end_step": "${optimization.max_update}", "a": "${model.b}", "b": "${model.a}", "c": "${x.y}"}
    found = told_by({"cfg": {"model": model, "optimization": {"max_update": 7}}})
    assert found["model"] == {"ema_anneal_end_step": 7, "a": None, "b": None, "c": None}


def test_what_is_assumed_is_said_and_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = speech(width=128)
    del content["cfg"]
    path = saved(content, tmp_path)
    assert imported_config(path)["num_attention_heads"] == 2
    said = capsys.readouterr().out
    for phrase in (
        "checkpoint.pt does not say all of it. Assumed, unless `--set d2v.model.KEY=VALUE` says otherwise:",
        "heads 2 (64 channels in each)",
        "conv_strides [5, 2, 2, 2, 2, 2, 2]",
        "sample_rate 16000",
        'position_in_teacher "averaged" (its teacher\'s positions are 1 times as far',
        "dropout 0.1, attention_dropout 0.1",
        "layer_norm_first false",
    ):
        assert phrase in said, said
    given = ["--heads", "8", "--set", "d2v.model.conv_strides=[4,2,2,2,2,2,2]", "--set", "d2v.model.sample_rate=8000"]
    config = imported_config(path, *given, "--set", "d2v.model.position_in_teacher=shared")
    assert (config["num_attention_heads"], config["conv_stride"][0]) == (8, 4)
    said = capsys.readouterr().out
    assert "heads" not in said
    assert "position_in_teacher" not in said
    for option, message in (
        ("d2v.model.haeds=2", "`haeds` (value 2) is not a known key"),
        ("d2v.schedule.steps=2", "must name a key of `d2v.model`"),
        ("d2v.model.heads=5", "`heads` must divide `width`"),
    ):
        assert main(["import", str(path), "--to", str(tmp_path / "none"), "--set", option]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["text", "speech"])
def test_heads_are_not_guessed_for_a_width_that_is_not_published(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**(text() if kind == "text" else speech()), "cfg": None}
    path = saved(content, tmp_path)
    assert main(["import", str(path), "--to", str(tmp_path / "out")]) == 1
    assert "`--heads` must be given for" in capsys.readouterr().err
    assert imported_config(path, "--heads", "2")["num_attention_heads"] == 2


def test_a_run_says_what_the_checkpoint_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, TINY_SPEECH)
    config = load_config(file).d2v
    model = build_model(config)
    save_fairseq_speech(model.student, model.head, None, config, tmp_path / "a.pt")
    bare = {"model": torch.load(tmp_path / "a.pt", weights_only=True)["model"]}
    torch.save(bare, tmp_path / "bare.pt")
    assert main(["import", str(tmp_path / "bare.pt"), "--to", str(tmp_path / "out"), "--heads", "2"]) == 1
    assert "`--set d2v.model.conv_strides=[1,1,1,1]`" in capsys.readouterr().err
    arguments = ["import", str(tmp_path / "bare.pt"), "--to", str(tmp_path / "runs" / "r"), "--ds_config", str(file)]
    assert main([*arguments, "--set", "d2v.model.conv_kernels=[9,3,3,2]"]) == 1
    assert "`d2v.model.conv_kernels` must be [10, 3, 3, 2], but is [9, 3, 3, 2]" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "heads" not in capsys.readouterr().out


def updated(tensors: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """After an update that moves every element by about `rate`, as Adam's do."""
    return {name: value + rate * torch.randn_like(value).clamp(-2, 2) for name, value in tensors.items()}


@pytest.mark.parametrize("positions", ["shared", "averaged"])
@pytest.mark.parametrize("num_updates", [20, 300])
def test_copied_positions_are_told_from_averaged_ones(positions: str, num_updates: int, tmp_path: Path) -> None:
    """As fairseq trains and saves: the average of the last update but one, and a copy of these positions."""
    torch.manual_seed(0)
    content = speech()
    del content["cfg"]
    student = {k: 0.02 * v for k, v in content["model"].items() if isinstance(v, Tensor) and k.startswith("encoder.")}
    average = dict(student)
    for _ in range(num_updates):
        is_copied = {name: positions == "shared" and ".pos_conv." in name for name in student}
        average = {n: student[n] if is_copied[n] else v.lerp(student[n], 1e-3) for n, v in average.items()}
        student = updated(student, 1e-4)
    content["model"] |= student
    content["model"]["_ema"] = {name.removeprefix("encoder."): value for name, value in average.items()}
    for half in (False, True):
        if half:
            content["model"] = {n: v.half() if isinstance(v, Tensor) else v for n, v in content["model"].items()}
        found = read_fairseq_speech(saved(content, tmp_path), heads=4)
        assert found.config.position_in_teacher == positions
        assert any(line.startswith("position_in_teacher") for line in found.assumed)


def test_pending_update_follows_the_schedule_of_the_checkpoint() -> None:
    def decay(n: Any, steps: Any = 10, end: float = 0.9, **extra: Any) -> float | None:
        model = {"ema_decay": 0.5, "ema_end_decay": end, "ema_anneal_end_step": steps}
        return pending_decay({"optimizer_history": [{"num_updates": n}], **extra}, {"model": model})

    assert decay(5) == pytest.approx(0.7)
    assert decay(10) == decay(99) == 0.9
    assert decay(3, steps=None, end=0.5) == 0.5
    assert decay(0) is decay(None) is decay(3, steps=None) is None
    assert decay(5, extra_state={"average_num_updates": 5}) is None
    assert pending_decay({}, {}) is None


def test_a_run_begins_with_the_update_that_the_average_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_file(tmp_path, TINY_SPEECH)
    config = load_config(file).d2v
    model, other = build_model(config), build_model(config)
    randomize_(model)
    randomize_(other)
    teacher = model.student.with_averaged(other.student.averaged)
    save_fairseq_speech(model.student, model.head, teacher, config, tmp_path / "a.pt", num_updates=4)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    # as fairseq writes it, which does not say so
    del content["extra_state"]["average_num_updates"]
    content["cfg"]["model"] |= {"ema_decay": 0.5, "ema_end_decay": 0.9, "ema_anneal_end_step": 8}
    torch.save(content, tmp_path / "b.pt")
    for name, kept in (("a", 1.0), ("b", 0.7)):
        run = tmp_path / "runs" / name
        assert main(["import", str(tmp_path / f"{name}.pt"), "--to", str(run), "--ds_config", str(file)]) == 0
        assert ("after the update of decay 0.7 that it lacked" in capsys.readouterr().out) == (name == "b")
        weights = SavedWeights(opened(run / "checkpoints" / "step-0"), "teacher", "context.")
        student, average = model.student.state_dict(), teacher.state_dict()
        for key in student:
            expected = kept * average[key] + (1 - kept) * student[key]
            torch.testing.assert_close(weights[key], expected, rtol=1e-5, atol=1e-6)


def saved_speech(path: Path) -> Callable[[Path], Any]:
    config = make_config()
    model, average = make_pair(config)
    save_fairseq_speech(model.student, model.head, model.student.with_averaged(average), config, path)
    return load_fairseq_speech


def saved_text(path: Path) -> Callable[[Path], Any]:
    config = text_config()
    model, average = text_pair(config)
    save_fairseq_text(model.student, model.head, model.student.with_averaged(average), config, path)
    return load_fairseq_text


@pytest.mark.parametrize("save", [saved_speech, saved_text])
def test_fine_tuning_by_fairseq_can_set_what_it_sets(save: Callable[[Path], Any], tmp_path: Path) -> None:
    save(tmp_path / "a.pt")(tmp_path / "a.pt")
    cfg = torch.load(tmp_path / "a.pt", weights_only=True)["cfg"]
    before = json.dumps(cfg["model"])
    changed = closed_as_fine_tuning_sets_it(cfg, "/data")
    assert changed["criterion"] is changed["lr_scheduler"] is None
    assert changed["task"]["data"] == "/data"
    assert json.dumps(changed["model"]) == before


def test_the_program_reads_files_of_old_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**speech(), "args": argparse.Namespace(arch="data2vec_audio")}
    path = tmp_path / "old.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert imported_config(strip(path, capsys))["num_attention_heads"] == 4
