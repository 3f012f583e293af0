"""A system error while a checkpoint is read is not taken for damage: no process renames anything."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2v_fast.checkpoints import files as checkpoint_files
from d2v_fast.checkpoints import shard_files
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.files import faults, reading
from d2v_fast.training import supervise
from d2v_fast.training.run_folder import RunFolder, is_saved
from tests.helpers.checkpoint_files import edit_state, save
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import fork, in_processes, wait

ERRORS = ("EIO", "EMFILE", "ENFILE", "ESTALE", "EACCES", "EPERM", "ENOMEM", "ETIMEDOUT", "ENOTCONN", "EBUSY", "ELOOP")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3, world=World("cpu"))


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def refuse(patch: pytest.MonkeyPatch, place: Any, function: str, number: int, when: Callable[[Any], bool]) -> None:
    """Make a system call fail with this error number for the arguments for which `when` holds."""
    call = getattr(place, function)

    def fail(*arguments: Any, **options: Any) -> Any:
        if when(arguments[0]):
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return call(*arguments, **options)

    patch.setattr(place, function, fail)


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("point", ["load.open:1", "load.open:3", "load.read:1", "load.read:2"])
def test_error_changes_nothing(
    point: str, name: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_fault", faults.Fault(f"{point}:{name}"))
        with pytest.raises(RunError) as caught:
            checkpoints.newest(pytest.fail)
    said = str(caught.value)
    assert f"the checkpoint {checkpoints.folder / 'step-2'} could not be read: " in said
    assert os.strerror(getattr(errno, name)) in said
    assert "Nothing was changed. After that is repaired: " in said
    assert "--resume" in said
    assert names(checkpoints) == ["step-1", "step-2"]
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.step == 2


def opening(path: object) -> bool:
    return isinstance(path, Path) and path.name in ("shard-00000.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize(
    ("place", "function", "when"),
    [
        (reading.os, "open", opening),
        (reading.os, "stat", opening),
        (reading.os, "lstat", opening),
        (shard_files.os, "pread", lambda handle: True),
        (shard_files.os, "dup", lambda handle: True),
        (checkpoint_files.os, "listdir", lambda path: str(path).endswith("step-2")),
    ],
    ids=["open", "stat", "lstat", "read", "dup", "list"],
)
def test_every_call_that_reads_may_fail(
    place: Any, function: str, when: Callable[[Any], bool], checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    with monkeypatch.context() as patch:
        refuse(patch, place, function, errno.EIO, when)
        with pytest.raises(RunError, match=r"step-2 could not be read: .*Nothing was changed"):
            checkpoints.newest(pytest.fail)
    assert names(checkpoints) == ["step-1", "step-2"]


def test_folder_that_cannot_be_listed(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be listed does not count as empty, be it for a resume, a new run or a supervisor."""
    run = checkpoints.folder.parent
    save(checkpoints, 1)
    (run / "lock").touch()
    with monkeypatch.context() as patch:
        for function in ("scandir", "listdir"):
            refuse(patch, os, function, errno.EACCES, lambda path: str(path).endswith("checkpoints"))
        with pytest.raises(PermissionError):
            checkpoints.newest(pytest.fail)
        with pytest.raises(PermissionError):
            is_saved(run)
        with pytest.raises(PermissionError):
            RunFolder.create(run.parent, run.name, "x")
        assert supervise._newest_step(run, 7) == 7
    assert names(checkpoints) == ["step-1"]
    assert supervise._newest_step(run, 7) == 1


