"""What the system says of other processes, and what a process writes into a lock that it holds."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
import time
from pathlib import Path

from d2v_fast.files.reading import printable

_PROCESSES = Path("/proc")
_RECORD = re.compile(r"pid (\d{1,10}) on (\S+)")
_LONGEST_COMMAND, _LONGEST_RECORD = 200, 400
# of /proc/PID/stat
_STATES = {"T": "stopped", "t": "stopped", "D": "waiting for a disk or a network file system", "Z": "dead", "X": "dead"}


def state_of(pid: int) -> str | None:
    """Return "stopped", "waiting for a disk or a network file system" or "dead"; None for a process that is well.

    A process that does not exist is dead.
    """
    try:
        fields = _stat(pid)
    except FileNotFoundError:
        return "dead"
    except (OSError, IndexError):
        return None
    return _STATES.get(fields[0])


def start_of(pid: int) -> int | None:
    """Return when a process was started, in ticks since the machine was; None for one that does not exist.

    Together with its number this stands for a process, whose number may be given to another one later.
    """
    try:
        return int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return None


def cpu_ticks(pid: int) -> int | None:
    """Return the processor time of a process and of the children that it has waited for, in ticks; None for none."""
    try:
        return sum(map(int, _stat(pid)[11:15]))
    except (OSError, IndexError, ValueError):
        return None


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that have not been waited for."""
    found: list[int] = []
    try:
        for task in (_PROCESSES / str(pid) / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += map(int, (task / "children").read_text().split())
    except OSError:
        # it has ended
        return []
    return sorted(found)


def descendants_of(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    found, seen = children_of(pid), {pid}
    for child in found:
        # a number may be given to another process meanwhile
        if child not in seen:
            seen.add(child)
            found += children_of(child)
    return sorted(seen - {pid})


def own_record() -> str:
    """Return a line that says who holds a lock: this process, its host, since when, and its command."""
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    if len(command) > _LONGEST_COMMAND:
        command = f"{command[: _LONGEST_COMMAND - 3]}..."
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return printable(f"pid {os.getpid()} on {os.uname().nodename} since {since} UTC: {command}")


class Holder:
    """The process that has written its `own_record` into a lock.

    Attributes:
        pid: of a process of this machine; None where it is another one's, or unknown.
    """

    def __init__(self, record: str) -> None:
        self._record = printable(record.strip()[:_LONGEST_RECORD])
        found = _RECORD.match(self._record)
        self.pid = int(found[1]) if found is not None and found[2] == os.uname().nodename else None
        self._host = found[2] if found is not None else None

    def __str__(self) -> str:
        if not self._record:
            return "a process that has not written who it is"
        state = None if self.pid is None else state_of(self.pid)
        return self._record if state is None else f"{self._record} ({self._word(state)})"

    def remedy(self) -> str:
        """Return what a user can do about it, as a sentence without its end."""
        if self.pid is None:
            return (
                f"Look at that process on {self._host}" if self._host else "Find that process, with `fuser` for example"
            )
        state = state_of(self.pid)
        if state == "stopped":
            return f"Let it go on (`kill -CONT {self.pid}`) or end it (`kill -KILL {self.pid}`)"
        if state == "dead":
            return "Look for it in the container that it runs in"
        return f"End it (`kill {self.pid}`) if it hangs"

    def _word(self, state: str) -> str:
        return "not among the processes that can be seen here: in another container?" if state == "dead" else state


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, which may hold anything."""
    return (_PROCESSES / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
