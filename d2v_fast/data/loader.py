"""Loads micro-batches with masks in worker processes and groups them into optimizer steps.

Everything random depends on (seed, epoch, sample id), so the batches do not depend on the number of workers, and a
resumed run needs only the step number.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from d2v_fast.data.bad_files import BadFiles
from d2v_fast.data.batch import Batch, MicroBatch, Step
from d2v_fast.data.makers import BatchMaker
from d2v_fast.data.order import MicroStep, StepOrder
from d2v_fast.data.worker_watch import WorkerWatch
from d2v_fast.errors import DataError
from d2v_fast.processes.idle import LOOKS

if TYPE_CHECKING:
    from d2v_fast.config import DataSection

__all__ = ["StepLoader", "worker_died"]

# batches up to this size are prefetched deeper, so that a step never waits for a worker
SMALL_BATCH_BYTES = 1 << 20
PREFETCH_SMALL, PREFETCH_LARGE = 8, 2

# how long a worker outlives SIGTERM, so that the main process can finish its step and save
GRACE_SECONDS = 60
# held back from workers until they can handle them
_HELD = (signal.SIGINT, signal.SIGTERM)


class StepLoader:
    """Iterates over the optimizer steps of one process.

    Args:
        maker: the `BatchMaker` of the data set, as `batch_maker` returns it.
        order: which samples form which step, on which process; batches are drawn with its seed.
        config: the `d2v.data` section: number of workers and limits for unreadable files.
        pin_memory: whether batches are in page-locked memory, for copies to a GPU.
        device: where the inputs of batches are moved to and normalized; what the host still needs stays there. The copy
            to a GPU runs on a stream of its own, beside the kernels of the step before. None: the host.
        timeout_s: seconds without a batch after which a worker counts as hung; 0 waits forever.
        on_bad: called once per unreadable file, with `path: reason`.
    Raises:
        DataError: shared memory is too small for the workers; or, while iterating, more than `max_bad_fraction` of the
            files are unreadable (with `strict`, one is), or a worker dies or hangs.

    Attributes:
        order: as given.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order: StepOrder,
        config: DataSection,
        *,
        pin_memory: bool = False,
        device: torch.device | None = None,
        timeout_s: float = 0.0,
        on_bad: Callable[[str], None] = lambda file: None,
    ) -> None:
        self.order = order
        self._maker = _Micro(maker, order.seed)
        self._num_workers = config.num_workers
        self._pin_memory, self._timeout_s = pin_memory, timeout_s
        self._device = device
        self._bytes = order.split.micro_batch * maker.sample_bytes
        self._prefetch = PREFETCH_SMALL if self._bytes <= SMALL_BATCH_BYTES else PREFETCH_LARGE
        self._bad = BadFiles(config, maker, on_bad)
        if self._num_workers > 0:
            _check_shared_memory(self._num_workers * self._prefetch * self._bytes, self._num_workers)
        # compile the mask sampler once here, and not in every worker
        maker.warm_up()

    @property
    def bad_files(self) -> tuple[str, ...]:
        """The unreadable files that this process has met, as `path: reason`."""
        return tuple(self._bad.files)

    def __iter__(self) -> Iterator[Step]:
        # a worker that gets a signal before `_init_worker` would die of it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        try:
            iterator = iter(self._data_loader())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        stop = functools.partial(_stop_workers, iterator)
        # an interpreter that exits while the iteration is suspended would wait for its workers
        atexit.register(stop)
        place = _placer(self._device)
        try:
            batches: list[Batch] = []
            for made in _micro_batches(iterator, self._timeout_s if self._num_workers else 0):
                if isinstance(made, DataError):
                    raise made
                self._bad.add(made.batch)
                batches.append(place(made.batch))
                if len(batches) == self.order.split.accumulation:
                    yield Step(batches, made.step_rows)
                    batches = []
        finally:
            atexit.unregister(stop)
            stop()

    def _data_loader(self) -> DataLoader[Any]:
        options: dict[str, Any] = {}
        if self._num_workers > 0:
            options = {
                "worker_init_fn": _init_worker,
                "prefetch_factor": self._prefetch,
                # torch's timeout only wakes the main thread: `WorkerWatch` counts
                "timeout": self._timeout_s / LOOKS,
            }
        return DataLoader(
            self._maker,
            batch_size=None,
            sampler=self.order,
            collate_fn=_as_is,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # its own, so that torch's global generator is not used
            generator=torch.Generator(),
            **options,
        )


