"""Which samples belong to which optimizer step: a function of the seed and the step number, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from d2v_fast.data.batch import DataError
from d2v_fast.streams import ORDER, permutation

__all__ = ["MicroStep", "StepOrder"]


@dataclass(frozen=True)
class MicroStep:
    """The samples of one micro step of one process, and those of the whole optimizer step.

    Attributes:
        epoch: counted from 0.
        sample_ids: int64 `[B]`.
        step_sample_ids: int64 `[global batch]`, over all micro steps and processes.
    """

    epoch: int
    sample_ids: npt.NDArray[np.int64]
    step_sample_ids: npt.NDArray[np.int64]


class StepOrder(Sampler[MicroStep]):
    """Micro steps of one process, from `start_step` on and without end, or for `num_steps` optimizer steps in all.

    Every epoch has an order of its own. Each optimizer step takes the next `global_batch` samples of it, and its
    micro steps and processes share them out; what does not fill a step is left out until the next epoch.

    Args:
        num_samples: size of the data set.
        micro_batch: samples per process and micro step.
        accumulation: micro steps per optimizer step.
        world_size, rank: number of processes, and which one this is.
        seed: of the order.
        start_step: optimizer steps already made.
        num_steps: optimizer steps of the whole run, those before `start_step` included; None for no end.
    Raises:
        DataError: if the data set is smaller than one optimizer step.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch: int,
        accumulation: int,
        world_size: int,
        rank: int,
        seed: int,
        start_step: int,
        num_steps: int | None,
    ) -> None:
        self.num_samples = num_samples
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self.global_batch = micro_batch * accumulation * world_size
        self.steps_per_epoch = num_samples // self.global_batch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the data set must hold at least one optimizer step, but it has {num_samples} samples and a step "
                f"takes {self.global_batch} ({micro_batch} per micro batch x {accumulation} micro steps x {world_size} "
                f"processes). Lower `train_batch_size` to {num_samples} or less, or add data."
            )

    def __iter__(self) -> Iterator[MicroStep]:
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = permutation(self.seed, ORDER, epoch, self.num_samples)
            for position in range(first, self.steps_per_epoch):
                if step == self.num_steps:
                    return
                samples = order[position * self.global_batch : (position + 1) * self.global_batch]
                for micro_step in range(self.accumulation):
                    start = (micro_step * self.world_size + self.rank) * self.micro_batch
                    yield MicroStep(epoch, samples[start : start + self.micro_batch].copy(), samples.copy())
                step += 1
