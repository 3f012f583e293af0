"""Ends a process that has waited too long for the others, and says which of them it waited for.

A collective that waits for a stopped process, or for one behind a cut cable, says at most that it waited, and some
(those of groups that DeepSpeed makes) wait for half an hour. So every process tells the store of the run how often
it has come to a point where all of them meet, and that it is alive. A blocked process finds out which peers are missing
or late, names them in its error, and exits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from d2v_fast.distributed.peers import SIGN_S, Missing, Peers
from d2v_fast.processes.idle import LOOKS, clock, end_process, late

_ADVICE = "If that is normal here, raise `d2v.run.timeout_minutes`."


class Watch:
    """Two threads: one counts how long nothing has happened here, the other talks to the store, which may hang.

    Args:
        store: shared by all processes; connections of its own are made.
        rank, size: of this process, and how many there are.
        limit_s: how long this process may get no further.
        end: called with the message from a thread; ends the process.
        serves: whether this process holds the store.
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
        # one is for the thread that talks: it may hang while the others ask
        self._talking = Peers(store, rank, size, self._sign_s, serves, question_s=max(1.0, limit_s))
        self._asking = Peers(store, rank, size, self._sign_s, serves)
        self._arrivals, self._is_meeting = 0, False
        self._looks = self._looks_without_progress = 0
        self._stopped_s, self._looks_since_stop = 0.0, 0
        # what the others said last, and at which look their sign of life was another one
        self._peers: list[dict[str, Any]] = []
        self._changed: list[int] = []
        self._answered = 0
        self._closed = threading.Event()
        # said before the first step: a process that is stopped during its first steps must be known by then, because
        # the others wait for the word of each
        self._talking.say(0, 0)
        for work in (self._count, self._talk):
            threading.Thread(target=work, name="d2v_fast watch", daemon=True).start()

    def arrived(self) -> None:
        """This process has come to a point where it meets the others, and is about to wait for them."""
        self._arrivals += 1

    def wait_for_all(self) -> str | None:
        """Wait until every process has come; returns which have not within the limit, as a sentence without its end.

        Raises:
            RuntimeError: the store is gone.
        """
        # this wait has the same limit
        self._is_meeting = True
        try:
            absent = self._asking.wait_for_all(timedelta(seconds=self._limit_s))
            if not absent:
                return None
            text = f"{self._asking.names(absent)} {'has' if len(absent) == 1 else 'have'} not come"
            # the process that holds the store waits until the others have heard it
            return self._asking.report(Missing(absent, text)).text
        finally:
            self._is_meeting = False

    def missing(self) -> str | None:
        """Return which process is missing, as a sentence without its end, once a connection to it has been lost.

        What is found is told to the others. None where it cannot be found out.
        """
        found = self._within(self._asking.find_missing, self._asking.patience_s)
        if found is None:
            # or else the store does not answer
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
                # the others were stopped as well, or need time to come back, or are gone
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
                # what the others say matters only when something is wrong: it is much to ask for in a large run
                if self._looks_without_progress <= LOOKS // 2 and self._peers:
                    self._answered = self._looks
                elif heard_at != self._looks and self._talking.have_all_come():
                    heard_at = self._looks
                    self._listen()
            except dist.DistNetworkError:
                # the store has gone with the process that holds it; `_message` says so when nothing happens any more
                return
            except RuntimeError:
                # it may answer later
                continue

    def _listen(self) -> None:
        peers = self._talking.hear()
        self._asking.learn(self._talking)
        known = self._peers or [{}] * self._size
        changed = self._changed or [self._looks] * self._size
        self._changed = [
            self._looks if new["sign"] != old.get("sign") else last
            for new, old, last in zip(peers, known, changed, strict=True)
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
        """What a question to the store gives; None also where the store does not answer, or is gone."""
        answers: list[Missing | None] = []

        def work() -> None:
            with suppress(RuntimeError):
                answers.append(ask())

        # a store that is stopped holds some questions for ever
        thread = threading.Thread(target=work, name="d2v_fast question", daemon=True)
        thread.start()
        thread.join(limit_s)
        return answers[0] if answers else None

    def _find_late(self) -> Missing | None:
        """Those that do not answer, or else those that have not come to where this process waits."""
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
