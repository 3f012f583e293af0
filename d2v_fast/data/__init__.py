"""Data: which samples there are, how they are read and changed at random, and in which order they are seen."""

from __future__ import annotations

from d2v_fast.config import BatchSplit
from d2v_fast.data.batch import Batch, DataError, ImageDataset
from d2v_fast.data.loader import StepLoader, worker_died
from d2v_fast.data.makers import BatchMaker, batch_maker, resolved
from d2v_fast.data.order import StepOrder
from d2v_fast.data.samples import Samples

__all__ = [
    "Batch",
    "BatchMaker",
    "DataError",
    "ImageDataset",
    "Samples",
    "StepLoader",
    "batch_maker",
    "resolved",
    "steps_per_epoch",
    "worker_died",
]


def steps_per_epoch(maker: BatchMaker, split: BatchSplit) -> int:
    """Optimizer steps of one pass over the data.

    Raises:
        DataError: the data set is smaller than a step.
    """
    order = StepOrder(
        maker.num_samples,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        world_size=split.world_size,
        rank=0,
        seed=0,
        start_step=0,
        num_steps=None,
        lengths=maker.lengths,
        max_step_length=maker.max_step_length,
    )
    return order.steps_per_epoch
