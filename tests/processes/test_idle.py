"""An idle process ends with a message; one that works, or that was stopped and continued, does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from d2v_fast.checkpoints import store
from d2v_fast.commands import console
from d2v_fast.data.worker_watch import WorkerWatch
from d2v_fast.files import atomic
from d2v_fast.processes import idle
from d2v_fast.processes.idle import IdleWatch
from d2v_fast.processes.state import children_of, state_of
from tests.helpers.runs import fork, leave_out_reports, run_forked, run_here, start, tiny_file, until, wait

LIMIT_S = 0.8

pytestmark = pytest.mark.waits


def wait_for_nothing() -> None:
    threading.Event().wait(600)


def work_for(seconds: float, work: Callable[[], object]) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        work()


def watched(work: Callable[[], object]) -> Callable[[], int]:
    def run() -> int:
        with IdleWatch(LIMIT_S, "Look at it."):
            work()
        return 0

    return run


def test_idle_process_ends_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "note"

    def stop_a_child_and_wait() -> None:
        child = fork(lambda: time.sleep(60) or 0, tmp_path / "child")
        os.kill(child, signal.SIGSTOP)
        note.write_text(str(child))
        wait_for_nothing()

    started = time.monotonic()
    parent = fork(watched(stop_a_child_and_wait), tmp_path / "output")
    assert wait(parent, timeout_s=20) == [1]
    assert LIMIT_S < time.monotonic() - started < 15
    child = int(note.read_text())
    message = (tmp_path / "output").read_text()
    assert f"error: this process (pid {parent}) has neither computed nor read nor written anything" in message
    assert f"Its process {child} is stopped. Look at it." in message
    until(lambda: state_of(child) == "dead")


def test_idle_process_ends_where_nobody_reads_its_message(tmp_path: Path) -> None:
    def close_the_reader_and_wait() -> None:
        reading, writing = os.pipe()
        os.close(reading)
        sys.stderr = os.fdopen(writing, "w")
        wait_for_nothing()

    assert wait(fork(watched(close_the_reader_and_wait), tmp_path / "output"), timeout_s=20) == [1]


def compute() -> None:
    sum(range(10_000))


def read() -> None:
    Path("/proc/self/exe").read_bytes()
    time.sleep(0.05)


def say_so() -> None:
    idle.alive()
    time.sleep(0.1)


def compute_in_a_child() -> None:
    subprocess.run([sys.executable, "-S", "-c", "for _ in range(10**6): pass"], check=True)


def compile_below_a_child() -> None:
    """Compute in a grandchild, like a compiler below a build tool; the child itself only waits."""
    command = f"{sys.executable} -S -c 'for _ in range(10**7): pass'; true"
    subprocess.run(["sh", "-c", command], check=True)


def test_long_work_is_no_wait(tmp_path: Path) -> None:
    kinds = (compute, read, say_so, compute_in_a_child, compile_below_a_child)
    # all at once: each takes three times the limit
    started = {
        work.__name__: fork(watched(lambda work=work: work_for(3 * LIMIT_S, work)), tmp_path / work.__name__)
        for work in kinds
    }
    statuses = dict(zip(started, wait(*started.values()), strict=True))
    assert statuses == dict.fromkeys(started, 0), [(tmp_path / name).read_text() for name in started]


def test_a_thread_that_only_serves_is_no_work(tmp_path: Path) -> None:
    def serve_and_wait() -> None:
        threading.Thread(target=work_for, args=(600, compute), daemon=True).start()
        wait_for_nothing()

    assert wait(fork(watched(serve_and_wait), tmp_path / "output"), timeout_s=20) == [1]


def test_a_person_at_the_debugger_is_waited_for(tmp_path: Path) -> None:
    module = types.ModuleType("pdb")
    exec(compile("def ask(wait):\n    wait(4)", "<pdb>", "exec"), module.__dict__)
    debugged = watched(lambda: module.ask(threading.Event().wait))
    assert wait(fork(debugged, tmp_path / "output"), timeout_s=20) == [0]


def test_a_pager_that_waits_for_a_key_is_waited_for(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def print_more_than_a_pipe_holds() -> int:
        os.dup2(writing, 1)
        with IdleWatch(LIMIT_S):
            os.write(1, b"-" * 300_000)
        return 0

    child = fork(print_more_than_a_pipe_holds, tmp_path / "output")
    os.close(writing)
    time.sleep(3 * LIMIT_S)
    with open(reading, "rb") as pager:
        assert len(pager.read()) == 300_000
    assert wait(child, timeout_s=20) == [0], (tmp_path / "output").read_text()


def test_a_process_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """A process may be stopped for longer than the limit in the middle of a short wait."""
    child = fork(watched(lambda: time.sleep(2 * LIMIT_S + 1)), tmp_path / "output")
    time.sleep(LIMIT_S / 2)
    os.kill(child, signal.SIGSTOP)
    time.sleep(2 * LIMIT_S + 0.5)
    os.kill(child, signal.SIGCONT)
    # what is left of the wait is shorter than the limit
    assert wait(child, timeout_s=20) == [0], (tmp_path / "output").read_text()


def test_large_files_are_flushed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_PART", 1 << 16)
    signs: list[int] = []
    monkeypatch.setattr(atomic, "alive", lambda: signs.append(1))
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    atomic.flush(tmp_path / "file")
    assert len(signs) == 6
    atomic.flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        atomic.flush(tmp_path / "none")


def test_dead_disk_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save waits for the flush of a checkpoint in the background, which never returns."""
    leave_out_reports(monkeypatch.setattr)
    output, file = tmp_path / "output", tiny_file(tmp_path, d2v__run__timeout_minutes=0.05)

    def hang_in_the_second_checkpoint() -> None:
        passed = []

        def flush(path: Path) -> None:
            if path.suffix == ".safetensors":
                passed.append(path)
                if len(passed) == 2:
                    wait_for_nothing()

        store.flush = flush

    arguments = ["--ds_config", file, "--run", "r"]
    assert run_forked(*arguments, output=output, before=hang_in_the_second_checkpoint) == [1], output.read_text()
    text = output.read_text()
    assert "neither computed nor read nor written anything for 0.05 minutes" in text
    assert "`join` (checkpoints/store.py:" in text
    assert "raise `d2v.run.timeout_minutes`" in text
    assert run_here(*arguments, "--resume") == 0


