"""From a data set to batches with masks, one optimizer step at a time.

Worker processes read, augment and draw masks; everything random depends on (seed, epoch, sample id), so the batches
are the same for any number of workers, and resuming needs the step number only.
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
from d2v_fast.data.batch import Batch, DataError
from d2v_fast.data.makers import BatchMaker
from d2v_fast.data.order import MicroStep, StepOrder
from d2v_fast.data.worker_watch import WorkerWatch
from d2v_fast.processes.idle import LOOKS

if TYPE_CHECKING:
    from d2v_fast.config import D2VConfig

__all__ = ["StepLoader", "worker_died"]

# small batches are made in no time, and wait in the queue so that a step never waits for a worker
SMALL_BATCH_BYTES = 1 << 20
PREFETCH_SMALL, PREFETCH_LARGE = 8, 2

# how long a worker lives on after SIGTERM, for the main process to finish its step and save
GRACE_SECONDS = 60


class StepLoader:
    """Yields, for every optimizer step, the list of its micro batches for this process.

    Args:
        maker: what `batch_maker` returns.
        config: the `"d2v"` section; number of workers and the limit for unreadable files are read from it.
        micro_batch, accumulation, world_size, rank: see `StepOrder`.
        seed: of order, augmentation and masks; None takes `config.run.seed`.
        start_step: optimizer steps already made; iteration begins after them.
        num_steps: optimizer steps of the whole run; None yields without end.
        pin_memory: page-locked batches; None pins if there is a CUDA device and `config.run.device` allows it.
        on_bad: is told of every unreadable file when this process first meets it, as `path: reason`.
        timeout_s: seconds to wait for a batch before a worker counts as hung, 0 waits for ever; None takes
            `config.run.timeout_minutes`.
    Raises:
        DataError: if the data set is smaller than one optimizer step, or shared memory is too small for the workers;
            while iterating, if more than `max_bad_fraction` of the files are unreadable (with `strict`: the first), or
            a worker dies or hangs.
    """

    def __init__(
        self,
        maker: BatchMaker,
        config: D2VConfig,
        *,
        micro_batch: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
        pin_memory: bool | None = None,
        on_bad: Callable[[str], None] = lambda file: None,
        timeout_s: float | None = None,
    ) -> None:
        seed = config.run.seed if seed is None else seed
        self._order = StepOrder(
            maker.num_samples,
            micro_batch=micro_batch,
            accumulation=accumulation,
            world_size=world_size,
            rank=rank,
            seed=seed,
            start_step=start_step,
            num_steps=num_steps,
            lengths=maker.lengths,
            max_step_length=maker.max_step_length,
        )
        self._maker = _Micro(maker, seed)
        self._num_workers = config.data.num_workers
        if pin_memory is None:
            pin_memory = config.run.device != "cpu" and torch.cuda.is_available()
        self._pin_memory = pin_memory
        self._timeout_s = config.run.timeout_s if timeout_s is None else timeout_s
        self._bytes = micro_batch * maker.sample_bytes
        self._prefetch = PREFETCH_SMALL if self._bytes <= SMALL_BATCH_BYTES else PREFETCH_LARGE
        self._bad = BadFiles(config.data, maker, on_bad)
        if self._num_workers > 0:
            _check_shared_memory(self._num_workers * self._prefetch * self._bytes, self._num_workers)
        # compiles the sampler here, once, and not in every worker
        maker.warm_up()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data; the rest that does not fill a step is left out."""
        return self._order.steps_per_epoch

    @property
    def global_batch(self) -> int:
        """Samples in one optimizer step, over all micro steps and processes."""
        return self._order.global_batch

    def samples_after(self, step: int) -> int:
        """Samples used after so many optimizer steps."""
        return self._order.samples_after(step)

    @property
    def bad_files(self) -> tuple[str, ...]:
        """The unreadable files that this process has met, as `path: reason`."""
        return tuple(self._bad.files)

    def __iter__(self) -> Iterator[list[Batch]]:
        iterator = iter(self._data_loader())
        stop = functools.partial(_stop_workers, iterator)
        # an interpreter that ends while the iteration is suspended would wait for its workers
        atexit.register(stop)
        try:
            step: list[Batch] = []
            for made in _batches(iterator, self._timeout_s if self._num_workers else 0):
                if isinstance(made, DataError):
                    raise made
                self._bad.add(made)
                step.append(made)
                if len(step) == self._order.accumulation:
                    yield step
                    step = []
        finally:
            atexit.unregister(stop)
            stop()

    def _data_loader(self) -> DataLoader[Any]:
        options: dict[str, Any] = {}
        if self._num_workers > 0:
            options = {
                "worker_init_fn": _init_worker,
                "prefetch_factor": self._prefetch,
                # torch's time-out is a look only: `WorkerWatch` counts
                "timeout": self._timeout_s / LOOKS,
            }
        return DataLoader(
            self._maker,
            batch_size=None,
            sampler=self._order,
            collate_fn=_as_is,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            # one of its own, so that torch's global generator stays untouched
            generator=torch.Generator(),
            **options,
        )


