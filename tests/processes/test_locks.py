"""How long a process waits for a lock of another process, and how it names the holder."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from d2v_fast.commands.console import main
from d2v_fast.data import cache
from d2v_fast.data.cache import made_once
from d2v_fast.errors import DataError, RunError
from d2v_fast.files.locks import Holder, own_record
from d2v_fast.processes.state import state_of
from d2v_fast.training.run_folder import RunFolder
from tests.helpers.runs import TINY_TEXT, fork, tiny_file, until, wait

pytestmark = pytest.mark.waits

NAME = "tokens-1"


@pytest.fixture
def children() -> Iterator[list[int]]:
    """Process ids that are killed after the test, whatever state they are in."""
    found: list[int] = []
    yield found
    for child in found:
        os.kill(child, signal.SIGKILL)
        wait(child)


def write_one(folder: Path) -> None:
    (folder / "file").write_text("made")


def hold(root: Path, children: list[int], meanwhile: Callable[[Path], None]) -> int:
    """Make the folder in another process, which calls `meanwhile` while it holds the lock; return its process id."""
    child = fork(lambda: made_once(str(root), NAME, meanwhile) is None, root.parent / "output")
    children.append(child)
    until(lambda: (root / f".{NAME}.lock").is_file() and (root / f".{NAME}.lock").read_text().startswith("pid"))
    return child


def stop_myself(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    write_one(folder)


def test_stopped_holder_is_named(tmp_path: Path, children: list[int], caplog, monkeypatch) -> None:
    monkeypatch.setattr(cache, "REPORT_S", 0.2)
    root = tmp_path / "cache"
    child = hold(root, children, stop_myself)
    until(lambda: state_of(child) == "stopped")
    started = time.monotonic()
    with pytest.raises(DataError) as info, caplog.at_level(logging.WARNING):
        made_once(str(root), NAME, write_one, patience_s=1.0)
    assert 0.9 < time.monotonic() - started < 20
    message = str(info.value)
    assert f"pid {child} on {os.uname().nodename} since " in message
    assert "(stopped)" in message
    assert "has made no progress for 0.0167 minutes" in message
    assert f"`kill -CONT {child}`" in message
    (said,) = caplog.messages
    assert said.startswith(f"waiting for another process that writes '{NAME}' in '{root}': pid {child} on ")
    # what it held is not touched, and it goes on where it was
    os.kill(child, signal.SIGCONT)
    assert (made_once(str(root), NAME, pytest.fail, patience_s=20) / "file").read_text() == "made"


def test_lock_of_a_dead_holder_is_free(tmp_path: Path, children: list[int]) -> None:
    root = tmp_path / "cache"
    child = hold(root, children, stop_myself)
    children.remove(child)
    os.kill(child, signal.SIGKILL)
    wait(child)
    assert (made_once(str(root), NAME, write_one, patience_s=0.5) / "file").read_text() == "made"
    assert [path.name for path in root.iterdir()] == [NAME]


def compute_for(seconds: float) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            sum(range(1000))
        write_one(folder)

    return work


def write_for(seconds: float) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            with (folder / "file").open("a") as file:
                file.write("x")
            time.sleep(0.02)
        (folder / "file").write_text("made")

    return work


@pytest.mark.parametrize("work", [compute_for(2.5), write_for(2.5)], ids=["computes", "writes"])
def test_holder_that_makes_progress_is_waited_for(work: Callable[[Path], None], tmp_path: Path, children) -> None:
    """A holder that makes progress is waited for beyond the patience; on another machine, only writes are seen."""
    root = tmp_path / "cache"
    hold(root, children, work)
    assert (made_once(str(root), NAME, pytest.fail, patience_s=1.0) / "file").read_text() == "made"


def test_holder_on_another_machine(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    lock = root / f".{NAME}.lock"
    lock.write_text("pid 1 on elsewhere since 2026-01-01 00:00:00 UTC: train.py")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"pid 1 on elsewhere since .*Look at that process on elsewhere"):
            made_once(str(root), NAME, write_one, patience_s=0.2)
        # what an earlier version left is empty
        lock.write_text("")
        with pytest.raises(DataError, match="a process that left no record"):
            made_once(str(root), NAME, write_one, patience_s=0.2)
        # removed by hand, it is nobody's
        threading.Timer(0.3, lock.unlink).start()
        assert (made_once(str(root), NAME, write_one, patience_s=5) / "file").exists()


def test_record_is_shown_as_one_line() -> None:
    assert str(Holder(own_record())) == own_record()
    assert "\n" not in str(Holder("pid 1 on a\x1b[2J\nb" + 10_000 * "x"))
    assert len(str(Holder("pid 1 on " + 10_000 * "x"))) < 500


@pytest.mark.parametrize("stops", [False, True])
def test_run_folder_names_its_holder(stops: bool, tmp_path: Path, children: list[int]) -> None:
    root, ready = tmp_path / "runs", tmp_path / "ready"

    def train() -> int:
        folder = RunFolder.create(root, "r", "r")
        ready.touch()
        if stops:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        folder.close()
        return 0

    children.append(fork(train, tmp_path / "output"))
    until(ready.exists)
    if stops:
        until(lambda: state_of(children[0]) == "stopped")
    with pytest.raises(RunError) as info:
        RunFolder.reopen(root, "r")
    message = str(info.value)
    assert f"another process (pid {children[0]} on {os.uname().nodename} since " in message
    assert ("(stopped)" in message) == stops
    assert (f"kill -CONT {children[0]}" if stops else f"kill {children[0]}") in message


def test_run_folder_without_locks(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(RunError, match=r"cannot be locked \(No locks available\).*`d2v.run.dir`"):
        RunFolder.create(tmp_path, "r", "r")


def test_patience_is_that_of_the_run(tmp_path: Path, children: list[int], capsys) -> None:
    """Use the patience of the run on the command line, while a stopped process makes the tokenizer of the samples."""
    file = tiny_file(tmp_path, TINY_TEXT, d2v__data__tokens_path=str(tmp_path / "cache"))
    arguments = ["tokenize", str(file), "--set", "d2v.run.timeout_minutes=0.01"]
    stop = partial(setattr, cache, "fault_point", lambda point: os.kill(os.getpid(), signal.SIGSTOP))

    def tokenize_and_stop() -> int:
        stop()
        return main(arguments)

    children.append(fork(tokenize_and_stop, tmp_path / "output"))
    until(lambda: state_of(children[0]) == "stopped")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "`d2v.data.tokens_path` is being written to by another process" in error
    assert f"pid {children[0]} on " in error
    assert "made no progress for 0.01 minutes" in error
