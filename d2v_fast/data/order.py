"""Which samples belong to which optimizer step: a function of the seed and the step number, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from d2v_fast.data.batch import DataError
from d2v_fast.masking.streams import ORDER, STEP_ORDER, permutation

__all__ = ["MicroStep", "StepOrder"]

# the longest of a bucket against its shortest, where there are enough of them: what is cropped or padded is about half
# of the excess
LIKE_LENGTH = 1.05


@dataclass(frozen=True)
class MicroStep:
    """The samples of one micro step of one process, and those of the whole optimizer step.

    Attributes:
        epoch: counted from 0.
        sample_ids: int64 `[B]`.
        step_sample_ids: int64 `[global batch]`, over all micro steps and processes; fewer where steps are made of
            samples of like length.
    """

    epoch: int
    sample_ids: npt.NDArray[np.int64]
    step_sample_ids: npt.NDArray[np.int64]


class StepOrder(Sampler[MicroStep]):
    """Micro steps of one process, from `start_step` on and without end, or for `num_steps` optimizer steps in all.

    Every epoch has an order of its own. Without `lengths`, each optimizer step takes the next `global_batch` samples of
    it, and its micro steps and processes share them out; what does not fill a step is left out until the next epoch.

    With `lengths`, a step holds samples of like length. Samples are sorted by length and cut into buckets, once:
    as many steps' worth as lie within 5 %, and at least one. A step holds `global_batch` samples, or as many of
    the bucket's longest as `max_step_length` allows, whichever is less. In every epoch the samples of a bucket are
    divided anew among its steps, as evenly as possible, and the steps of all buckets are put in a random order; every
    sample is in exactly one of them. Micro steps and processes share a step out as evenly as possible, so that steps
    do not depend on how they are shared out.

    Args:
        num_samples: size of the data set.
        micro_batch: samples per process and micro step; with `lengths` the most that there are.
        accumulation: micro steps per optimizer step.
        world_size, rank: number of processes, and which one this is.
        seed: of the order.
        start_step: optimizer steps already made.
        num_steps: optimizer steps of the whole run, those before `start_step` included; None for no end.
        lengths: int64 `[S]`, positive, of every sample.
        max_step_length: the most that the samples of a step may add up to if each is as long as the longest of them;
            None for no limit. It needs `lengths`.
    Raises:
        DataError: if the data set is smaller than one optimizer step; with `lengths`, if a step would have fewer
            samples than micro steps, or `max_step_length` is less than the longest sample.
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
        lengths: npt.NDArray[np.int64] | None = None,
        max_step_length: int | None = None,
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
        self._bucket_of: npt.NDArray[np.int64] | None = None
        if lengths is None:
            self.steps_per_epoch = num_samples // self.global_batch
            self._sizes = np.full(self.steps_per_epoch, self.global_batch)
            self._check_one_step()
        else:
            if len(lengths) != num_samples:
                raise ValueError(f"`lengths` must hold {num_samples} values, but holds {len(lengths)} instead.")
            self._bucket_of, self._sizes = _buckets(lengths, self.global_batch, max_step_length)
            self.steps_per_epoch = len(self._sizes)
            self._check_sizes(max_step_length)

    def samples_after(self, step: int) -> int:
        """How many samples the first `step` optimizer steps of a run take, over all processes."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * int(self._sizes.sum()) + int(self._sizes[self._step_order(epochs)[:steps]].sum())

    def __iter__(self) -> Iterator[MicroStep]:
        step = self.start_step
        while self.num_steps is None or step < self.num_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            steps = self._steps(epoch)
            for position in self._step_order(epoch)[first:].tolist():
                if step == self.num_steps:
                    return
                samples = steps[position]
                shares = np.array_split(samples, self.accumulation * self.world_size)
                for micro_step in range(self.accumulation):
                    share = shares[micro_step * self.world_size + self.rank]
                    yield MicroStep(epoch, share.copy(), samples.copy())
                step += 1

    def _steps(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The samples of every step of an epoch, bucket by bucket."""
        order = permutation(self.seed, ORDER, epoch, self.num_samples)
        if self._bucket_of is not None:
            order = order[np.argsort(self._bucket_of[order], kind="stable")]
        return np.split(order, np.cumsum(self._sizes))[:-1]

    def _step_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._bucket_of is None:
            return np.arange(self.steps_per_epoch)
        return permutation(self.seed, STEP_ORDER, epoch, self.steps_per_epoch)

    def _check_one_step(self) -> None:
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the data set must hold at least one optimizer step, but it has {self.num_samples} samples and a step "
                f"takes {self.global_batch} ({self.micro_batch} per micro batch x {self.accumulation} micro steps x "
                f"{self.world_size} processes). Lower `train_batch_size` to {self.num_samples} or less, or add data."
            )

    def _check_sizes(self, max_step_length: int | None) -> None:
        needed, smallest = self.accumulation * self.world_size, int(self._sizes.min()) if len(self._sizes) else 0
        if smallest < needed:
            longer = "" if max_step_length is None else ", raise `d2v.data.max_batch_seconds`"
            raise DataError(
                f"every optimizer step must hold at least {needed} utterances ({self.accumulation} micro steps x "
                f"{self.world_size} processes), but of {self.steps_per_epoch} steps of an epoch "
                f"{int((self._sizes < needed).sum())} hold fewer, the smallest {smallest}. Lower "
                f"`gradient_accumulation_steps`{longer}, use fewer processes, or add data."
            )


def _buckets(
    lengths: npt.NDArray[np.int64], global_batch: int, max_step_length: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The bucket of every sample, int64 `[S]`, and the sizes of all steps of an epoch, those of a bucket together."""
    # by length, longest first; of equal lengths in the order of the data set
    by_length = np.argsort(-lengths, kind="stable")
    descending = lengths[by_length]

    def step_size(position: int) -> int:
        if max_step_length is None:
            return global_batch
        return min(global_batch, max_step_length // int(descending[position]))

    if len(lengths) and step_size(0) == 0:
        raise DataError(
            f"`max_step_length` must hold the longest sample ({descending[0]}), but is {max_step_length} instead."
        )
    starts: list[int] = []
    start = 0
    while start < len(lengths):
        size = step_size(start)
        if len(lengths) - start < size:
            # too few for a step: they share one with the samples of the step before
            if starts:
                start -= step_size(starts[-1])
            if not starts or start > starts[-1]:
                starts.append(start)
            break
        alike = int(np.searchsorted(-descending, -descending[start] / LIKE_LENGTH, side="right"))
        starts.append(start)
        start += max(1, (alike - start) // size) * size
    counts = np.diff([*starts, len(lengths)])
    bucket_of = np.empty(len(lengths), dtype=np.int64)
    bucket_of[by_length] = np.repeat(np.arange(len(starts)), counts)
    sizes = []
    for first, count in zip(starts, counts.tolist(), strict=True):
        num_steps = -(-count // step_size(first))
        sizes.append(np.full(num_steps, count // num_steps) + (np.arange(num_steps) < count % num_steps))
    return bucket_of, np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)
