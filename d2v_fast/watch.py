"""Ends a process that has waited too long for the others, and says which of them it waited for.

A collective that waits for a stopped process, or for one behind a cut cable, says at most that it waited, and some
(those of groups that DeepSpeed makes) wait for half an hour. So every process tells the store of the run how often
it has come to a point where all of them meet, and that it is alive. Who gets no further looks up who does not answer,
or who has not come to that point, and ends with a message.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import Store

# how often progress is looked at within the limit. Looks are counted, not seconds, so that neither a jump of the
# clock nor a run that is suspended as a whole counts as waiting
_LOOKS = 40


class Watch:
    """Two threads: one counts how long nothing has happened here, the other talks to the store, which may hang.

    Args:
        store: shared by all processes; a connection of its own is made.
        rank, size: of this process, and how many there are.
        limit_s: how long this process may get no further.
        end: called with the message from a thread; ends the process.
    """

    def __init__(
        self, store: Store, rank: int, size: int, limit_s: float, end: Callable[[str], None] | None = None
    ) -> None:
        self._rank, self._size, self._limit_s = rank, size, limit_s
        self._end = _end_process if end is None else end
        self._store: Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=max(1.0, limit_s)))
        self._arrivals = 0
        self._looks = self._looks_without_progress = 0
        # what the others said last, and at which look their sign of life was another one
        self._peers: list[dict[str, Any]] = []
        self._changed: list[int] = []
        self._answered = 0
        self._closed = threading.Event()
        # said before the first step: a process that is stopped during its first steps must be known by then, because
        # the others wait for the word of each
        self._say(0)
        for work in (self._count, self._talk):
            threading.Thread(target=work, name="d2v_fast watch", daemon=True).start()

    def arrived(self) -> None:
        """This process has come to a point where it meets the others, and is about to wait for them."""
        self._arrivals += 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _count(self) -> None:
        before = 0
        while not self._closed.wait(self._limit_s / _LOOKS):
            self._looks += 1
            self._looks_without_progress = 0 if self._arrivals != before else self._looks_without_progress + 1
            before = self._arrivals
            if self._looks_without_progress >= _LOOKS:
                self._end(self._diagnosis())
                return

    def _talk(self) -> None:
        sign = 0
        while not self._closed.wait(self._limit_s / _LOOKS):
            sign += 1
            try:
                self._say(sign)
                # what the others say matters only when something is wrong: it is much to ask for in a large run
                if self._looks_without_progress > _LOOKS // 2:
                    self._listen()
                else:
                    self._answered = self._looks
            except RuntimeError:
                # the store has gone with the process that holds it; `_diagnosis` says so when nothing happens any more
                continue

    def _say(self, sign: int) -> None:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "arrivals": self._arrivals, "sign": sign}
        self._store.set(f"watch/{self._rank}", json.dumps(about))

    def _listen(self) -> None:
        keys = [f"watch/{rank}" for rank in range(self._size)]
        peers = [json.loads(text) for text in self._store.multi_get(keys)]
        known = self._peers or [{}] * self._size
        changed = self._changed or [self._looks] * self._size
        self._changed = [
            self._looks if new["sign"] != old.get("sign") else last
            for new, old, last in zip(peers, known, changed, strict=True)
        ]
        self._peers, self._answered = peers, self._looks

    def _diagnosis(self) -> str:
        waited = f"rank {self._rank} got no further for {self._limit_s / 60:.3g} minutes"
        advice = "If that is normal here, raise `d2v.run.timeout_minutes`."
        # a sign of life is due at every look; a quarter of the limit is a long silence
        silence = _LOOKS // 4
        if self._looks - self._answered > silence or not self._peers:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            return f"{waited}: rank 0 ({address}) does not answer: it is stopped, or the network is cut. {advice}"
        silent = [rank for rank in range(self._size) if self._looks - self._changed[rank] > silence]
        if silent:
            return f"{waited}: {self._names(silent)} does not answer: it is stopped, or the network is cut. {advice}"
        furthest = max(peer["arrivals"] for peer in self._peers)
        behind = [rank for rank in range(self._size) if self._peers[rank]["arrivals"] < furthest]
        if behind:
            return f"{waited}: {self._names(behind)} is alive, but does not come to where the others wait. {advice}"
        return f"{waited}, and neither did any other: all are alive and wait, or work, at the same point. {advice}"

    def _names(self, ranks: Sequence[int]) -> str:
        shown = [f"rank {r} (pid {self._peers[r]['pid']} on {self._peers[r]['host']})" for r in ranks[:8]]
        return ", ".join(shown) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _end_process(message: str) -> None:
    # the main thread waits in a collective that no exception reaches
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)