class _Micro(TorchDataset):
    """Makes one micro batch; runs in the workers."""

    def __init__(self, maker: BatchMaker, seed: int) -> None:
        self._maker, self._seed = maker, seed

    def __getitem__(self, micro: MicroStep) -> Batch | DataError:
        try:
            return self._maker.make(micro, self._seed)
        except DataError as error:
            # raised by the main process: a worker's exception would arrive as the text of a traceback
            return error


def _as_is(batch: Any) -> Any:
    return batch


def _init_worker(worker_id: int) -> None:
    # Ctrl-C and SIGTERM often go to every process of a run; only the main one decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def worker_died(error: Exception) -> str | None:
    """What to tell where a data loading worker was killed; None where `error` is about something else.

    torch raises that error out of a signal handler, so wherever the main process happens to be.
    """
    text = str(error)
    if "killed by signal" not in text and "exited unexpectedly" not in text:
        return None
    return _advice(text.strip())


def _advice(died: str) -> str:
    return (
        f"A data loader worker died, often for lack of memory: lower `d2v.data.num_workers`, or set it to 0. ({died})"
    )


def _batches(iterator: Iterator[Any], timeout_s: float) -> Iterator[Any]:
    """What a `DataLoader` gives; DataError where a worker dies, or gives nothing for `timeout_s` (0: for ever)."""
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
                    # while a batch of it was being taken over
                    died = _advice(f"{dead}: {type(error).__name__}")
                if died is None:
                    raise
                raise DataError(died) from error
            yield made
    finally:
        watch.close()


def _next(iterator: Iterator[Any], watch: WorkerWatch) -> Any:
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if watch.problem is not None or "DataLoader timed out" not in str(error):
                raise


def _stop_workers(iterator: object) -> None:
    """End the workers, those that hang or are stopped too. torch has no public way to do so."""
    workers = getattr(iterator, "_workers", ())
    for worker in workers:
        # one that is stopped may hold what the others, or the thread that pins memory, wait for
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        try:
            shut_down()
        except RuntimeError as error:
            # torch's handler of SIGCHLD interrupts whatever runs when one dies, the end of all of them included
            if worker_died(error) is None:
                raise
    for worker in workers:
        worker.kill()


def _check_shared_memory(needed: int, num_workers: int) -> None:
    """Workers hand batches over in /dev/shm; when it is full, they die of a bus error."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise DataError(
            f"`d2v.data.num_workers` must leave room in /dev/shm, but {num_workers} workers need up to "
            f"{needed / 1e6:.0f} MB of it and {free / 1e6:.0f} MB are free. Use fewer workers, 0 for none, or give a "
            f"container more (`--shm-size`)."
        )
