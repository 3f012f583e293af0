"""data2vec: the student regresses the teacher's features of the unmasked input (arXiv 2202.03555, section 3).

Shape letters: B batch, P places (patches, frames, tokens of text), T tokens including a prefix, D width, N masked rows,
K averaged layers.

The teacher is an average of the student's encoder over time. It is an argument of every step and not a submodule, so
that neither the optimizer nor DeepSpeed treats it as a part of the model.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import PretrainConfig, TeacherConfig
from d2v_fast.data import Batch
from d2v_fast.modalities import build_student
from d2v_fast.models.student import Embedded, MaskedBatch
from d2v_fast.objectives.base import Objective, StepOutput
from d2v_fast.objectives.deviations import deviations

# a batch's rows are padded to a multiple of the next power of two, divided by this
_ROW_STEPS = 16


class Data2Vec(Objective):
    """Student encoder, regression head, and the objective.

    Args:
        config: model, target, loss and teacher.
    """

    teacher_config: TeacherConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.target = config.target
        # statistics over positions need the last layer at all positions
        self.target_is_per_row = {config.target.layer_norm, config.target.final_norm} <= {"none", "layer"}
        self.beta = config.loss.beta
        self.student = build_student(config)
        self.head = self.student.make_head()
        self.width, self.divisor = config.model.width, config.loss.divisor(config.model.width)
        self.teacher_config = config.teacher

    @property
    def averaged(self) -> nn.Module:
        """See `Objective`: a part of the student, or all of it."""
        return self.student.averaged

    def figures(self, moments: Tensor, num_rows: int) -> dict[str, float]:
        """See `Objective`: how much targets and predictions vary."""
        spread = deviations(moments.view(4, self.width), num_rows)
        return {"target_std": spread.target, "prediction_std": spread.prediction}

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
            features = self.teacher_features(unmasked, teacher, rows, batch.num_rows)
        with self.part("student forward"):
            prediction = self.student_forward(masked, rows)
        with self.part("target + loss"):
            return self.objective(prediction, features, rows, batch.lengths, moments, batch.num_rows)

    def with_fixed_shapes(self, batch: Batch, *, fixed_counts: bool) -> Batch:
        """Return the batch in a form whose shapes repeat from batch to batch, as a captured step needs it.

        `rows` are padded to one of few lengths, and the samples that skip parts of blocks are drawn here.

        Args:
            batch: a batch on the host, for which `shape_varies` returns None.
            fixed_counts: see `Encoder.draw`.
        """
        number = len(batch.rows)
        step = max(1, 2 ** max(0, number - 1).bit_length() // _ROW_STEPS)
        length = max(step, -(-number // step) * step)
        # place 0 is valid in every batch
        rows = torch.cat((batch.rows, batch.rows.new_zeros(length - number)))
        padded = dataclasses.replace(batch, rows=rows, num_rows=torch.tensor(number))
        return self.with_drawn_drops(padded, fixed_counts=fixed_counts)

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
    def teacher_features(
        self, unmasked: Embedded, teacher: nn.Module, rows: Tensor, num_rows: Tensor | None = None
    ) -> list[Tensor]:
        """Return the features of the teacher's last K blocks, `[B, P, D]` each.

        If the target normalizes each row by itself, the last block computes `rows` only, and the other rows of its
        feature are uninitialized.

        Args:
            unmasked: the teacher's input, from `embed`.
            teacher: a module of the class of `student.averaged`, in eval mode.
            rows: int64 `[N]`, flat indices of the masked places.
            num_rows: 0-d int64, how many of them count. `None` means all.

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
        num_samples, num_places = unmasked.num_samples, unmasked.num_places
        num_tokens = num_samples * (skipped + num_places)
        token_rows = self.student.token_rows(output_rows, num_places)
        if num_rows is not None:
            # padded rows all go to one more row, which nothing reads
            token_rows = torch.where(torch.arange(len(rows), device=rows.device) < num_rows, token_rows, num_tokens)
        scattered = last.new_empty(num_tokens + (num_rows is not None), last.shape[1])
        scattered.index_copy_(0, token_rows, last)
        return [*features, scattered[:num_tokens].view(num_samples, -1, last.shape[1])[:, skipped:]]

    def objective(
        self,
        prediction: Tensor,
        features: list[Tensor],
        rows: Tensor,
        lengths: Tensor | None = None,
        moments: bool = True,
        num_rows: Tensor | None = None,
    ) -> StepOutput:
        """Compute the loss between predictions and the normalized average of the features at the masked places.

        Args:
            prediction: `[N, D]`, from `student_forward`.
            features: K tensors `[B, P, D]`, from `teacher_features`.
            rows: int64 `[N]`, flat indices of the masked places.
            lengths: int64 `[B]`, valid places of each sample, for statistics over places. `None` means all.
            moments: whether to compute `StepOutput.moments`.
            num_rows: 0-d int64, how many of the predictions count. `None` means all.
        """
        if num_rows is not None:
            return self._objective_of_some(prediction, features, rows, lengths, num_rows, moments)
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

    def _objective_of_some(
        self,
        prediction: Tensor,
        features: list[Tensor],
        rows: Tensor,
        lengths: Tensor | None,
        num_rows: Tensor,
        moments: bool,
    ) -> StepOutput:
        """Compute `objective` of the first `num_rows` predictions.

        Padded rows have a prediction and a target of zero, which add exactly nothing to loss, gradient and moments.
        """
        is_padding = (torch.arange(len(rows), device=rows.device) >= num_rows)[:, None]
        target = ops.topk_target(
            features,
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
            rows=rows,
            lengths=lengths,
            eps=self.target.eps,
        )
        loss, sums = ops.masked_smooth_l1(
            prediction.masked_fill(is_padding, 0.0),
            target.masked_fill_(is_padding, 0.0),
            beta=self.beta,
            reduction="sum",
            moments=moments,
        )
        return StepOutput(loss, len(rows), sums)
