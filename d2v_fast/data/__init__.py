"""Data: which samples there are, how they are read and changed at random, and in which order they are seen."""

from __future__ import annotations

from d2v_fast.config import BatchSplit
from d2v_fast.data.batch import Batch, ImageDataset, MicroBatch, Step
from d2v_fast.data.loader import StepLoader, worker_died
from d2v_fast.data.makers import BatchMaker, batch_maker, resolved
from d2v_fast.data.order import StepOrder
from d2v_fast.data.samples import Samples
from d2v_fast.errors import DataError

__all__ = [
    "Batch",
    "BatchMaker",
    "DataError",
    "ImageDataset",
    "MicroBatch",
    "Samples",
    "Step",
    "StepLoader",
    "StepOrder",
    "batch_maker",
    "resolved",
    "step_order",
    "steps_per_epoch",
    "worker_died",
]


def step_order(
    maker: BatchMaker,
    split: BatchSplit,
    *,
    rank: int = 0,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int | None = None,
) -> StepOrder:
    """Return the order of a data set's samples; the arguments are those of `StepOrder`.

    Raises:
        DataError: the data set is smaller than one optimizer step.
    """
    return StepOrder(
        maker.num_samples,
        split,
        rank=rank,
        seed=seed,
        start_step=start_step,
        num_steps=num_steps,
        lengths=maker.lengths,
        max_step_length=maker.max_step_length,
    )


def steps_per_epoch(maker: BatchMaker, split: BatchSplit) -> int:
    """Return the number of optimizer steps in one pass over the data.

    Raises:
        DataError: the data set is smaller than one optimizer step.
    """
    return step_order(maker, split).steps_per_epoch