def _placer(device: torch.device | None) -> Callable[[Batch], Batch]:
    """Return a function that normalizes the inputs of a batch, on a GPU after a copy beside the running kernels."""
    if device is None or device.type != "cuda":
        return lambda batch: batch.with_inputs(lambda tensor: tensor)
    stream = torch.cuda.Stream(device)

    def place(batch: Batch) -> Batch:
        running = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            placed = batch.with_inputs(lambda tensor: tensor.to(device, non_blocking=True))
        # the device waits for the copy, and the host does not
        running.wait_stream(stream)
        for tensor in (placed.inputs, placed.masked_inputs):
            if tensor is not None:
                # its memory is of the other stream, which must not use it again too early
                tensor.record_stream(running)
        return placed

    return place


class _Micro(TorchDataset):
    """Makes one micro-batch, in a worker."""

    def __init__(self, maker: BatchMaker, seed: int) -> None:
        self._maker, self._seed = maker, seed

    def __getitem__(self, micro: MicroStep) -> MicroBatch | DataError:
        try:
            return self._maker.make(micro, self._seed)
        except DataError as error:
            # the main process raises it: a worker's exception would arrive as the text of a traceback
            return error


def _as_is(made: Any) -> Any:
    return made


def _init_worker(worker_id: int) -> None:
    # Ctrl-C and SIGTERM often reach every process of a run; only the main process decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def worker_died(error: Exception) -> str | None:
    """Return a message for the user if `error` reports the death of a loader worker, and None otherwise.

    torch raises that error in a signal handler, so it can come from any line of the main process.
    """
    text = str(error)
    if "killed by signal" not in text and "exited unexpectedly" not in text:
        return None
    return _advice(text.strip())


def _advice(died: str) -> str:
    return (
        f"A data loader worker died, often for lack of memory: lower `d2v.data.num_workers`, or set it to 0. ({died})"
    )


def _micro_batches(iterator: Iterator[MicroBatch | DataError], timeout_s: float) -> Iterator[MicroBatch | DataError]:
    """Yield the items of a `DataLoader`.

    Raises:
        DataError: a worker died, or made nothing for `timeout_s` seconds (0 waits forever).
    """
    if not hasattr(iterator, "_workers"):
        yield from iterator
        return
    watch = WorkerWatch(iterator, timeout_s)
    try:
        while True:
            try:
                with watch.awaiting():
                    made = _next(iterator, watch)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if watch.problem is not None:
                    raise DataError(watch.problem) from error
                died = worker_died(error)
                if died is None and (dead := watch.dead()) is not None:
                    # it died while the main process received a batch from it
                    died = _advice(f"{dead}: {type(error).__name__}")
                if died is None:
                    raise
                raise DataError(died) from error
            yield made
    finally:
        watch.close()


def _next(iterator: Iterator[MicroBatch | DataError], watch: WorkerWatch) -> MicroBatch | DataError:
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if watch.problem is not None or "DataLoader timed out" not in str(error):
                raise


def _stop_workers(iterator: object) -> None:
    """End all workers, including hung and stopped ones. torch has no public function for this."""
    workers = getattr(iterator, "_workers", ())
    for worker in workers:
        # a stopped worker may hold a lock that the others, or the thread that pins memory, wait for
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        try:
            shut_down()
        except RuntimeError as error:
            # torch's SIGCHLD handler raises when a worker dies, also during this shutdown
            if worker_died(error) is None:
                raise
    for worker in workers:
        worker.kill()


def _check_shared_memory(needed: int, num_workers: int) -> None:
    """Check that /dev/shm can hold the batches in flight: workers die of a bus error when it is full."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise DataError(
            f"`d2v.data.num_workers` must leave room in /dev/shm, but {num_workers} workers need up to "
            f"{needed / 1e6:.0f} MB of it and {free / 1e6:.0f} MB are free. Use fewer workers (0 loads in the main "
            "process), or enlarge the container's /dev/shm (`--shm-size`)."
        )
