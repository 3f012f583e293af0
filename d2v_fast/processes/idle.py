"""End a process that makes no progress: it neither computes nor reads nor writes.

A read from a dead disk, a flush that never returns, or a stopped peer of a pipe holds the main thread in a system call,
where no exception reaches it. Processor time, bytes and page faults of this process and its children count as progress,
and so does a call of `alive`.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from d2v_fast.processes.state import cpu_ticks, descendants_of, state_of

# checks for progress within the limit. Counting checks instead of seconds ignores jumps of the clock and the time for
# which the whole process is stopped
LOOKS = 40
# a check that is late by more than this many intervals means that the process or machine was stopped: counting starts
# again, because whatever the process waits for may have been stopped as well
GAP_LOOKS = 10
# less than this within the limit is no progress; daemon threads, such as a progress bar's, do not count
_CPU_SHARE, _FEWEST_TICKS = 0.005, 2
_BYTES, _FAULTS = 1 << 16, 20
# modules in which the main thread waits for a person
_DEBUGGERS = ("bdb", "pdb", "ipdb", "pudb", "debugpy", "pydevd", "IPython", "code")
_PACKAGE = Path(__file__).resolve().parent.parent
_TASKS = Path("/proc/self/task")

_signs = 0


def alive() -> None:
    """Report progress to the `IdleWatch` of this process; for waits that have their own time limit."""
    global _signs
    _signs += 1


def late(since: float, now: float, interval_s: float) -> bool:
    """Return whether a check came so late that the process must have been stopped.

    Args:
        since, now: times of `clock`.
        interval_s: planned time between them.
    """
    return now - since > GAP_LOOKS * interval_s


def clock() -> float:
    """Return seconds on a clock that counts while the machine sleeps and ignores changes of the time of day."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def end_process(message: str) -> None:
    """Print an error, kill all children, and exit with status 1, even if threads hang in system calls."""
    # the reader of the message may be gone, and a child may end by itself meanwhile
    with suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    for child in descendants_of(os.getpid()):
        # a stopped loader worker would stay forever
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
    os._exit(1)


class IdleWatch:
    """A thread that ends this process once it has made no progress for `limit_s`.

    Args:
        limit_s: seconds without progress.
        advice: the last sentence of the message.
        end: called with the message from the thread; ends the process.
    """

    def __init__(self, limit_s: float, advice: str = "", end: Callable[[str], None] = end_process) -> None:
        self._limit_s, self._advice, self._end = limit_s, advice, end
        self._closed = threading.Event()
        self._enough_ticks = max(_FEWEST_TICKS, int(_CPU_SHARE * limit_s * os.sysconf("SC_CLK_TCK")))
        # only Linux reports what a process does
        if _TASKS.is_dir():
            threading.Thread(target=self._watch, name="d2v_fast idle", daemon=True).start()

    def __enter__(self) -> IdleWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        interval_s = self._limit_s / LOOKS
        looks, before, last = 0, _Activity.now(), clock()
        while not self._closed.wait(interval_s):
            now = clock()
            activity = _Activity.now()
            if late(last, now, interval_s) or activity.differs(before, self._enough_ticks):
                looks, before = 0, activity
            else:
                looks += 1
            last = now
            if looks >= LOOKS:
                if _is_debugged() or _is_output_held():
                    looks = 0
                    continue
                self._end(self._message())
                return

    def _message(self) -> str:
        places = "; ".join(_places()) or "outside of Python"
        bad = [(child, state_of(child)) for child in descendants_of(os.getpid())]
        children = "".join(f" Its process {child} is {state}." for child, state in bad if state is not None)
        return (
            f"this process (pid {os.getpid()}) has neither computed nor read nor written anything for "
            f"{self._limit_s / 60:.3g} minutes: it waits in {places}.{children} {self._advice}".rstrip()
        )


class _Activity(NamedTuple):
    """Work that this process and its children have done so far, by thread; daemon threads are left out."""

    signs: int
    ticks: dict[int, int]
    faults: dict[int, int]
    num_bytes: dict[int, int]

    @classmethod
    def now(cls) -> _Activity:
        serving = {thread.native_id for thread in threading.enumerate() if thread.daemon}
        ticks: dict[int, int] = {}
        faults: dict[int, int] = {}
        num_bytes: dict[int, int] = {}
        for task in _TASKS.iterdir():
            if int(task.name) in serving:
                continue
            try:
                fields = (task / "stat").read_text(errors="replace").rpartition(")")[2].split()
                ticks[int(task.name)] = int(fields[11]) + int(fields[12])
                faults[int(task.name)] = int(fields[9])
                amounts = dict(line.split(": ") for line in (task / "io").read_text().splitlines())
                num_bytes[int(task.name)] = int(amounts["rchar"]) + int(amounts["wchar"])
            except (OSError, ValueError, IndexError, KeyError):
                # the thread has ended, or the system does not count this
                continue
        ticks |= {child: cpu_ticks(child) or 0 for child in descendants_of(os.getpid())}
        return cls(_signs, ticks, faults, num_bytes)

    def differs(self, before: _Activity, enough_ticks: int) -> bool:
        """Return whether there was progress since `before`."""
        return (
            self.signs != before.signs
            or _more(self.ticks, before.ticks) >= enough_ticks
            or _more(self.faults, before.faults) >= _FAULTS
            or _more(self.num_bytes, before.num_bytes) >= _BYTES
        )


def _more(now: dict[int, int], before: dict[int, int]) -> int:
    return sum(value - before.get(task, 0) for task, value in now.items())


def _places() -> list[str]:
    """Return the innermost function of this package in each thread but daemons; the main thread comes first."""
    frames, places = sys._current_frames(), []
    for thread in sorted(threading.enumerate(), key=lambda one: one is not threading.main_thread()):
        frame = frames.get(thread.ident or 0)
        while not thread.daemon and frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_PACKAGE):
                places.append(f"`{frame.f_code.co_name}` ({path.relative_to(_PACKAGE)}:{frame.f_lineno})")
                break
            frame = frame.f_back
    return places


def _is_output_held() -> bool:
    """Return whether the output blocks: a pager waits for a key, or a terminal for Ctrl-Q."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, select.POLLOUT)
    # a closed output is reported as an error, and so is in the answer
    return len(outputs.poll(0)) < 2


def _is_debugged() -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if "TracerPid:" in status and "TracerPid:\t0\n" not in status:
        return True
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _DEBUGGERS:
            return True
        frame = frame.f_back
    return False
