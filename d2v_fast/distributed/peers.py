"""Signs of life and reports of missing processes, exchanged through the store of a run.

When a process ends, the others lose connections one after the other, and each one that ends for this reason breaks
further connections. So the first process that finds out which one is missing reports it in the store, and the others
repeat that report. The process that serves the store stays until they have read it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, TypedDict

from torch.distributed.distributed_c10d import Store

from d2v_fast.processes.state import start_of, state_of

# seconds: the longest time between two signs of life, and the timeout of a request to the store
SIGN_S, QUESTION_S = 2.0, 3.0
_POLL_S = 0.05
_MISSING = "missing"


class About(TypedDict):
    """A process's last sign of life.

    Attributes:
        pid: Its process id.
        start: Start time of that process, which tells it from a later one with the same id.
        host: Name of its machine.
        place: Machine and PID namespace, within which process ids are comparable.
        arrivals: How often it has come to a collective.
        sign: Counter of its signs of life.
    """

    pid: int
    start: int | None
    host: str
    place: str
    arrivals: int
    sign: int


class Missing(NamedTuple):
    """The processes that the others wait for.

    Attributes:
        ranks: Ranks of the missing or late processes.
        text: Their names and what is wrong with them.
    """

    ranks: list[int]
    text: str


class Peers:
    """All processes of a run, as one of them sees them.

    Args:
        store: Shared by all processes; this object opens its own connection.
        rank, size: Rank of this process, and number of processes.
        sign_s: Seconds between two signs of life.
        serves: Whether this process serves the store.
        question_s: Timeout of a request to the store, in seconds.
    """

    def __init__(
        self, store: Store, rank: int, size: int, sign_s: float, serves: bool, question_s: float = QUESTION_S
    ) -> None:
        self._rank, self._size, self._sign_s, self._serves = rank, size, sign_s, serves
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=question_s))
        self._known: dict[int, About] = {}
        self._missing: Missing | None = None

    def say(self, arrivals: int, sign: int) -> None:
        """Write a sign of life to the store."""
        about: About = {
            "pid": os.getpid(),
            "start": start_of(os.getpid()),
            "host": socket.gethostname(),
            "place": _place(),
            "arrivals": arrivals,
            "sign": sign,
        }
        self._store.set(f"watch/{self._rank}", json.dumps(about))

    def hear(self) -> list[About]:
        """Return the last sign of life of every process."""
        self._known = dict(enumerate(map(json.loads, self._store.multi_get(self._keys()))))
        return list(self._known.values())

    def learn(self, other: Peers) -> None:
        """Copy what another connection of this process has read."""
        self._known = dict(other._known)
        self._missing = self._missing or other._missing

    @property
    def known_missing(self) -> Missing | None:
        """The report that this process has read before, if any. The store is not asked."""
        return self._missing

    def wait_for_all(self, limit: timedelta) -> list[int]:
        """Wait for a sign of life of every process; return the ranks without one within the limit."""
        try:
            self._store.wait(self._keys(), limit)
        except RuntimeError:
            return self.absent()
        self.hear()
        return []

    def have_all_come(self) -> bool:
        """Return whether every process has given a sign of life."""
        return bool(self._store.check(self._keys()))

    def absent(self) -> list[int]:
        """Return the ranks that have never given a sign of life."""
        return [rank for rank, key in enumerate(self._keys()) if not self._store.check([key])]

    def reported(self) -> Missing | None:
        """Return the report of a missing process, by this process or another; None if there is none."""
        if self._missing is None and self._store.check([_MISSING]):
            self._missing = Missing(**json.loads(self._store.get(_MISSING)))
            self._store.set(f"heard/{self._rank}", "")
        return self._missing

    def report(self, found: Missing) -> Missing:
        """Report a missing process; return this report, or an earlier one of another process.

        The process that serves the store waits until the others have read it.
        """
        if self._missing is None:
            first = self._store.compare_set(_MISSING, "", json.dumps(found._asdict()))
            self._missing = Missing(**json.loads(first))
            # after it this process may not ask again: the one that serves the store may end
            self._store.set(f"heard/{self._rank}", "")
        if self._serves:
            self._wait_until_heard()
        return self._missing

    @property
    def patience_s(self) -> float:
        """Longest duration of `find_missing` and `report` in seconds, if the store answers."""
        return 2 * (3 * self._sign_s + 1) + QUESTION_S

    def find_missing(self) -> Missing | None:
        """Find out which process has ended after a connection was lost, and report it; None if unknown.

        Raises:
            RuntimeError: The process that served the store has ended.
        """
        if (known := self.reported()) is not None:
            return self.report(known)
        # this process is about to end too, but is not the cause
        self._store.set(f"left/{self._rank}", "")
        ended = self._ended()
        return None if ended is None else self.report(ended)

    def host_missing(self) -> Missing | None:
        """Return that the first process, which serves the store, is missing; None if another one serves it."""
        if self._rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return None
        about = self._known.get(0)
        if about is not None and _is_here(about) and not _is_dead(about):
            state = state_of(about["pid"])
            return Missing([0], f"{self.names([0])} does not answer{'' if state is None else f': it is {state}'}")
        return self._missing_of([0], "ended, or is cut off; its own message, or the launcher's, says why")

    def names(self, ranks: Sequence[int]) -> str:
        """Return the rank, process id and host of processes, as far as they are known."""
        shown = [self._name(rank) for rank in ranks[:8]]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _name(self, rank: int) -> str:
        about = self._known.get(rank)
        return f"rank {rank}" if about is None else f"rank {rank} (pid {about['pid']} on {about['host']})"

    def _keys(self) -> list[str]:
        return [f"watch/{rank}" for rank in range(self._size)]

    def _has(self, kind: str, rank: int) -> bool:
        return bool(self._store.check([f"{kind}/{rank}"]))

    def _ended(self) -> Missing | None:
        """Return the processes of this machine that have ended, or else silent ones of other machines."""
        deadline = time.monotonic() + 3 * self._sign_s + 1
        first = self.hear()
        while True:
            if (known := self.reported()) is not None:
                return known
            now = self.hear()
            others = [rank for rank in range(self._size) if rank != self._rank]
            dead = [rank for rank in others if _is_dead(now[rank]) and not self._has("left", rank)]
            if not dead and time.monotonic() > deadline:
                dead = [
                    rank
                    for rank in others
                    if not _is_here(now[rank])
                    and now[rank]["sign"] == first[rank]["sign"]
                    and not self._has("left", rank)
                ]
                if not dead:
                    return None
            if dead:
                return self._missing_of(dead, "ended; its own message, or the launcher's, says why")
            time.sleep(_POLL_S)

    def _missing_of(self, ranks: list[int], what: str) -> Missing:
        return Missing(ranks, f"{self.names(ranks)} {'has' if len(ranks) == 1 else 'have'} {what}")

    def _wait_until_heard(self) -> None:
        deadline = time.monotonic() + 3 * self._sign_s + 1
        waiting = [rank for rank in range(self._size) if rank != self._rank]
        while waiting and time.monotonic() < deadline:
            waiting = [
                rank
                for rank in waiting
                if not self._has("heard", rank)
                and not (_is_here(self._known.get(rank)) and state_of(self._known[rank]["pid"]) is not None)
            ]
            time.sleep(_POLL_S)


def _place() -> str:
    """Return the machine and PID namespace, within which process ids are comparable."""
    return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _is_here(about: About | None) -> bool:
    return about is not None and about.get("place") == _place()


def _is_dead(about: About) -> bool:
    """Return whether a process of this machine has ended, even if another one has its id by now."""
    return _is_here(about) and (state_of(about["pid"]) == "dead" or start_of(about["pid"]) != about["start"])
