"""How far a long preparation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress"]

# seconds: what is done sooner needs no report, and between two lines
QUIET, BETWEEN = 2.0, 30.0


class Progress:
    """A context in which `show` may be called as often as wanted.

    Args:
        what: the work, in a few words.
        total: bytes of the whole.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, max(1, total)
        self._start = time.monotonic()
        self._next = self._start + QUIET
        self._bar: Any = None
        self._task: Any = None
        self._said = False

    def show(self, done: int, detail: str) -> None:
        """Report that `done` bytes are through; costs next to nothing if there was a report just now."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._bar is None and not self._said and sys.stdout.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._task = self._bar.add_task(self._what, total=self._total)
                self._bar.start()
        done = min(done, self._total)
        left = (now - self._start) * (self._total - done) / max(1, done)
        text = f"{self._what}  {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  {detail}  {_minutes(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
            self._next = now + 0.25
        else:
            print(text, flush=True)
            self._said = True
            self._next = now + BETWEEN

    def close(self, text: str) -> None:
        """End with a line, if there was any report."""
        if self._bar is not None:
            self._bar.stop()
        if self._bar is not None or self._said:
            print(f"{self._what}  {text}  in {_minutes(time.monotonic() - self._start)}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except Exception:
        # lines will do
        return None
    return Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), refresh_per_second=4)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
