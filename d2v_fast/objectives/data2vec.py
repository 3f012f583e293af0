"""data2vec: the student regresses the teacher's features of the unmasked input (arXiv 2202.03555, section 3).

Shape letters: B batch, P places (patches, frames, tokens of text), T tokens including a prefix, D width, N masked rows,
K averaged layers.

The teacher is an average of the student's encoder over time. It is an argument of every step and not a submodule, so
that neither the optimizer nor DeepSpeed treats it as a part of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import D2VConfig
from d2v_fast.modalities import build_student
from d2v_fast.models.student import Embedded, MaskedBatch


class StepOutput(NamedTuple):
    """One forward pass of the objective.

    Attributes:
        loss_sum: 0-d fp32, the loss summed over masked rows and channels. The engine divides by the masked rows of
            the global batch, so that the loss does not depend on how that batch is split.
        num_rows: N, masked rows of this batch.
        moments: fp32 `[4, D]`, sums over the rows of prediction, prediction^2, target, target^2; no gradient. None if
            they were not asked for.
        class_loss: 0-d fp32, what the class token adds to `loss_sum`. None: nothing.
    """

    loss_sum: Tensor
    num_rows: int
    moments: Tensor | None
    class_loss: Tensor | None = None


def unmeasured(part: str) -> AbstractContextManager[None]:
    """Return a context that does nothing."""
    return nullcontext()


class Data2Vec(nn.Module):
    """Student encoder, regression head, and the objective.

    Args:
        config: model, target and loss.

    Attributes:
        part: entered around each part of the forward pass, with the name of the part. Replace it to time the parts.
    """

    part: Callable[[str], AbstractContextManager[None]]

    def __init__(self, config: D2VConfig) -> None:
        super().__init__()
        self.target = config.target
        # statistics over positions need the last layer at all positions
        self.target_is_per_row = {config.target.layer_norm, config.target.final_norm} <= {"none", "layer"}
        self.beta = config.loss.beta
        self.student = build_student(config)
        self.head = self.student.make_head()
        self.part = unmeasured

    def forward(self, batch: MaskedBatch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        """Compute the loss of one batch.

        Args:
            batch: the masked batch.
            teacher: a module of the class of `student.averaged`, in eval mode, of any floating dtype.
            moments: whether to compute `StepOutput.moments`.

        Raises:
            ValueError: `rows` have a wrong dtype, shape or device. On a CPU, rows out of range raise IndexError or
                RuntimeError in torch; on a GPU they are not checked, since the host would have to wait.
        """
        rows = batch.rows
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(
                f"`rows` must be a 1-d int64 tensor, but is {rows.dtype} of shape {list(rows.shape)} instead. "
                "A mask `[B, P]`, True where masked, has the rows `mask.flatten().nonzero()[:, 0]`."
            )
        if rows.device != batch.inputs.device:
            raise ValueError(
                f"`rows` must be on {batch.inputs.device} as `inputs` are, but is on {rows.device} instead."
            )
        with self.part("student forward"):
            masked, unmasked = self.embed(batch)
        # the teacher goes first: its working memory is free again when the student's activations pile up
        with self.part("teacher forward"):
            features = self.teacher_features(unmasked, teacher, rows)
        with self.part("student forward"):
            prediction = self.student_forward(masked, rows)
        with self.part("target + loss"):
            return self.objective(prediction, features, rows, batch.lengths, moments)

    def embed(self, batch: MaskedBatch) -> tuple[Embedded, Embedded]:
        """Compute the inputs of student and teacher; see `Student.embed`."""
        return self.student.embed(batch)

    def student_forward(self, masked: Embedded, rows: Tensor) -> Tensor:
        """Predict `[N, D]` at the masked places. The last norm and the head run on these rows only.

        Args:
            masked: the student's input, from `embed`.
            rows: int64 `[N]`, flat indices of the masked places.
        """
        hidden = masked.run(self.student.averaged, output_rows=rows).last_hidden
        prediction: Tensor = self.head(self.student.finish(hidden))
        return prediction

    @torch.no_grad()
    def teacher_features(self, unmasked: Embedded, teacher: nn.Module, rows: Tensor) -> list[Tensor]:
        """Return the features of the teacher's last K blocks, `[B, P, D]` each.

        If the target normalizes each row by itself, the last block computes `rows` only, and the other rows of its
        feature are uninitialized.

        Args:
            unmasked: the teacher's input, from `embed`.
            teacher: a module of the class of `student.averaged`, in eval mode.
            rows: int64 `[N]`, flat indices of the masked places.

        Raises:
            ValueError: `teacher` is in training mode.
        """
        if teacher.training:
            raise ValueError("`teacher` must be in eval mode, but is in training mode instead: `teacher.eval()`.")
        # a working copy in the compute dtype needs no autocast, which would run its norms in fp32
        is_working_copy = next(teacher.parameters()).dtype != torch.float32
        device_type = rows.device.type
        without_autocast = is_working_copy and torch.amp.is_autocast_available(device_type)
        with torch.autocast(device_type, enabled=False) if without_autocast else nullcontext():
            output_rows = rows if self.target_is_per_row else None
            *features, last = unmasked.run(teacher, self.target.top_k, output_rows).features
        skipped = self.student.num_prefix_tokens
        features = [feature[:, skipped:] for feature in features]
        if output_rows is None:
            return [*features, last[:, skipped:]]
        # same layout as the other layers, with the prefix: layers with different strides would be copied
        num_places = unmasked.num_places
        scattered = last.new_empty(unmasked.num_samples, skipped + num_places, last.shape[1])
        scattered.flatten(0, 1).index_copy_(0, self.student.token_rows(output_rows, num_places), last)
        return [*features, scattered[:, skipped:]]

    def objective(
        self,
        prediction: Tensor,
        features: list[Tensor],
        rows: Tensor,
        lengths: Tensor | None = None,
        moments: bool = True,
    ) -> StepOutput:
        """Compute the loss between predictions and the normalized average of the features at the masked places.

        Args:
            prediction: `[N, D]`, from `student_forward`.
            features: K tensors `[B, P, D]`, from `teacher_features`.
            rows: int64 `[N]`, flat indices of the masked places.
            lengths: int64 `[B]`, valid places of each sample, for statistics over places. `None` means all.
            moments: whether to compute `StepOutput.moments`.
        """
        loss, sums = ops.data2vec_loss(
            prediction,
            features,
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
            rows=rows,
            lengths=lengths,
            eps=self.target.eps,
            beta=self.beta,
            reduction="sum",
            moments=moments,
        )
        return StepOutput(loss, len(rows), sums)
