"""Ctrl-C and its kin: the step is finished and saved before the run ends."""

from __future__ import annotations

import os
import signal
import time

# a signal that comes this soon after the last one is the same request: launchers pass on what the terminal sent
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Set by Ctrl-C, SIGTERM and SIGUSR1: the step is finished and saved first. A second signal ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._last = 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested and now - self._last > _SAME_REQUEST_S:
            os._exit(128 + number)
        self.requested, self._last = True, now
