"""Probe a user's own labels in every modality: during a run, at its end, and from a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from d2v_fast.commands.console import main as console
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT, run_here, tiny_file

STEPS = {"steps": 2, "warmup_steps": 1}


def write_images(folder: Path, per_class: int = 12) -> None:
    """Two classes that the mean of the pixels tells apart, and a third with one image; one file is damaged."""
    rng = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (folder / label).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(rng.normal(level, 20, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    (folder / "rare").mkdir()
    Image.fromarray(pixels).save(folder / "rare" / "1.png")
    (folder / "dark" / "damaged.png").write_bytes(b"no image")


def write_recordings(folder: Path, rate: int = 8000, per_class: int = 8) -> None:
    rng = np.random.default_rng(0)
    for label, pitch in (("high", 2000), ("low", 300)):
        (folder / label).mkdir(parents=True)
        for i in range(per_class):
            # longer ones than a step of training takes, too
            time = np.arange(int(rate * rng.uniform(0.4, 1.5))) / rate
            wave = np.sin(2 * np.pi * pitch * time * rng.uniform(0.9, 1.1)) + rng.normal(0, 0.1, len(time))
            soundfile.write(folder / label / f"{i}.wav", 0.3 * wave, rate)
    soundfile.write(folder / "low" / "silent.wav", np.zeros(rate), rate)


def write_texts(path: Path) -> None:
    rng = np.random.default_rng(0)
    words = {"fruit": ["apple", "pear", "plum", "fig"], "tool": ["hammer", "saw", "file", "drill"]}
    rows = [{"text": " ".join(rng.choice(words[label], 12)), "label": label} for label in words for _ in range(15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "of no kind"}]))


def scores_of(table: str, name: str) -> list[float]:
    """few labels, all labels, nearest neighbors."""
    (line,) = [line for line in table.splitlines() if line.startswith(name)]
    few, linear, knn = re.findall(r"([\d.]+) ± [\d.]+ +([\d.]+) +([\d.]+)$", line)[0]
    return [float(few), float(linear), float(knn)]


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that names a folder: said at its start, and probed at its end, with what is left out."""
    folder = tmp_path / "labeled"
    write_images(folder)
    file = tiny_file(tmp_path, d2v__schedule=STEPS, d2v__probe__path=str(folder), d2v__probe__grid=2)
    assert run_here("--ds_config", file, "--run", "r") == 0
    output = capsys.readouterr().out
    before, after = output.split("run folder:")[:2]
    assert f"probe: 25 images in 2 classes in '{folder}'" in before
    assert "left out: 1 class with fewer than 2 images (rare)" in before
    assert "left out: 1 unreadable image:\n    dark/damaged.png: " in after
    table = output[output.index("accuracy in %") :]
    assert "on 4 held-out images" in table
    assert scores_of(table, "raw pixels")[1:] == [100.0, 100.0]
    assert scores_of(table, "most frequent class")[1] == 50.0
    (entry,) = json.loads((tmp_path / "runs" / "r" / "probe.json").read_text())
    assert list(entry) == ["step", "untrained", "student", "teacher", "raw pixels", "most frequent class"]
    # the same table again, of the checkpoint; and with data that is named afterwards
    assert console(["probe", str(tmp_path / "runs" / "r")]) == 0
    again = capsys.readouterr().out
    assert again[again.index("accuracy in %") :].strip() == table[: table.index("run folder:")].strip()
    assert console(["probe", str(tmp_path / "runs" / "r"), "--data", str(folder), "--max-samples", "10"]) == 0
    assert "10 images of 25 in 2 classes" in capsys.readouterr().out


def test_wrong_labels_are_refused_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "labeled"
    write_images(folder)
    file = tiny_file(tmp_path, d2v__schedule=STEPS)
    for path, reason in (
        (tmp_path / "nowhere", "`d2v.probe.path` must be a folder, but"),
        (folder / "dark", "must hold at least 2 classes of 2 or more images, but '"),
    ):
        for options in ([], ["--dry-run"]):
            arguments = ["--ds_config", file, "--run", "r", "--set", f"d2v.probe.path={path}", *options]
            assert run_here(*arguments) == 1
            assert reason in capsys.readouterr().err
            assert not (tmp_path / "runs" / "r").exists()
    assert console(["check", str(file), "--set", f"d2v.probe.path={folder / 'dark'}"]) == 1
    assert "at least 2 classes" in capsys.readouterr().err
    assert run_here("--ds_config", file, "--set", "d2v.probe.label_field=x") == 2
    assert "d2v.probe.label_field" in capsys.readouterr().err


