"""Other files among the checkpoints are reported, do not stop saving, and are never deleted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_fast.checkpoints.files import verified_checkpoint
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.training.run_folder import RunFolder, is_saved
from tests.helpers.checkpoint_files import save


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, said: list[str]) -> Checkpoints:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("kept")
    return Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu"), say=said.append)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda path, outside: path.write_text("mine"),
    "link": lambda path, outside: path.symlink_to(outside),
    "dangling link": lambda path, outside: path.symlink_to(outside / "nowhere"),
    "link to a file": lambda path, outside: path.symlink_to(outside / "precious"),
    "pipe": lambda path, outside: os.mkfifo(path),
    "folder": lambda path, outside: shutil.copytree(outside, path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_a_checkpoint(kind: str, checkpoints: Checkpoints, said: list[str], tmp_path: Path) -> None:
    """A file in the place of a checkpoint is renamed, a second one differently, and the checkpoint is saved."""
    save(checkpoints, 1)
    KINDS[kind](checkpoints.folder / "step-2", tmp_path / "outside")
    save(checkpoints, 2)
    verified_checkpoint(checkpoints.folder / "step-2", 2).close()
    assert names(checkpoints) == ["step-1", "step-2", "step-2.in-the-way"]
    assert len(said) == 1
    assert said[0].endswith("it was renamed to step-2.in-the-way, and is unchanged")
    moved = checkpoints.folder / "step-2.in-the-way"
    if kind == "file":
        assert moved.read_text() == "mine"
    if "link" in kind:
        assert moved.is_symlink()
    if kind == "folder":
        assert (moved / "precious").read_text() == "kept"
    shutil.rmtree(checkpoints.folder / "step-2")
    KINDS[kind](checkpoints.folder / "step-2", tmp_path / "outside")
    save(Checkpoints(checkpoints.folder, 2, World("cpu"), said.append), 2)
    assert names(checkpoints) == ["step-1", "step-2", "step-2.in-the-way", "step-2.in-the-way-2"]
    assert (tmp_path / "outside" / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["step-9.tmp-x", "step-3.tmp-4711", "step-3.tmp-old"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_what_a_save_left(
    kind: str, name: str, checkpoints: Checkpoints, said: list[str], tmp_path: Path
) -> None:
    """A file in the place of a temporary folder stays; the run reports it once, however often it saves."""
    checkpoints.folder.mkdir()
    KINDS[kind](checkpoints.folder / name, tmp_path / "outside")
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    assert names(checkpoints) == sorted(["step-3", "step-4", name])
    assert len([line for line in said if name in line]) == 1
    assert (tmp_path / "outside" / "precious").read_text() == "kept"


def test_own_temporary_name_that_is_taken(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.folder.mkdir()
    name = f"step-1.tmp-{os.getpid()}"
    (checkpoints.folder / name).write_text("mine")
    save(checkpoints, 1)
    assert names(checkpoints) == ["step-1", name]
    assert (checkpoints.folder / name).read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "link to a file", "pipe"])
def test_older_checkpoint_that_is_a_link_or_a_file(kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """It is not deleted, followed or counted by `keep`; a resume names it and uses the newest folder."""
    checkpoints.folder.mkdir()
    KINDS[kind](checkpoints.folder / "step-1", tmp_path / "outside")
    for step in (2, 3, 4):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-1", "step-3", "step-4"]
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.step == 4
    assert len(told) == 1
    assert told[0].startswith("step-1 is a ")
    assert told[0].endswith("It stays as it is.")
    assert (tmp_path / "outside" / "precious").read_text() == "kept"


def test_old_checkpoint_with_a_file_of_the_user(checkpoints: Checkpoints, said: list[str]) -> None:
    (save(checkpoints, 1) / "notes.txt").write_text("mine")
    (save(checkpoints, 2) / "linked").symlink_to(checkpoints.folder.parent / "outside")
    for step in (3, 4, 5):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-1", "step-2", "step-4", "step-5"]
    assert [line.partition("holds entries that no run has written: ")[2] for line in said] == ["notes.txt", "linked"]
    assert (checkpoints.folder.parent / "outside" / "precious").exists()


def test_folder_of_a_later_step_takes_the_place_of_no_good_one(checkpoints: Checkpoints) -> None:
    """A stray folder of a later step does not push out good checkpoints; a resume verifies it and sets it aside."""
    save(checkpoints, 1)
    (checkpoints.folder / "step-900").mkdir()
    for step in (2, 3):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-2", "step-3", "step-900"]
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.step == 3
    assert "step-900 is damaged (manifest.json is missing): kept as step-900.damaged" in told[0]


def test_folder_between_does_not_count(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.folder / "step-3").mkdir()
    save(checkpoints, 4)
    assert names(checkpoints) == ["step-2", "step-4"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EROFS])
def test_old_checkpoint_that_cannot_be_deleted(
    number: int, checkpoints: Checkpoints, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "step-1":
            raise OSError(number, os.strerror(number))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    for step in (2, 3, 4):
        save(checkpoints, step)
    assert names(checkpoints) == ["step-1", "step-3", "step-4"]
    assert len(said) == 1
    assert f"step-1 could not be deleted and is kept: [Errno {number}]" in said[0]


def test_only_strays_are_no_beginning(checkpoints: Checkpoints) -> None:
    """A run whose checkpoints were all replaced by other files does not start over silently."""
    checkpoints.folder.mkdir()
    (checkpoints.folder / "step-12").write_text("")
    with pytest.raises(RunError, match=r"no usable checkpoint in .*: step-12 is a file and no checkpoint"):
        checkpoints.newest(lambda _: None)


def test_new_run_deletes_nothing_that_lies_among_the_checkpoints(tmp_path: Path) -> None:
    """A new run keeps a user's file in the folder of a run that ended before its first checkpoint."""
    run = tmp_path / "r"
    (run / "checkpoints" / "step-1.tmp-17").mkdir(parents=True)
    (run / "lock").touch()
    assert not is_saved(run)
    (run / "checkpoints" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists: choose another name"):
        RunFolder.create(tmp_path, "r", "x")
    assert (run / "checkpoints" / "mine.txt").exists()
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (tmp_path / "disk" / "mine.txt").unlink()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    RunFolder.create(tmp_path, "r", "x").close()
    assert (run / "checkpoints").is_symlink()
