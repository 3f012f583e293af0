"""What the training loop asks of an objective, whether it pre-trains an encoder or fine-tunes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn

from d2v_fast.config import TeacherConfig
from d2v_fast.data import Batch
from d2v_fast.models.encoder import Encoder, random_keys
from d2v_fast.models.student import Student


class StepOutput(NamedTuple):
    """One forward pass of an objective.

    Attributes:
        loss_sum: 0-d fp32, the loss summed over rows and, in pre-training, channels. The engine divides by the rows of
            the global batch, so that the loss does not depend on how that batch is split.
        num_rows: N, rows of this batch, including padded ones: masked places, or samples.
        moments: fp32, sums over the rows that `Objective.figures` reads; no gradient. In pre-training `[4, D]`:
            prediction, prediction^2, target, target^2. None if they were not asked for.
        class_loss: 0-d fp32, what the class token adds to `loss_sum`. None: nothing.
        predictions: fp32, in eval mode only: what the model predicts for each sample, `[B, ...]`.
        losses: fp32 `[B]`, in eval mode only: the loss of each sample.
    """

    loss_sum: Tensor
    num_rows: int
    moments: Tensor | None
    class_loss: Tensor | None = None
    predictions: Tensor | None = None
    losses: Tensor | None = None


class Rate(NamedTuple):
    """How a parameter's learning rate follows the schedule.

    Attributes:
        scale: Factor on the schedule's rate.
        freezes: Whether the rate is 0 while the encoder is frozen.
    """

    scale: float = 1.0
    freezes: bool = False


def unmeasured(part: str) -> AbstractContextManager[None]:
    """Return a context that does nothing."""
    return nullcontext()


class Objective(nn.Module):
    """An encoder (`student`), a head, and a loss.

    Attributes:
        part: entered around each part of the forward pass, with the name of the part. Replace it to time the parts.
        student: the encoder that is trained.
        head: what turns its output into predictions.
        divisor: divisor of a row's loss, besides the number of rows.
        teacher_config: decay of the moving average of `averaged`; None keeps no average.
    """

    part: Callable[[str], AbstractContextManager[None]]
    student: Student
    head: nn.Module
    divisor: float
    teacher_config: TeacherConfig | None

    def __init__(self) -> None:
        super().__init__()
        self.part = unmeasured

    @property
    def averaged(self) -> nn.Module:
        """The module whose moving average is kept."""
        raise NotImplementedError

    def figures(self, moments: Tensor, num_rows: int) -> dict[str, float]:
        """Return the values of a step that the log shows beside the loss.

        Args:
            moments: fp32, flat, `StepOutput.moments` summed over all micro-batches and processes.
            num_rows: N, over all processes.
        """
        raise NotImplementedError

    def logged(self, sums: Tensor, num_rows: int) -> dict[str, float]:
        """Return a step's loss per row and its figures.

        Args:
            sums: fp32, 1-D: loss and moments, summed over all micro-batches and processes.
            num_rows: N, over all processes.
        """
        return {"loss": sums[0].item() / (num_rows * self.divisor), **self.figures(sums[1:], num_rows)}

    def rows_of(self, batch: Batch) -> int:
        """Return the rows of a batch: what its loss is divided by if it is a whole step."""
        return len(batch.rows)

    def rates(self) -> Mapping[str, Rate]:
        """Return the parameters, by name, whose learning rate differs from the schedule's."""
        return {}

    def begin(self) -> None:
        """Load the weights that a new run begins with, in fp32 on the CPU. A resumed run does not call it."""

    def frozen_at(self, step: int) -> bool:
        """Return whether the encoder is frozen in optimizer step `step`, counted from 1."""
        return False

    def begin_step(self, step: int) -> None:
        """Prepare for the forward passes of optimizer step `step`, counted from 1."""

    def shape_varies(self, batch: Batch) -> str | None:
        """Return why `with_fixed_shapes` does not support a batch, as the end of a sentence; None if it does."""
        if batch.unpadded is not None:
            return "packed attention and separate documents have another number of tokens in every batch"
        if batch.offsets is not None:
            return "separate documents have another number of documents in every batch"
        return None

    def with_fixed_shapes(self, batch: Batch, *, fixed_counts: bool) -> Batch:
        """Return the batch in a form whose shapes repeat from batch to batch, as a captured step needs it.

        Args:
            batch: a batch on the host, for which `shape_varies` returns None.
            fixed_counts: see `Encoder.draw`.
        """
        return self.with_drawn_drops(batch, fixed_counts=fixed_counts)

    def with_drawn_drops(self, batch: Batch, *, fixed_counts: bool) -> Batch:
        """Return the batch with the samples that skip parts of blocks; see `Encoder.draw`.

        Args:
            batch: a batch on the host.
            fixed_counts: see `Encoder.draw`.
        """
        (encoder,) = (part for part in self.student.averaged.modules() if isinstance(part, Encoder))
        keys = batch.drop_keys
        if isinstance(keys, Tensor):
            return batch
        drawn = encoder.draw(
            random_keys(len(batch.inputs) * batch.num_masks) if keys is None else keys, fixed_counts=fixed_counts
        )
        return dataclasses.replace(batch, drop_keys=drawn)