def test_runs_without_labels_say_how_to_get_a_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "labeled"
    write_images(folder)
    (folder / "dark" / "damaged.png").unlink()
    data = {"kind": "images", "path": str(folder), "num_workers": 0, "mean": [0.5], "std": [0.5]}
    file = tiny_file(tmp_path, d2v__schedule=STEPS, d2v__data=data, d2v__probe__every_epochs=1)
    assert run_here("--ds_config", file, "--run", "r") == 0
    output = capsys.readouterr().out
    run = tmp_path / "runs" / "r"
    assert "no effect of d2v.probe.every_epochs: there are no labels" in output
    assert f" probe {run} --data FOLDER` probes it on images whose sub-folders are classes" in output
    assert json.loads((run / "result.json").read_text())["probe"] is None
    assert console(["probe", str(run)]) == 1
    assert f" probe {run} --data FOLDER" in capsys.readouterr().err
    assert console(["probe", str(run), "--data", str(folder)]) == 0
    assert "24 images in 2 classes" in capsys.readouterr().out
    assert console(["probe", str(run), "--data", str(folder), "--label-field", "x"]) == 2
    assert "`--label-field` does not apply to runs on vision" in capsys.readouterr().err
    assert console(["probe", str(run), "--max-samples", "3", "--data", str(folder)]) == 2
    assert "`d2v.probe.max_samples` must be in [4, 1000000000], but is 3 instead" in capsys.readouterr().err
    assert console(["probe", str(run), "--max-samples", "10"]) == 2
    assert "`--data` must name labeled data" in capsys.readouterr().err
    assert console(["probe", str(run), "--data", str(folder / "dark")]) == 1
    assert "`--data` must hold at least 2 classes" in capsys.readouterr().err


def test_a_probe_that_fails_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The labeled files are gone when the run ends."""
    from d2v_fast.evaluation import run as evaluation

    folder = tmp_path / "labeled"
    write_images(folder)
    file = tiny_file(tmp_path, d2v__schedule=STEPS, d2v__probe__path=str(folder))
    check = evaluation.check_labels

    def then_move(config):
        lines = check(config)
        folder.rename(tmp_path / "moved")
        return lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "check_labels", then_move)
        assert run_here("--ds_config", file, "--run", "r") == 0
    assert "no probe after step 2: `d2v.probe.path` must be a folder, but" in capsys.readouterr().out
    assert (tmp_path / "runs" / "r" / "result.json").is_file()
    assert console(["probe", str(tmp_path / "runs" / "r"), "--data", str(tmp_path / "moved")]) == 0


def test_recordings_in_the_middle_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "labeled"
    write_recordings(folder)
    file = tiny_file(
        tmp_path,
        TINY_SPEECH,
        train_batch_size=300,
        d2v__schedule={"epochs": 2},
        d2v__data__max_batch_seconds=200.0,
        d2v__probe__path=str(folder),
        d2v__probe__every_epochs=1,
    )
    assert run_here("--ds_config", file, "--run", "r") == 0
    output = capsys.readouterr().out
    assert output.count("accuracy in % on 4 held-out recordings") == 2
    assert "low/silent.wav: " in output
    table = output[output.rindex("accuracy in %") :]
    assert scores_of(table, "log-mel average")[1] == 100.0
    entries = json.loads((tmp_path / "runs" / "r" / "probe.json").read_text())
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["untrained"] == entries[1]["untrained"]


# slow: those of recordings and images run in every run
@pytest.mark.slow
def test_texts_in_the_middle_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labeled.jsonl"
    write_texts(path)
    file = tiny_file(
        tmp_path,
        TINY_TEXT,
        train_batch_size=2000,
        d2v__schedule={"epochs": 2},
        d2v__data__tokens_path=str(tmp_path / "tokens"),
        d2v__probe__path=str(path),
        d2v__probe__every_epochs=1,
    )
    assert run_here("--ds_config", file, "--run", "r") == 0
    output = capsys.readouterr().out
    assert "left out: 1 text that cannot be read or have no label" in output.split("run folder:")[0]
    assert output.count("accuracy in % on 6 held-out texts") == 2
    assert scores_of(output[output.rindex("accuracy in %") :], "bag of words")[1] == 100.0
    run = str(tmp_path / "runs" / "r")
    assert console(["probe", run, "--data", str(path), "--field", "label", "--label-field", "text"]) == 1
    assert console(["probe", run, "--data", str(path), "--label-field", "lable"]) == 1
    assert "\n  " + f"{path}, line 1: no field 'lable' (`--label-field`); it has 'text'" in capsys.readouterr().err


def test_fewer_labels_than_asked_for(tmp_path: Path) -> None:
    """Of a class that has fewer all are used, and the table says so; NaN is no score."""
    import torch

    from d2v_fast.config import check_d2v
    from d2v_fast.evaluation.labeled import run_labeled_probe
    from d2v_fast.objectives.build import build_model

    write_images(tmp_path / "labeled", per_class=5)
    raw = {**TINY["d2v"], "probe": {"path": str(tmp_path / "labeled"), "labels_per_class": 10, "num_draws": 2}}
    config, problems = check_d2v(raw)
    assert config is not None, problems
    good, broken = (build_model(config).student for _ in range(2))
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    report = run_labeled_probe({"good": good, "broken": broken}, config)
    said = str(report)
    assert "2 of 2 classes have fewer than 10 images to learn from (`d2v.probe.labels_per_class`)" in said
    if "broken" not in report.scores:
        assert "no scores of broken: some of its features are not finite" in said
    assert report.scores["good"].few_labels == report.scores["good"].linear
    assert report.scores["good"].few_labels_std == 0
    assert "NaN" not in json.dumps(report.to_dict())
