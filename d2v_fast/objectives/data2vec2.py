"""data2vec 2.0: several masks share one pass of the teacher, and the student encodes visible places only.

Shape letters: B samples, M masks per sample, R = B * M rows, P places of a sample, V visible places of a row, N masked
places of all rows, D width, K averaged layers. Row `b * M + m` is mask m of sample b (arXiv 2212.07525, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import PretrainConfig
from d2v_fast.config.data2vec2 import ClassTokenLossConfig
from d2v_fast.data import Batch
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.noise import normal_noise
from d2v_fast.models.student import MaskedBatch
from d2v_fast.models.visible import Places
from d2v_fast.objectives.base import StepOutput
from d2v_fast.objectives.data2vec import Data2Vec


class Data2Vec2(Data2Vec):
    """Student encoder, decoder (`head`), and the objective.

    Args:
        config: model, target and loss.

    Attributes:
        draw_noise: draws `[N, D]`, the decoder's input at masked places before it is multiplied by `noise_std`; the
            arguments are those of `normal_noise`.
    """

    draw_noise: Callable[[Tensor, Tensor, int, int], Tensor]

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        # the masks of a sample cover nearly all of its places
        self.target_is_per_row = False
        loss = config.loss
        self.cls_weight, self.cls_per_batch = 0.0, False
        if isinstance(loss, ClassTokenLossConfig):
            self.cls_weight, self.cls_per_batch = loss.cls_weight, loss.cls_scale == "per_batch"
        self.draw_noise = normal_noise

    def forward(self, batch: MaskedBatch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        """Compute the loss of one batch.

        Args:
            batch: the batch, with several masks per sample.
            teacher: a module of the class of `student.averaged`, in eval mode, of any floating dtype.
            moments: whether to compute `StepOutput.moments`.

        Raises:
            ValueError: the batch has no masks for several rows per sample, or `teacher` is in training mode.
        """
        if batch.visible is None or batch.noise_keys is None:
            raise ValueError(
                "`batch` must have `visible` and `noise_keys`, the masks of data2vec 2.0, but lacks them: make it with "
                "a configuration whose `d2v.objective` is the model's."
            )
        with self.part("student forward"):
            masked, unmasked = self.embed(batch)
        places = Places.of(batch, unmasked.num_places)
        with self.part("teacher forward"):
            features = self.teacher_features(unmasked, teacher, batch.rows)
        with self.part("student forward"):
            encoded = masked.run(self.student.averaged).last_hidden
            skipped = self.student.num_prefix_tokens
            prediction = self.decode(encoded[:, skipped:], places, batch.noise_keys)
        with self.part("target + loss"):
            return self.multi_mask_objective(prediction, encoded[:, :skipped], features, places, batch.lengths, moments)

    def shape_varies(self, batch: Batch) -> str | None:
        """See `Data2Vec`."""
        if batch.visible_lengths is not None:
            return "samples of different lengths have another number of masked places in every batch"
        return super().shape_varies(batch)

    def with_fixed_shapes(self, batch: Batch, *, fixed_counts: bool) -> Batch:
        """See `Data2Vec`. The numbers of visible and masked places are fixed already."""
        return self.with_drawn_drops(batch, fixed_counts=fixed_counts)

    def decode(self, encoded: Tensor, places: Places, noise_keys: Tensor) -> Tensor:
        """Predict `[N, D]` at the masked places from the encoder's output `[R, V, D]` at the visible ones.

        Args:
            encoded: `[R, V, D]`, without class token.
            places: of the masked samples.
            noise_keys: int64 `[R]`.
        """
        assert isinstance(self.head, ConvDecoder)
        with torch.no_grad():
            noise = self.draw_noise(noise_keys, places.rows, places.num_places, encoded.shape[-1])
            noise = noise.to(encoded.dtype).mul_(self.head.noise_std)
        prediction: Tensor = self.head(encoded, places, noise)
        return prediction

    def multi_mask_objective(
        self,
        prediction: Tensor,
        class_tokens: Tensor,
        features: list[Tensor],
        places: Places,
        lengths: Tensor | None,
        moments: bool = True,
    ) -> StepOutput:
        """Compute the loss between predictions and the normalized average of the features.

        Args:
            prediction: `[N, D]`, from `decode`.
            class_tokens: `[R, 1, D]`, the encoder's output; `[R, 0, D]` without class token.
            features: K tensors `[B, P, D]`, from `teacher_features`.
            places: of the masked samples.
            lengths: int64 `[B]`, valid places of each sample, for statistics over places. `None` means all.
            moments: whether to compute `StepOutput.moments`.
        """
        # once per sample: the predictions of its masks share it
        target = ops.topk_target(
            features,
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
            lengths=lengths,
            eps=self.target.eps,
        )
        loss, sums = ops.masked_smooth_l1(
            prediction,
            target.flatten(0, 1),
            beta=self.beta,
            reduction="sum",
            target_rows=places.sources(places.rows, len(target)),
            moments=moments,
        )
        num_rows = len(places.rows)
        if self.cls_weight == 0.0 or class_tokens.shape[1] == 0:
            return StepOutput(loss, num_rows, sums)
        class_loss = self._class_loss(class_tokens[:, 0], target, num_rows)
        return StepOutput(loss + class_loss, num_rows, sums, class_loss)

    def _class_loss(self, class_tokens: Tensor, target: Tensor, num_rows: int) -> Tensor:
        """Return the loss between class tokens `[R, D]` and the mean target of all places, 0-d.

        The published weight multiplies a sum over rows by the masked places of the micro-batch. Here that sum is a mean
        unless the configuration asks for it.
        """
        R, B = len(class_tokens), len(target)
        weight = self.cls_weight * num_rows
        return ops.masked_smooth_l1(
            class_tokens.contiguous(),
            target.mean(1),
            beta=self.beta,
            scale=weight if self.cls_per_batch else weight / R,
            reduction="sum",
            target_rows=torch.arange(R, device=target.device) // (R // B),
            moments=False,
        ).loss
