"""The line that the holder of a lock writes into it, and what that line tells about the holder."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path

from d2v_fast.files.reading import printable
from d2v_fast.processes.state import state_of

_RECORD = re.compile(r"pid (\d{1,10}) on (\S+)")
_LONGEST_COMMAND, _LONGEST_RECORD = 200, 400


def own_record() -> str:
    """Return the line that this process writes into a lock: its number, host, time and command."""
    command = shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    if len(command) > _LONGEST_COMMAND:
        command = f"{command[: _LONGEST_COMMAND - 3]}..."
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return printable(f"pid {os.getpid()} on {os.uname().nodename} since {since} UTC: {command}")


class Holder:
    """The process that wrote its `own_record` into a lock.

    Attributes:
        pid: number of the process; None if it is unknown or the process runs on another machine.
    """

    def __init__(self, record: str) -> None:
        self._record = printable(record.strip()[:_LONGEST_RECORD])
        found = _RECORD.match(self._record)
        self.pid = int(found[1]) if found is not None and found[2] == os.uname().nodename else None
        self._host = found[2] if found is not None else None

    def __str__(self) -> str:
        if not self._record:
            return "a process that left no record"
        state = None if self.pid is None else state_of(self.pid)
        return self._record if state is None else f"{self._record} ({self._word(state)})"

    def remedy(self) -> str:
        """Return what the user can do about the process, as a sentence without its period."""
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