def test_commands_are_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_IDLE_S", LIMIT_S)
    monkeypatch.setitem(console._WORK, "embed", lambda options: wait_for_nothing() or 0)
    arguments = ["embed", "model", "inputs", "--to", str(tmp_path / "a.npy")]
    assert wait(fork(lambda: console.main(arguments), tmp_path / "output"), timeout_s=20) == [1]
    assert "error: this process" in (tmp_path / "output").read_text()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_stopped_worker_ends_a_run_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    output = tmp_path / "output"
    changes = {"d2v__data__num_workers": 1, "d2v__run__timeout_minutes": 0.05, "d2v__schedule__steps": 12}
    file = tiny_file(tmp_path, **changes)

    def slowly() -> None:
        from d2v_fast.files import faults

        faults.fault_point = lambda point: time.sleep(0.3) if point == "step" else None
        os.setpgid(0, 0)

    def worker() -> int:
        return next(iter(children_of(run)))

    arguments: list[object] = ["--ds_config", file, "--run", "r"]
    run = start(arguments, output, before=slowly)
    until(lambda: "step 2/12" in (output.read_text() if output.exists() else ""))
    # it has queued batches already
    os.kill(worker(), signal.SIGSTOP)
    stopped = worker()
    assert wait(run, timeout_s=40) == [1]
    text = output.read_text()
    assert f"error: A data loader worker returned no batch for 3 s: worker 0 (pid {stopped}) is stopped." in text
    assert "Traceback" not in text
    assert state_of(stopped) == "dead"

    run = start([*arguments, "--resume"], output, before=slowly)
    until(lambda: "step 5/12" in output.read_text())
    os.killpg(run, signal.SIGSTOP)
    time.sleep(4.5)
    os.killpg(run, signal.SIGCONT)
    assert wait(run, timeout_s=60) == [0], output.read_text()


def test_death_of_a_worker_that_is_ended_is_raised_nowhere_else() -> None:
    """torch raises the death of a worker from a signal handler, which would hide why the worker was ended."""
    iterator = iter(DataLoader(range(100), num_workers=1))
    (worker,) = iterator._workers
    watch = WorkerWatch(iterator, 0.4)
    os.kill(worker.pid, signal.SIGSTOP)
    with watch.awaiting():
        until(lambda: not worker.is_alive(), timeout_s=20)
        time.sleep(0.1)
    watch.close()
    assert watch.problem == f"A data loader worker returned no batch for 0.4 s: worker 0 (pid {worker.pid}) is stopped."
    iterator._shutdown_workers()
