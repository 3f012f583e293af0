"""What the processes of a run say to one another through its store: that they are alive, and who is missing.

When a process ends, the others lose connections one after the other, and each of those that end for this reason breaks
further ones. So whoever finds out first which process is missing says so in the store, and the others repeat it. The
process that holds the store stays until they have heard it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from torch.distributed.distributed_c10d import Store

from d2v_fast.processes.state import start_of, state_of

# seconds: between two signs of life at most, and how long a question to the store may take
SIGN_S, QUESTION_S = 2.0, 3.0
_POLL_S = 0.05
_MISSING = "missing"


class Missing(NamedTuple):
    """What keeps the others from going on.

    Attributes:
        ranks: those that are missing, or late.
        text: who they are, and what about them.
    """

    ranks: list[int]
    text: str


class Peers:
    """All processes of a run, as one of them sees them.

    Args:
        store: shared by all processes; a connection of its own is made.
        rank, size: of this process, and how many there are.
        sign_s: seconds between two signs of life.
        serves: whether this process holds the store.
        question_s: seconds that a question to the store may take.
    """

    def __init__(
        self, store: Store, rank: int, size: int, sign_s: float, serves: bool, question_s: float = QUESTION_S
    ) -> None:
        self._rank, self._size, self._sign_s, self._serves = rank, size, sign_s, serves
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=question_s))
        self._known: dict[int, dict[str, Any]] = {}
        self._missing: Missing | None = None

    def say(self, arrivals: int, sign: int) -> None:
        """Give a sign of life."""
        about = {
            "pid": os.getpid(),
            "start": start_of(os.getpid()),
            "host": socket.gethostname(),
            "place": _place(),
            "arrivals": arrivals,
            "sign": sign,
        }
        self._store.set(f"watch/{self._rank}", json.dumps(about))

    def hear(self) -> list[dict[str, Any]]:
        """Return what every process has said last."""
        self._known = dict(enumerate(map(json.loads, self._store.multi_get(self._keys("watch")))))
        return list(self._known.values())

    def learn(self, other: Peers) -> None:
        """Take over what another connection of this process has heard."""
        self._known = dict(other._known)
        self._missing = self._missing or other._missing

    @property
    def known_missing(self) -> Missing | None:
        """What was reported to be missing, as far as this process has heard; asks nobody."""
        return self._missing

    def wait_for_all(self, limit: timedelta) -> list[int]:
        """Wait until every process has said something; returns the ranks of those that have not within the limit."""
        try:
            self._store.wait(self._keys("watch"), limit)
        except RuntimeError:
            return self.absent()
        self.hear()
        return []

    def have_all_come(self) -> bool:
        """Whether every process has said something."""
        return bool(self._store.check(self._keys("watch")))

    def absent(self) -> list[int]:
        """Return the ranks that have never said anything."""
        return [rank for rank, key in enumerate(self._keys("watch")) if not self._store.check([key])]

    def reported(self) -> Missing | None:
        """Return what was reported to be missing, by this process or another; None before anything was."""
        if self._missing is None and self._store.check([_MISSING]):
            self._missing = Missing(**json.loads(self._store.get(_MISSING)))
            self._store.set(f"heard/{self._rank}", "")
        return self._missing

    def report(self, found: Missing) -> Missing:
        """Say what is missing; returns that, or what another process has said before.

        The process that holds the store waits until the others have heard it.
        """
        first = self._store.compare_set(_MISSING, "", json.dumps(found._asdict()))
        self._missing = Missing(**json.loads(first))
        if self._serves:
            self._wait_until_heard()
        return self._missing

    @property
    def patience_s(self) -> float:
        """Seconds within which `find_missing` and `report` are through, unless the store does not answer."""
        return 2 * (3 * self._sign_s + 1) + QUESTION_S

    def find_missing(self) -> Missing | None:
        """Find out which process has ended, once a connection has been lost, and report it; None if unknown.

        Raises:
            RuntimeError: the store has gone with the process that holds it.
        """
        if (known := self.reported()) is not None:
            return self.report(known)
        # not missing itself, but about to end for this reason
        self._store.set(f"left/{self._rank}", "")
        ended = self._ended()
        return None if ended is None else self.report(ended)

    def host_missing(self) -> Missing | None:
        """Return that the first process is missing, which holds the store; None where another one holds it."""
        if self._rank == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return None
        about = self._known.get(0)
        if about is not None and _is_here(about) and not _is_dead(about):
            state = state_of(about["pid"])
            return Missing([0], f"{self.names([0])} does not answer{'' if state is None else f': it is {state}'}")
        return self._missing_of([0], "ended, or is cut off; its own message, or the launcher's, says why")

    def names(self, ranks: Sequence[int]) -> str:
        """Name processes by rank, id and host, as far as they are known."""
        shown = [self._name(rank) for rank in ranks[:8]]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _name(self, rank: int) -> str:
        about = self._known.get(rank)
        return f"rank {rank}" if about is None else f"rank {rank} (pid {about['pid']} on {about['host']})"

    def _keys(self, kind: str) -> list[str]:
        return [f"{kind}/{rank}" for rank in range(self._size)]

    def _has(self, kind: str, rank: int) -> bool:
        return bool(self._store.check([f"{kind}/{rank}"]))

    def _ended(self) -> Missing | None:
        """Those that have ended on this machine, or else those on other ones that give no further sign of life."""
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
                and not self._has("left", rank)
                and not (_is_here(self._known.get(rank)) and state_of(self._known[rank]["pid"]) is not None)
            ]
            time.sleep(_POLL_S)
        # those that have left may still be asking
        time.sleep(2 * _POLL_S)


def _place() -> str:
    """The machine, or the part of it, within which process ids mean the same."""
    return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _is_here(about: dict[str, Any] | None) -> bool:
    return about is not None and about.get("place") == _place()


def _is_dead(about: dict[str, Any]) -> bool:
    """Whether a process of this machine has ended, also where its id belongs to another one by now."""
    return _is_here(about) and (state_of(about["pid"]) == "dead" or start_of(about["pid"]) != about["start"])
