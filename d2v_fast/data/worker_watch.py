"""Ends loader workers from which a batch has been awaited for too long.

A worker that stops after it has queued a batch holds the main process in a system call: the batch lies in memory whose
handle the worker passes on only when it is asked. No time-out of torch's `DataLoader` covers that. When the worker
ends, the system call fails, and the main process gets an error that it can report.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from d2v_fast.processes.idle import LOOKS, alive, clock, late
from d2v_fast.processes.state import state_of

__all__ = ["WorkerWatch"]


class WorkerWatch:
    """A thread that counts how long the main thread has awaited one batch.

    Args:
        iterator: of a `DataLoader` with worker processes.
        limit_s: seconds; 0 waits for ever.
    Attributes:
        problem: which worker gave no batch, once that has taken too long, else None.
    """

    def __init__(self, iterator: Any, limit_s: float) -> None:
        self._iterator, self._limit_s = iterator, limit_s
        self._batch, self._is_awaited = 0, False
        self._closed = threading.Event()
        self.problem: str | None = None
        if limit_s > 0:
            threading.Thread(target=self._watch, name="d2v_fast workers", daemon=True).start()

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Count the time that the block takes."""
        self._batch += 1
        self._is_awaited = True
        try:
            yield
        finally:
            self._is_awaited = False

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def dead(self) -> str | None:
        """Return which workers have ended without being asked, as a phrase; None where all live."""
        return self._named("dead")

    def _watch(self) -> None:
        interval_s = self._limit_s / LOOKS
        looks, batch, last = 0, self._batch, clock()
        while not self._closed.wait(interval_s):
            now = clock()
            if not self._is_awaited or batch != self._batch or late(last, now, interval_s):
                looks, batch = 0, self._batch
            else:
                looks += 1
                # this wait has a limit of its own
                alive()
            last = now
            if looks >= LOOKS:
                self.problem = self._diagnosis()
                self._expect_deaths()
                for worker in self._iterator._workers:
                    worker.kill()
                return

    def _expect_deaths(self) -> None:
        """Take the workers off the list of those whose death torch raises wherever the main thread is at that moment.

        It would take the place of `problem`. Their death is noticed where the batch is awaited.
        """
        if getattr(self._iterator, "_worker_pids_set", False):
            self._iterator._worker_pids_set = False
            torch._C._remove_worker_pids(id(self._iterator))

    def _diagnosis(self) -> str:
        waited = f"A data loader worker gave no batch for {self._limit_s:g} s"
        for state in ("stopped", "dead", "waiting for a disk or a network file system"):
            if (named := self._named(state)) is not None:
                return f"{waited}: {named}."
        due = self._due()
        which = "" if due is None else f" ({self._name(due)} is due)"
        return f"{waited}{which}: a slow or hung disk, or a damaged file."

    def _named(self, state: str) -> str | None:
        found = [i for i, worker in enumerate(self._iterator._workers) if state_of(worker.pid) == state]
        if not found:
            return None
        return f"{', '.join(map(self._name, found))} {'is' if len(found) == 1 else 'are'} {state}"

    def _name(self, index: int) -> str:
        return f"worker {index} (pid {self._iterator._workers[index].pid})"

    def _due(self) -> int | None:
        """The worker that has to give the next batch; torch has no public way to ask."""
        tasks: dict[int, tuple[int, ...]] = getattr(self._iterator, "_task_info", {})
        task = tasks.get(getattr(self._iterator, "_rcvd_idx", -1))
        return None if task is None else task[0]
