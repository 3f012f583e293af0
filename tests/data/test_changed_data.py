"""Data that changed between a checkpoint and its resume are noticed, counted, and refused or accepted."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_fast.config import check_d2v
from d2v_fast.data import Samples, batch_maker
from d2v_fast.data.samples import digest_of
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.training import run_state
from d2v_fast.training.run_state import samples_of
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import (
    TINY,
    TINY_SPEECH,
    TINY_TEXT,
    figures,
    in_processes,
    leave_out_reports,
    run_here,
    tiny_file,
)


def make_images(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.new("L", (8 + index % 3, 8), 4 * index).save(folder / f"{index:02}.png")
    return folder


def make_recordings(folder: Path) -> Path:
    import soundfile

    folder.mkdir()
    for index in range(5):
        wave = np.sin(np.arange(4000 + 100 * index) / (3 + index))
        soundfile.write(folder / f"{index}.wav", 0.5 * wave, 8000)
    return folder


def make_text(folder: Path) -> Path:
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.txt").write_text(f"This is text number {index}. " * 20)
    return folder


def remove_one(folder: Path) -> None:
    sorted(folder.iterdir())[3].unlink()


def add_one(folder: Path) -> None:
    first = sorted(folder.iterdir())[0]
    shutil.copy(first, first.with_stem(f"{first.stem}-b"))


def rename_one(folder: Path) -> None:
    first = sorted(folder.iterdir())[0]
    first.rename(first.with_stem("z"))


def replace_one(folder: Path) -> None:
    """By another file that is larger."""
    first, *_, last = sorted(folder.iterdir())
    shutil.copy(last, first)
    if first.suffix == ".png":
        Image.new("L", (8, 30), 7).save(first)


CHANGES: dict[str, Callable[[Path], None]] = {
    "removed": remove_one,
    "added": add_one,
    "renamed": rename_one,
    "replaced": replace_one,
}


@pytest.fixture
def images_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a run that was stopped after its sixth step, in the third epoch of 60 images in steps of 24."""
    leave_out_reports(monkeypatch.setattr)
    folder = make_images(tmp_path / "images")
    data = {**TINY["d2v"]["data"], "kind": "images", "path": str(folder)}
    file = tiny_file(tmp_path, d2v__data=data, d2v__schedule={"steps": 7, "warmup_steps": 3})
    assert run_here("--ds_config", file, "--run", "r") == 0
    (tmp_path / "runs/r/result.json").unlink()
    shutil.rmtree(tmp_path / "runs/r/checkpoints/step-7")
    return file


@pytest.mark.parametrize("change", CHANGES)
def test_change_is_refused_or_accepted(change: str, images_run: Path, tmp_path: Path, capsys) -> None:
    CHANGES[change](tmp_path / "images")
    capsys.readouterr()
    assert run_here("--ds_config", images_run, "--run", "r", "--resume") == 1
    told = capsys.readouterr()
    counts = {
        "removed": "60 images then and 59 now",
        "added": "60 images then and 61 now",
        "renamed": "60 images then and now, but others of them: names or their order differ",
        "replaced": "60 images then and now, but files of other sizes or lengths under the same names",
    }
    assert f"the data have changed since the checkpoint of step 6: {counts[change]}" in told.err
    assert "--set d2v.data.on_change=accept" in told.err
    accept = ["--set", "d2v.data.on_change=accept"]
    assert run_here("--ds_config", images_run, "--run", "r", "--resume", *accept) == 0
    told = capsys.readouterr()
    assert counts[change] in told.out
    assert "accepted" in told.out
    assert [line[0] for line in figures(tmp_path, "r")] == list(range(1, 8))
    # the new checkpoint is of the new data, which is no change any more
    (tmp_path / "runs/r/result.json").unlink()
    assert run_here("--ds_config", images_run, "--run", "r", "--resume") == 0
    assert "the data have changed" not in capsys.readouterr().out


def test_same_files_elsewhere_are_the_same_data(images_run: Path, tmp_path: Path, capsys) -> None:
    """A copy in another folder, with other times, in which hidden and other files lie as well."""
    before = figures(tmp_path, "r")
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
    (tmp_path / "copy/notes.txt").write_text("no image")
    path = f"d2v.data.path={tmp_path / 'copy'}"
    assert run_here("--ds_config", images_run, "--run", "r", "--resume", "--set", path) == 0
    assert "the data have changed" not in capsys.readouterr().out
    assert figures(tmp_path, "r") == before


