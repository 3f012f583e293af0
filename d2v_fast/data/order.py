"""Which samples belong to which optimizer step: a function of the seed and the step number alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from d2v_fast.errors import DataError
from d2v_fast.masking.streams import ORDER, STEP_ORDER, permutation

if TYPE_CHECKING:
    from d2v_fast.config import BatchSplit

__all__ = ["MicroStep", "StepOrder"]

# ratio of the longest to the shortest sample of a bucket that has enough of them; about half of the excess is cropped
# or padded
LIKE_LENGTH = 1.05


@dataclass(frozen=True)
class MicroStep:
    """The samples of one micro-step of one process, and those of its whole optimizer step.

    Attributes:
        epoch: counted from 0.
        sample_ids: int64 `[B]`, of this micro-step and process.
        step_sample_ids: int64 `[S]`, of all micro-steps and processes. S is the global batch size, or less where
            samples are grouped by length.
    """

    epoch: int
    sample_ids: npt.NDArray[np.int64]
    step_sample_ids: npt.NDArray[np.int64]


class StepOrder(Sampler[MicroStep]):
    """Iterates over the micro-steps of one process, from `start_step` on.

    Every epoch has its own order. Without `lengths`, each optimizer step takes the next `global_batch` samples of it
    and divides them among its micro-steps and processes. Samples at the end that do not fill a step are left out of
    that epoch.

    With `lengths`, a step holds samples of similar length. Samples are sorted by length once and cut into buckets: each
    holds as many steps as fit into 5 % of length, and at least one. A step holds `global_batch` samples, or fewer if
    `max_step_length` is reached first. In every epoch the samples of a bucket are shuffled and divided evenly among its
    steps, and the steps of all buckets are shuffled. Every sample is in exactly one step of an epoch, and the steps do
    not depend on the number of micro-steps and processes.

    Args:
        num_samples: size of the data set.
        split: samples per micro-step (the maximum, with `lengths`), micro-steps per step, and processes.
        rank: of this process.
        seed: of the order.
        start_step: optimizer steps already made.
        num_steps: optimizer steps of the whole run, including those before `start_step`. None has no end.
        lengths: int64 `[S]`, positive, one per sample.
        max_step_length: limit for the number of samples in a step times the length of its longest. None has no limit.
            Requires `lengths`.
    Raises:
        DataError: the data set is smaller than one optimizer step; or, with `lengths`, a step has fewer samples than
            micro-steps, or `max_step_length` is less than the longest sample.
    """

    def __init__(
        self,
        num_samples: int,
        split: BatchSplit,
        *,
        rank: int = 0,
        seed: int,
        start_step: int = 0,
        num_steps: int | None = None,
        lengths: npt.NDArray[np.int64] | None = None,
        max_step_length: int | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.split = split
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self._bucket_of: npt.NDArray[np.int64] | None = None
        if lengths is None:
            self.steps_per_epoch = num_samples // split.global_batch
            self._sizes = np.full(self.steps_per_epoch, split.global_batch)
            self._check_one_step()
        else:
            if len(lengths) != num_samples:
                raise ValueError(f"`lengths` must hold {num_samples} values, but holds {len(lengths)} instead.")
            self._bucket_of, self._sizes = _buckets(lengths, split.global_batch, max_step_length)
            self.steps_per_epoch = len(self._sizes)
            self._check_sizes(max_step_length)

    def samples_after(self, step: int) -> int:
        """Return how many samples the first `step` optimizer steps of a run use, over all processes."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * int(self._sizes.sum()) + int(self._sizes[self._step_order(epochs)[:steps]].sum())

    def __iter__(self) -> Iterator[MicroStep]:
        step, accumulation, world_size = self.start_step, self.split.accumulation, self.split.world_size
        while self.num_steps is None or step < self.num_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            steps = self._steps(epoch)
            for position in self._step_order(epoch)[first:].tolist():
                if step == self.num_steps:
                    return
                samples = steps[position]
                shares = np.array_split(samples, accumulation * world_size)
                for micro_step in range(accumulation):
                    share = shares[micro_step * world_size + self.rank]
                    yield MicroStep(epoch, share.copy(), samples.copy())
                step += 1

    def _steps(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Return the samples of every step of an epoch, bucket by bucket."""
        order = permutation(self.seed, ORDER, epoch, self.num_samples)
        if self._bucket_of is not None:
            order = order[np.argsort(self._bucket_of[order], kind="stable")]
        return np.split(order, np.cumsum(self._sizes))[:-1]

    def _step_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._bucket_of is None:
            return np.arange(self.steps_per_epoch)
        return permutation(self.seed, STEP_ORDER, epoch, self.steps_per_epoch)

    def _check_one_step(self) -> None:
        split = self.split
        if self.steps_per_epoch == 0:
            also = " and `train_micro_batch_size_per_gpu` with it" if split.micro_batch > self.num_samples else ""
            raise DataError(
                f"the data set must hold at least one optimizer step, but it has {self.num_samples} samples and a step "
                f"takes {split.global_batch} ({split.micro_batch} per micro-batch x {split.accumulation} micro-steps x "
                f"{split.world_size} processes). Lower `train_batch_size` to {self.num_samples} or less{also}, or "
                "add data."
            )

    def _check_sizes(self, max_step_length: int | None) -> None:
        split = self.split
        needed, smallest = split.accumulation * split.world_size, int(self._sizes.min()) if len(self._sizes) else 0
        if smallest < needed:
            longer = "" if max_step_length is None else ", raise `d2v.data.max_batch_seconds`"
            raise DataError(
                f"every optimizer step must hold at least {needed} samples ({split.accumulation} micro-steps x "
                f"{split.world_size} processes), but {int((self._sizes < needed).sum())} of the {self.steps_per_epoch} "
                f"steps of an epoch hold fewer, the smallest {smallest}. Lower `gradient_accumulation_steps`{longer}, "
                "use fewer processes, or add data."
            )


def _buckets(
    lengths: npt.NDArray[np.int64], global_batch: int, max_step_length: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the bucket of every sample, int64 `[S]`, and the sizes of all steps of an epoch, bucket by bucket."""
    # longest first; samples of equal length keep the order of the data set
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
            # too few for a step: merge them with the samples of the step before
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
