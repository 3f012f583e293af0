"""Ctrl-C and its kin: the step is finished and saved before the run ends."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

# a signal that comes this soon after the last one is the same request: launchers pass on what the terminal sent
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Set by Ctrl-C, SIGTERM and SIGUSR1 while it is entered; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._last = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested and now - self._last > _SAME_REQUEST_S:
            os._exit(128 + number)
        self.requested, self._last = True, now
