"""End loader workers that take too long to return a batch.

A worker that is suspended after it has queued a batch blocks the main process in a system call, because the worker
still has to send the handle of the batch's shared memory. No timeout of torch's `DataLoader` covers that. When the
worker is killed, the system call fails, and the main process can report an error.
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
    """A thread that measures how long the main thread waits for a batch, and kills the workers after a limit.

    Args:
        iterator: Iterator of a `DataLoader` with worker processes.
        limit_s: Limit in seconds; 0 means no limit.
    Attributes:
        problem: A sentence about the worker that returned no batch in time; None if there is none.
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
        """Limit the time that the block takes."""
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
        """Return a phrase that names the workers that have died; None if all are alive."""
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
                # reset the idle watch, since this wait has its own limit
                alive()
            last = now
            if looks >= LOOKS:
                self.problem = self._diagnosis()
                self._expect_deaths()
                for worker in self._iterator._workers:
                    worker.kill()
                return

    def _expect_deaths(self) -> None:
        """Stop torch from raising an error about the workers' deaths at an arbitrary point of the main thread.

        That error would replace `problem`. The code that waits for the batch notices their deaths itself.
        """
        if getattr(self._iterator, "_worker_pids_set", False):
            self._iterator._worker_pids_set = False
            torch._C._remove_worker_pids(id(self._iterator))

    def _diagnosis(self) -> str:
        waited = f"A data loader worker returned no batch for {self._limit_s:g} s"
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
        """Return the index of the worker that has to return the next batch; torch has no public interface for it."""
        tasks: dict[int, tuple[int, ...]] = getattr(self._iterator, "_task_info", {})
        task = tasks.get(getattr(self._iterator, "_rcvd_idx", -1))
        return None if task is None else task[0]
