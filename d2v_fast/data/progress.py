"""Report the progress of a long task: a bar on a terminal, and occasional lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Progress", "TimeLeft", "duration"]

# seconds before the first report, and between two lines
QUIET, BETWEEN = 2.0, 30.0
# the time left is shown after this fraction of the task, or after this many seconds of progress
KNOWN_SHARE, KNOWN_SECONDS = 0.01, 10.0


def duration(seconds: float) -> str:
    """Format a duration as 2:03, as 1:02:03 from an hour on, and as `4 days 5 h` from 48 hours on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        days, hours = divmod(round(seconds / 3600), 24)
        return f"{days} days {hours} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TimeLeft:
    """Estimate the time left from the pace since the first report.

    Args:
        total: size of the whole task, in any unit.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] = (0.0, 0)

    def report(self, done: int) -> None:
        """Record that `done` of the total are finished."""
        self._last = (time.monotonic(), done)
        if self._first is None:
            self._first = self._last

    def __str__(self) -> str:
        """Return two spaces and the time left, or "" while it is unknown."""
        if self._first is None:
            return ""
        seconds, done = self._last[0] - self._first[0], self._last[1] - self._first[1]
        if done <= 0 or (done < max(3, KNOWN_SHARE * self._total) and seconds < KNOWN_SECONDS):
            return ""
        return f"  {duration(seconds * (self._total - self._last[1]) / done)} left"


class Progress:
    """A context manager that reports progress. `show` limits its own rate, so call it as often as convenient.

    Args:
        what: the work, in a few words.
        total: size of the task in bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, max(1, total)
        self._start = time.monotonic()
        self._left = TimeLeft(self._total)
        self._left.report(0)
        self._next = self._start + QUIET
        self._bar: Any = None
        self._task: Any = None
        self._said = False

    def show(self, done: int, detail: str) -> None:
        """Report that `done` bytes are finished, unless the last report was recent."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._bar is None and not self._said and sys.stdout.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._task = self._bar.add_task(self._what, total=self._total)
                self._bar.start()
        done = min(done, self._total)
        self._left.report(done)
        text = f"{self._what}  {_megabytes(done)} of {_megabytes(self._total)} MB  {detail}{self._left}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
            self._next = now + 0.25
        else:
            print(text, flush=True)
            self._said = True
            self._next = now + BETWEEN

    def close(self, text: str) -> None:
        """Print a last line, if anything was reported before."""
        if self._bar is not None:
            self._bar.stop()
        if self._bar is not None or self._said:
            print(f"{self._what}  {text}  in {duration(time.monotonic() - self._start)}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _megabytes(num_bytes: float) -> str:
    """Format bytes as MB, with two significant digits below ten."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 9.5 or not num_bytes else f"{megabytes:.2g}"


def _rich_bar() -> Any:
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except Exception:
        # print lines instead
        return None
    return Progress(BarColumn(bar_width=20), TextColumn("{task.description}"), refresh_per_second=4)
