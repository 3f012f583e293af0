"""Presets by name, hints for schedules that a preset's warm-up does not fit, and the exit status of every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v_fast.commands import console
from d2v_fast.commands.console import main
from d2v_fast.config import ConfigError, load_config
from d2v_fast.config.file import PRESETS, configuration_file, preset_names
from d2v_fast.training.learning_rate import LearningRate
from tests.helpers.runs import leave_out_reports, tiny_file
from tests.helpers.text_files import sentences, small_tokenizer

OWN_DATA = ["d2v.data.path=/my/own", "d2v.data.tokenizer=/tokenizer"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind = json.loads((PRESETS / f"{name}.json").read_text())["d2v"]["data"]["kind"]
    overrides = OWN_DATA[: {"images": 1, "audio": 1, "table": 1, "text": 2}.get(kind, 0)]
    assert load_config(name, overrides) == load_config(PRESETS / f"{name}.json", overrides)
    # a folder of that name is no configuration, a file is
    Path(name).mkdir()
    assert configuration_file(name) == PRESETS / f"{name}.json"
    Path(name).rmdir()
    Path(name).write_text("{}")
    assert configuration_file(name) == Path(name)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("digts", "The nearest preset is `digits`."),
        ("visionbase", "The nearest preset is `vision_base`."),
        ("configs/speech_smal.json", "The nearest preset is `speech_small`."),
        ("zzz", f"Presets: {', '.join(preset_names())}."),
    ],
)
def test_the_nearest_preset(given: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "check", "tokenize"):
        assert main([command, given]) == 2
        said = capsys.readouterr().err
        assert f"must be a readable JSON file, or the name of a preset, but there is no {given}. {hint}" in said


def test_train_and_check_take_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_reports(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    short = ["--set", "d2v.schedule.steps=1", "--set", "d2v.schedule.warmup_steps=0", "--set", "train_batch_size=2"]
    assert main(["train", "digits", *short]) == 0
    assert (tmp_path / "runs" / "digits-1" / "result.json").is_file()
    assert main(["train", "digits", "--dry-run"]) == 0
    assert "2,700 optimizer steps" in capsys.readouterr().out


def test_a_shorter_run_says_which_value_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--set", "d2v.schedule.steps=50"]) == 2
    said = capsys.readouterr().err
    assert "`d2v.schedule.warmup_steps` must be <= `steps` (50), but is 100 instead." in said
    hint = "--set d2v.schedule.warmup_steps=5"
    assert f"`{hint}`" in said
    assert main(["train", "digits", "--dry-run", "--set", "d2v.schedule.steps=50", *hint.split()]) == 0
    images = [*OWN_DATA[:1], "d2v.schedule.epochs=3"]
    with pytest.raises(ConfigError, match=r"`--set d2v\.schedule\.warmup_epochs=0\.3`"):
        load_config("images_small", images)
    load_config("images_small", [*images, "d2v.schedule.warmup_epochs=0.3"])
    # of another unit, which only the size of the data tells
    steps = [*OWN_DATA[:1], "d2v.schedule.steps=20"]
    with pytest.raises(ConfigError, match=r"Set one of them to null, such as `--set d2v\.schedule\.epochs=null`"):
        load_config("images_small", steps)
    schedule = load_config("images_small", [*steps, "d2v.schedule.epochs=null"]).d2v.schedule
    with pytest.raises(ConfigError, match=r"warmup_epochs` must not exceed the whole run of 20 steps \(10 per epoch\)"):
        LearningRate(schedule, 1.0, 10)
    file = tiny_file(tmp_path, d2v__schedule={"steps": 20, "warmup_epochs": 5})
    assert main(["train", str(file)]) == 2
    assert "`--set d2v.schedule.warmup_epochs=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        # wrong options, whatever the files hold
        (2, ["presets", "digtis"]),
        (2, ["presets", "--to", "x"]),
        (2, ["presets", "digits", "--to", "tiny.json"]),
        (2, ["tokenize", "x", "--train"]),
        (2, ["tokenize", "tiny.json", "--to", "x"]),
        (2, ["import", "x.pt", "--to", "y", "--ds_config", "tiny.json", "--tokenizer", "z"]),
        (2, ["import", ".", "--to", "y"]),
        (2, ["draw", "runs/x", "--count", "99"]),
        (2, ["bench", "--check", "--only", "ema"]),
        (2, ["train", "--resume"]),
        (2, ["train"]),
        (2, ["train", "--resume", "--run", "none"]),
        # a wrong configuration
        (2, ["train", "none.json"]),
        (2, ["train", "tiny.json", "--set", "d2v.model.detph=1"]),
        (2, ["check", "tiny.json", "--set", "train_batch_size=0"]),
        (2, ["import", "x.pt", "--to", "y", "--ds_config", "none.json"]),
        (2, ["tokenize", "tiny.json"]),
        # what is there does not do
        (1, ["probe", "none"]),
        (1, ["export", "none"]),
        (1, ["draw", "none"]),
        (1, ["embed", "none", "x", "--to", "y.npy"]),
        (1, ["import", "none.pt", "--to", "y"]),
        (1, ["train", "tiny.json", "--set", "d2v.data.kind=images", "--set", "d2v.data.path=none"]),
        (1, ["check", "tiny.json", "--set", "d2v.data.kind=images", "--set", "d2v.data.path=none"]),
        (0, ["presets"]),
        (0, ["train", "tiny.json", "--dry-run"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_exit_status(
    status: int,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_file(tmp_path)
    assert main(arguments) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") == (status != 0)
    assert "Traceback" not in said


def test_ctrl_c_before_a_run_begins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("d2v_fast.train.train_command", interrupted)
    assert console.main(["train", "digits"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def own_data(name: str, folder: Path) -> list[str]:
    """Some data of a user's own, and the overrides that name it."""
    (folder / "own").mkdir()
    if name == "images_small":
        for i in range(8):
            Image.fromarray(np.full((40, 40, 3), 25 * i, np.uint8)).save(folder / "own" / f"{i}.png")
    elif name == "speech_small":
        soundfile = pytest.importorskip("soundfile")
        for i in range(8):
            tone = np.sin(np.arange(int(8000 * (1.2 + i / 10))) * (0.1 + i / 50))
            soundfile.write(folder / "own" / f"{i}.wav", tone.astype(np.float32), 8000)
    else:
        (folder / "own" / "a.txt").write_text("\n".join(sentences(1500)))
        small_tokenizer().save(folder / "tokenizer")
        return [f"d2v.data.path={folder / 'own'}", f"d2v.data.tokenizer={folder / 'tokenizer'}"]
    return [f"d2v.data.path={folder / 'own'}"]


@pytest.mark.parametrize("name", ["images_small", "speech_small", "text_small"])
def test_presets_for_own_data_train_on_a_little_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_reports(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    changes = [*own_data(name, tmp_path), "d2v.schedule.steps=1", "d2v.schedule.epochs=null", "train_batch_size=4"]
    changes += ["d2v.data.num_workers=0", f"d2v.data.tokens_path={tmp_path / 'tokens'}"][: 2 if "text" in name else 1]
    changes += ["d2v.schedule.warmup_steps=0", "d2v.schedule.warmup_epochs=null"]
    assert main(["train", name, "--run", "r", *(word for change in changes for word in ("--set", change))]) == 0
    assert (tmp_path / "runs" / "r" / "checkpoints" / "step-1").is_dir()
