"""End a process that has waited too long for the others, and name those that it waited for.

A collective that waits for a stopped or unreachable process at most reports that it waited, and some (in groups that
DeepSpeed makes) wait for half an hour. So every process writes to the store of the run that it is alive, and how many
collectives it has come to. A blocked process finds out which peers are dead or late, names them in its error, and
exits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from d2v_fast.distributed.peers import SIGN_S, About, Missing, Peers
from d2v_fast.processes.idle import LOOKS, clock, end_process, late

_ADVICE = "If that is normal here, raise `d2v.run.timeout_minutes`."


class Watch:
    """Two threads: one measures how long this process makes no progress, the other talks to the store, which may hang.

    Args:
        store: Shared by all processes; the watch opens its own connections.
        rank, size: Rank of this process, and number of processes.
        limit_s: Seconds that this process may make no progress.
        end: Ends the process; a thread calls it with the message.
        serves: Whether this process serves the store.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        limit_s: float,
        end: Callable[[str], None] | None = None,
        serves: bool = False,
    ) -> None:
        self._rank, self._size, self._limit_s = rank, size, limit_s
        self._end = end_process if end is None else end
        self._sign_s = min(limit_s / LOOKS, SIGN_S)
        # the talking thread has its own connection, because it may hang
        self._talking = Peers(store, rank, size, self._sign_s, serves, question_s=max(1.0, limit_s))
        self._asking = Peers(store, rank, size, self._sign_s, serves)
        self._arrivals, self._is_meeting = 0, False
        self._looks = self._looks_without_progress = 0
        self._stopped_s, self._looks_since_stop = 0.0, 0
        # the last signs of life, and the look at which each of them last changed
        self._peers: list[About] = []
        self._changed: list[int] = []
        self._answered = 0
        self._closed = threading.Event()
        # written before the first step, because the others wait for a sign of life of each process
        self._talking.say(0, 0)
        for work in (self._count, self._talk):
            threading.Thread(target=work, name="d2v_fast watch", daemon=True).start()

    def arrived(self) -> None:
        """Count that this process has come to a collective, and may have to wait there."""
        self._arrivals += 1

    def wait_for_all(self) -> str | None:
        """Wait until every process has come; return a clause that names those that have not within the limit.

        Raises:
            RuntimeError: The store is gone.
        """
        # this wait has the same limit
        self._is_meeting = True
        try:
            absent = self._asking.wait_for_all(timedelta(seconds=self._limit_s))
            if not absent:
                return None
            text = f"{self._asking.names(absent)} {'has' if len(absent) == 1 else 'have'} not come"
            # the process that serves the store waits until the others have read it
            return self._asking.report(Missing(absent, text)).text
        finally:
            self._is_meeting = False

    def missing(self) -> str | None:
        """Return a clause that names the missing process after a connection was lost, and report it to the others.

        None if it cannot be found out.
        """
        found = self._within(self._asking.find_missing, self._asking.patience_s)
        if found is None:
            # the store may not answer
            found = self._asking.known_missing or self._asking.host_missing()
        itself = ""
        if self._stopped_s and self._looks_since_stop < LOOKS:
            itself = f"this process was stopped for about {self._stopped_s:.0f} s, and the others may not have waited"
        if found is not None and self._rank in found.ranks:
            return itself or "the others have ended, for this process was stopped, cut off or late for too long"
        return "; ".join(part for part in (found.text if found is not None else "", itself) if part) or None

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _count(self) -> None:
        before, last, interval_s = 0, clock(), self._limit_s / LOOKS
        while not self._closed.wait(interval_s):
            now = clock()
            self._looks += 1
            self._looks_since_stop += 1
            if late(last, now, interval_s):
                # the others may have been stopped as well, and need time to come back
                self._stopped_s, self._looks_since_stop = now - last, 0
            advanced = self._arrivals != before or self._is_meeting or self._looks_since_stop == 0
            self._looks_without_progress = 0 if advanced else self._looks_without_progress + 1
            before, last = self._arrivals, now
            if self._looks_without_progress >= LOOKS:
                self._end(self._message())
                return

    def _talk(self) -> None:
        sign, heard_at = 0, -1
        while not self._closed.wait(self._sign_s):
            sign += 1
            try:
                self._talking.say(self._arrivals, sign)
                self._talking.reported()
                # read the others only if something may be wrong: it is a large request in a large run
                if self._looks_without_progress <= LOOKS // 2 and self._peers:
                    self._answered = self._looks
                elif heard_at != self._looks and self._talking.have_all_come():
                    heard_at = self._looks
                    self._listen()
            except dist.DistNetworkError:
                # the process that serves the store has ended; `_message` reports it at the limit
                return
            except RuntimeError:
                # it may answer later
                continue

    def _listen(self) -> None:
        peers = self._talking.hear()
        self._asking.learn(self._talking)
        known: list[int | None] = [peer["sign"] for peer in self._peers] or [None] * self._size
        changed = self._changed or [self._looks] * self._size
        self._changed = [
            self._looks if peer["sign"] != sign else last
            for peer, sign, last in zip(peers, known, changed, strict=True)
        ]
        self._peers, self._answered = peers, self._looks

    def _message(self) -> str:
        waited = f"rank {self._rank} got no further for {self._limit_s / 60:.3g} minutes"
        found = self._talking.known_missing or self._find_late()
        if found is None:
            return f"{waited}, and neither did any other: all are alive and wait, or work, at the same point. {_ADVICE}"
        report = partial(self._asking.report, found)
        found = self._within(report, self._asking.patience_s) or found
        return f"{waited}: {found.text}. {_ADVICE}"

    def _within(self, ask: Callable[[], Missing | None], limit_s: float) -> Missing | None:
        """Return the answer to a request to the store; None if the store does not answer, or is gone."""
        answers: list[Missing | None] = []

        def work() -> None:
            with suppress(RuntimeError):
                answers.append(ask())

        # a stopped store never answers some requests
        thread = threading.Thread(target=work, name="d2v_fast question", daemon=True)
        thread.start()
        thread.join(limit_s)
        return answers[0] if answers else None

    def _find_late(self) -> Missing | None:
        """Return the processes that do not answer, or else those that have not come to this collective."""
        gone = "does not answer: it is stopped, or the network is cut"
        # a sign of life is due at every look; a quarter of the limit is a long silence
        silence = LOOKS // 4
        if self._looks - self._answered > silence or not self._peers:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return Missing([0], f"rank 0 ({address}) {gone}")
        silent = [rank for rank in range(self._size) if self._looks - self._changed[rank] > silence]
        if silent:
            return Missing(silent, f"{self._asking.names(silent)} {gone}")
        furthest = max(peer["arrivals"] for peer in self._peers)
        behind = [rank for rank in range(self._size) if self._peers[rank]["arrivals"] < furthest]
        if behind:
            late_ones = f"{self._asking.names(behind)} is alive, but does not come to where the others wait"
            return Missing(behind, late_ones)
        return None
