"""What the system reports about other processes: state, start, processor time, children."""

from __future__ import annotations

import contextlib
from pathlib import Path

_PROCESSES = Path("/proc")
# of /proc/PID/stat
_STATES = {"T": "stopped", "t": "stopped", "D": "waiting for a disk or a network file system", "Z": "dead", "X": "dead"}


def state_of(pid: int) -> str | None:
    """Return "stopped", "waiting for a disk or a network file system" or "dead", or None for a healthy process.

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
    """Return the start of a process in clock ticks after boot, or None if it does not exist.

    Process number and start together identify a process; the number alone may be reused.
    """
    try:
        return int(_stat(pid)[19])
    except (OSError, IndexError, ValueError):
        return None


def cpu_ticks(pid: int) -> int | None:
    """Return the processor time of a process and of its finished children in clock ticks; None if it does not exist."""
    try:
        return sum(map(int, _stat(pid)[11:15]))
    except (OSError, IndexError, ValueError):
        return None


def children_of(pid: int) -> list[int]:
    """Return the numbers of the child processes that have not been waited for."""
    found: list[int] = []
    try:
        for task in (_PROCESSES / str(pid) / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += map(int, (task / "children").read_text().split())
    except OSError:
        # the process has ended
        return []
    return sorted(found)


def descendants_of(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on."""
    found, seen = children_of(pid), {pid}
    for child in found:
        # a number may be reused meanwhile
        if child not in seen:
            seen.add(child)
            found += children_of(child)
    return sorted(seen - {pid})


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may hold any character."""
    return (_PROCESSES / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
