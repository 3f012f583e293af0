"""Measure the parts of a step. Each measurement waits for the device, so it needs `--profile`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict, TypeVar

import torch

Item = TypeVar("Item")

PARTS = (
    "data",
    "teacher forward",
    "student forward",
    "target + loss",
    "backward",
    "optimizer",
    "EMA",
    "everything else",
)
# a captured step is two graphs, whose parts cannot be measured
CAPTURED_PARTS = ("data", "captured micro-steps", "captured update", "everything else")
# steps that fill caches and start workers
_WARMUP_STEPS = 3


class Report(TypedDict):
    """Content of `profile.json`."""

    steps: int
    ms_per_step: dict[str, float]
    percent: dict[str, float]


class StepClock:
    """Accumulates the seconds of each part of a step; does nothing unless `enabled`.

    Args:
        device: Device of the model.
        enabled: Whether to measure.
        parts: Names of the parts; the last is what no other part counts.
    """

    def __init__(self, device: torch.device, enabled: bool, parts: Sequence[str] = PARTS) -> None:
        self.enabled, self._parts = enabled, parts
        self._device = device
        self._num_steps, self._num_measured = 0, 0
        self._step_started = 0.0
        # seconds of this step, and of all measured steps
        self._current, self._seconds = dict.fromkeys(parts, 0.0), dict.fromkeys(parts, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for this part."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._current[name] += self._now() - started

    def each(self, items: Iterable[Item], name: str) -> Iterator[Item]:
        """Iterate, and count the time until each item arrives for this part."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def end_step(self) -> None:
        """End a step, and count the time outside all parts as "everything else"."""
        if not self.enabled:
            return
        now = self._now()
        if self._num_steps >= _WARMUP_STEPS:
            self._current["everything else"] = now - self._step_started - sum(self._current.values())
            for part, seconds in self._current.items():
                self._seconds[part] += seconds
            self._num_measured += 1
        self._current = dict.fromkeys(self._parts, 0.0)
        self._step_started = now
        self._num_steps += 1

    def report(self) -> Report:
        """Return the milliseconds per step and the percentage of the step, by part."""
        steps, total = max(1, self._num_measured), sum(self._seconds.values()) or 1.0
        return {
            "steps": self._num_measured,
            "ms_per_step": {part: 1e3 * seconds / steps for part, seconds in self._seconds.items()},
            "percent": {part: 100 * seconds / total for part, seconds in self._seconds.items()},
        }

    def __str__(self) -> str:
        report = self.report()
        width = max(map(len, self._parts))
        lines = [f"share of a step, over {report['steps']} steps:"]
        for part in self._parts:
            lines.append(f"  {part:{width}} {report['ms_per_step'][part]:9.2f} ms {report['percent'][part]:6.1f} %")
        return "\n".join(lines)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