def test_too_many_open_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The system's error is reported wherever the limit is met, and one more file handle is enough to read."""
    save(checkpoints, 1)
    folder = save(checkpoints, 2)

    def read() -> int:
        least = sum(1 for _ in os.scandir("/proc/self/fd"))
        for limit in range(least - 1, least + 12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            try:
                found = checkpoints.newest(print)
            except (RunError, OSError):
                continue
            return 3 if found is not None and found.step == 2 and limit > least else 4
        return 5

    assert wait(fork(read, tmp_path / "output")) == [3], (tmp_path / "output").read_text()
    assert names(checkpoints) == ["step-1", "step-2"]
    assert folder.is_dir()


def test_damage_found_before_is_verified_again(checkpoints: Checkpoints) -> None:
    """A checkpoint that was set aside for a passing error is verified again, renamed back and used."""
    for step in (1, 2, 3):
        save(checkpoints, step)
        (checkpoints.folder / f"step-{step}").rename(checkpoints.folder / f"step-{step}.damaged")
    (checkpoints.folder / "step-3.damaged" / "state.json").write_text("{}")
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.folder == checkpoints.folder / "step-2"
    assert told == ["step-2.damaged is whole, and there is no other: it is used, and is called step-2 again"]
    assert names(checkpoints) == ["step-1.damaged", "step-2", "step-3.damaged"]
    # while there is a good checkpoint, the damaged ones are named but not read
    told.clear()
    assert checkpoints.newest(told.append) is not None
    assert told == ["step-3.damaged was found damaged before. To have it verified again, rename it to step-3."]


def test_error_while_damage_is_verified_again(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoints, 2).rename(checkpoints.folder / "step-2.damaged")
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_fault", faults.Fault("load.read:1:EIO"))
        with pytest.raises(RunError, match=r"step-2\.damaged could not be read"):
            checkpoints.newest(pytest.fail)
    assert names(checkpoints) == ["step-2.damaged"]


def test_nothing_is_deleted_for_a_second_damage(checkpoints: Checkpoints) -> None:
    """A second damaged checkpoint does not replace the first, and no message advises to remove anything."""
    save(checkpoints, 2).rename(checkpoints.folder / "step-2.damaged")
    (checkpoints.folder / "step-2.damaged" / "state.json").write_text("{}")
    # by another process, which does not know about the first
    again = Checkpoints(checkpoints.folder, keep=3, world=World("cpu"))
    (save(again, 2) / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(RunError) as caught:
        again.newest(lambda _: None)
    assert names(checkpoints) == ["step-2.damaged", "step-2.damaged-2"]
    said = str(caught.value)
    assert "step-2 is damaged (shard-00000.safetensors has 0 bytes instead of" in said
    assert "step-2.damaged was found damaged before, and still is (state.json has 2 bytes instead of" in said
    assert "Nothing was deleted" in said
    assert "Remove" not in said


@needs_deepspeed
def test_error_of_one_process_stops_all(tmp_path: Path) -> None:
    """Both processes stop and rename nothing if one cannot read the files, does not see them or sees others."""
    alone = Checkpoints(tmp_path / "checkpoints", keep=3, world=World("cpu"))
    for step in (1, 2):
        edit_state(save(alone, step), lambda state: None)

    def work(world: World, folder: Path) -> list[str]:
        said = []
        checkpoints = Checkpoints(folder / "checkpoints", 3, world)
        for number in (errno.EIO, errno.ENOENT, None):
            with pytest.MonkeyPatch.context() as patch:
                if world.rank == 1 and number is not None:
                    refuse(patch, reading.os, "open", number, lambda path: path.name == "shard-00000.safetensors")
                elif world.rank == 1:
                    patch.setattr(shard_files.HeldFile, "digest", lambda held: "0" * 64)
                try:
                    checkpoints.newest(said.append)
                except RunError as error:
                    said.append(str(error))
        found = checkpoints.newest(said.append)
        return [*said, "" if found is None else found.folder.name]

    results = in_processes(2, tmp_path, work)
    assert results[0] == results[1]
    io_error, absent, other, found = results[0]
    assert "step-2 could not be read by rank 1: [Errno 5] Input/output error" in io_error
    for said in (absent, other):
        assert "the processes do not find the same files in" in said
        assert "on a file system that they share. Nothing was changed." in said
    assert found == "step-2"
    assert names(alone) == ["step-1", "step-2"]