def test_old_checkpoint_says_that_it_cannot_be_checked(tmp_path: Path, monkeypatch, capsys) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, d2v__schedule={"steps": 4, "warmup_steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "samples_of", lambda maker, world: None)
        assert run_here("--ds_config", file, "--run", "r") == 0
    before = figures(tmp_path, "r")
    (tmp_path / "runs/r/result.json").unlink()
    shutil.rmtree(tmp_path / "runs/r/checkpoints/step-4")
    capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert "the checkpoint does not record its samples" in capsys.readouterr().out
    assert figures(tmp_path, "r") == before
    state = json.loads((tmp_path / "runs/r/checkpoints/step-4/state.json").read_text())
    assert state["samples"]["number"] == 1438


def test_shorter_than_what_was_trained_is_refused(images_run: Path, capsys) -> None:
    shorter = ["--set", "d2v.schedule.steps=4"]
    assert run_here("--ds_config", images_run, "--run", "r", "--resume", *shorter) == 1
    assert "must have at least the 6 steps that the run has made" in capsys.readouterr().err


def samples(base: dict[str, Any], **data: Any) -> Samples:
    raw = copy.deepcopy(base["d2v"])
    raw["data"] |= data
    config, problems = check_d2v(raw)
    assert config is not None, problems
    return samples_of(batch_maker(config), World("cpu"))


@pytest.mark.parametrize("change", CHANGES)
def test_recordings(change: str, tmp_path: Path) -> None:
    folder = make_recordings(tmp_path / "recordings")
    before = samples(TINY_SPEECH, kind="audio", path=str(folder))
    assert before == samples(TINY_SPEECH, kind="audio", path=str(folder))
    CHANGES[change](folder)
    said = before.difference(samples(TINY_SPEECH, kind="audio", path=str(folder)))
    words = {"removed": "and 4 now", "added": "and 6 now", "renamed": "names or their order", "replaced": "other sizes"}
    assert said is not None
    assert words[change] in said


def test_recordings_used_in_another_length(tmp_path: Path) -> None:
    folder = make_recordings(tmp_path / "recordings")
    before = samples(TINY_SPEECH, kind="audio", path=str(folder))
    shorter = samples(TINY_SPEECH, kind="audio", path=str(folder), max_seconds=0.52)
    assert before.difference(shorter) is not None
    assert "other sizes or lengths" in str(before.difference(shorter))


def test_text(tmp_path: Path) -> None:
    folder = make_text(tmp_path / "text")
    docs = samples(TINY_TEXT, tokens_path=str(tmp_path / "tokens"))
    (vocabulary,) = (tmp_path / "tokens").glob("*/tokenizer.json")

    def now(**changes: Any) -> Samples:
        options = {"kind": "text", "path": str(folder), "tokenizer": str(vocabulary), **changes}
        return samples(TINY_TEXT, tokens_path=str(tmp_path / "tokens"), **options)

    before = now()
    # touched, so tokenized anew; the tokens are the same
    os.utime(folder / "0.txt", (0, 0))
    assert now() == before
    assert before.difference(now(packing="stream", block_size=31)) is not None
    assert "divided otherwise" in str(before.difference(before._replace(sizes="others")))
    text = (folder / "0.txt").read_text()
    (folder / "0.txt").write_text(text.replace("number", "mumber"))
    assert before.difference(now()) == f"{before.number:,} blocks then and now, but other tokens"
    (folder / "9.txt").write_text("One more. " * 200)
    assert f"{before.number:,} blocks then and" in str(before.difference(now()))
    assert docs != before


def test_sample_sets_that_ship(tmp_path: Path) -> None:
    digits = samples(TINY)
    assert digits == samples(TINY)
    assert "1,438 images then and 1,078 now" in str(digits.difference(samples(TINY, test_fraction=0.4)))
    assert samples(TINY_SPEECH) == samples(TINY_SPEECH)


def test_digest_knows_where_parts_end() -> None:
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc")
    assert digest_of(np.array([1, 2])) != digest_of(np.array([2, 1]))


@needs_deepspeed
def test_processes_with_other_files_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path / "0")
    make_images(tmp_path / "1", count=59)
    make_images(tmp_path / "same", count=30)

    def work(world: World, folder: Path) -> list[str]:
        said = []
        for name in ("same", str(world.rank)):
            data = {**TINY["d2v"]["data"], "kind": "images", "path": str(folder / name)}
            config, _ = check_d2v({**TINY["d2v"], "data": data})
            assert config is not None
            try:
                said.append(str(samples_of(batch_maker(config), world).number))
            except RunError as error:
                said.append(str(error))
        return said

    for same, other in in_processes(2, tmp_path, work):
        assert same == "30"
        assert "60 images of rank 0 and 59 of rank 1" in other
