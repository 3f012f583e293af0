"""Exports, probes and features work while a run saves checkpoints and deletes older ones."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from d2v_fast.checkpoints import hold as checkpoint_hold
from d2v_fast.checkpoints import saved_weights
from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.checkpoints.hold import alone_with, hold
from d2v_fast.checkpoints.saved_weights import open_checkpoint
from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.distributed.shards import Shard
from d2v_fast.distributed.world import World
from d2v_fast.interop.export import export_run
from d2v_fast.modalities.vision.huggingface import import_vision
from d2v_fast.objectives.build import build_model
from tests.helpers.checkpoint_files import save
from tests.helpers.runs import fork, wait
from tests.helpers.written_runs import CONFIG, write_run


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=1, world=World("cpu"))


def test_checkpoint_that_is_read_stays_until_the_next_save(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    with open_checkpoint(checkpoints.folder.parent) as checkpoint:
        assert checkpoint.step == 1
        for later in (2, 3):
            save(checkpoints, later)
            assert checkpoint.folder.is_dir()
            # no other lock stays behind
            assert checkpoints.steps() == [later, 1]
    save(checkpoints, 4)
    assert checkpoints.steps() == [4]
    assert not list(checkpoints.folder.glob("*.tmp-*"))


def test_several_readers_and_one_that_was_killed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = save(checkpoints, 1)

    def read() -> int:
        with hold(folder):
            (tmp_path / "held").touch()
            os.kill(os.getpid(), 9)
        return 0

    with hold(folder), hold(folder), alone_with(folder) as is_free:
        assert not is_free
    assert wait(fork(read, tmp_path / "output")) == [-9]
    assert (tmp_path / "held").exists()
    with alone_with(folder) as is_free:
        assert is_free
        with pytest.raises(FileNotFoundError), hold(folder):
            pass


def test_reader_takes_the_newer_one_where_its_own_is_deleted(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint disappears between the listing and the opening."""
    save(checkpoints, 1)
    listed = saved_weights.complete_steps

    def and_then_saved(folder: Path) -> list[int]:
        found = listed(folder)
        if found == [1]:
            save(checkpoints, 2)
        return found

    monkeypatch.setattr(saved_weights, "complete_steps", and_then_saved)
    with open_checkpoint(checkpoints.folder.parent) as checkpoint:
        assert (checkpoint.folder.name, checkpoint.step) == ("step-2", 2)


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), OSError(95, "Operation not supported")])
def test_file_system_without_locks(
    checkpoints: Checkpoints, error: OSError, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without locks, saving and reading go on, and deleting a checkpoint that is being read is reported."""

    def no_lock(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint_hold.fcntl, "flock", no_lock)
    save(checkpoints, 1)
    with pytest.raises(ValueError, match=r"deleted the checkpoint .*step-1 while it was read"):
        read_slowly(checkpoints)
    assert checkpoints.steps() == [2]
    with pytest.raises(OSError, match="of the target"), open_checkpoint(tmp_path):
        raise OSError("of the target")


def read_slowly(checkpoints: Checkpoints) -> None:
    with open_checkpoint(checkpoints.folder.parent) as checkpoint:
        save(checkpoints, 2)
        (checkpoint.folder / "state.json").read_bytes()


def test_what_cannot_be_written_can_be_read(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading creates no file and opens none for writing, so that it works on read-only media."""
    folder = save(checkpoints, 1)
    opened = os.open

    def read_only(path: str | Path, flags: int, *more: int, **options: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, os.strerror(30), str(path))
        return opened(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    before = sorted(folder.parent.parent.rglob("*"))
    with open_checkpoint(folder.parent.parent) as found:
        assert found.folder == folder
    assert sorted(folder.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("odd", ["missing", "folder", "pipe", "dangling"])
def test_checkpoint_whose_manifest_is_none_is_called_damaged(odd: str, checkpoints: Checkpoints) -> None:
    """A manifest that is no regular file blocks neither a reader nor the run that deletes the checkpoint."""
    folder = save(checkpoints, 1)
    manifest = folder / "manifest.json"
    manifest.unlink()
    if odd == "folder":
        manifest.mkdir()
    elif odd == "pipe":
        os.mkfifo(manifest)
    elif odd == "dangling":
        manifest.symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match="is damaged"), open_checkpoint(folder.parent.parent):
        pass
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]


def test_exports_beside_saves(tmp_path: Path) -> None:
    """Every export comes from a single checkpoint while a run saves without a pause and keeps only one."""
    write_run(tmp_path, CONFIG, 1)
    model = build_model(CONFIG)
    values = {f"student/{name}": p.detach() for name, p in model.named_parameters()}
    values |= {f"teacher/{name}": p.detach().clone() for name, p in model.student.averaged.named_parameters()}
    kept = [
        Kept(kind, Shard(name, value.shape, 0, value.view(-1), value, 0, replicated=True))
        for (kind, _, name), value in ((key.partition("/"), value) for key, value in values.items())
    ]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, world=World("cpu"))
    done = threading.Event()

    def run() -> None:
        step = 7
        while not done.is_set():
            step += 1
            for value in values.values():
                value.fill_(step)
            checkpoints.save(step, {}, kept)

    run_thread = threading.Thread(target=run)
    run_thread.start()
    try:
        for number in range(25):
            line = export_run(tmp_path, to=tmp_path / f"out-{number}")
            found = {float(value.max()) for value in import_vision(tmp_path / f"out-{number}")[0].state_dict().values()}
            # the checkpoint of step 7 has other values
            assert len(found) == 1 or "step 7," in line
    finally:
        done.set()
        run_thread.join()
    checkpoints.save(10**6, {}, kept)
    assert complete_steps(tmp_path / "checkpoints") == [10**6]


def test_lock_is_the_systems(checkpoints: Checkpoints) -> None:
    """The lock is a `flock`, which other programs can see."""
    folder = save(checkpoints, 1)
    with hold(folder), (folder / "manifest.json").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_manifest_protected_from_writing_is_held_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    open_file = os.open

    def open_protected(path: Path, flags: int) -> int:
        # as for a user who is not root, after `chmod a-w`
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, flags)

    monkeypatch.setattr(checkpoint_hold.os, "open", open_protected)
    with hold(tmp_path), alone_with(tmp_path) as is_free:
        assert not is_free
    with alone_with(tmp_path) as is_free:
        assert is_free
