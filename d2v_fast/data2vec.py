"""data2vec: the student regresses what the teacher makes of the unmasked input (arXiv 2202.03555, section 3).

Shape letters: B batch, C channels, P patches, T = 1 + P tokens, D width, N masked rows, K averaged layers.

The teacher is an average of the student's encoder over time. It is handed in at every step and is no
submodule, so neither the optimizer nor DeepSpeed takes it for a part of the model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import D2VConfig, VisionModelConfig
from d2v_fast.encoder import Encoder, EncoderOutput, RelativePositionBias, init_linear_
from d2v_fast.modalities.vision import VisionEmbedding


class MaskedImages(Protocol):
    """What a step needs of a batch.

    Attributes:
        pixels: `[B, C, H, W]`, normalised.
        rows: int64 `[N]`, flat indices `b * P + p` of the masked patches, without repeats.
    """

    @property
    def pixels(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...


class StepOutput(NamedTuple):
    """One forward pass of the objective.

    Attributes:
        loss_sum: 0-d fp32, the loss summed over masked rows and channels: whoever trains divides by the rows
            of the global batch, so that the loss does not depend on how that batch is split.
        num_rows: N, masked rows of this batch.
        moments: fp32 `[4, D]`, sums over the rows of prediction, prediction^2, target, target^2; no gradient.
    """

    loss_sum: Tensor
    num_rows: int
    moments: Tensor


class VisionModel(nn.Module):
    """The image encoder: what is averaged into the teacher, and what is exported.

    Args:
        config: sizes and rates. The parameters are drawn from torch's global generator.
    """

    def __init__(self, config: VisionModelConfig) -> None:
        super().__init__()
        self.num_patches = config.num_patches
        self.embedding = VisionEmbedding(config)
        self.position_bias = RelativePositionBias(config.grid_size, config.heads)
        self.encoder = Encoder(config)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self, pixels: Tensor, rows: Tensor | None = None, top_k: int = 0, output_rows: Tensor | None = None
    ) -> EncoderOutput:
        """Encode a batch of images. `norm` is left to the caller, who may want it on some rows only.

        Args:
            pixels: `[B, C, H, W]`, normalised.
            rows: int64 `[N]`, flat indices `b * P + p` of the patches to mask; None masks nothing.
            top_k: K, how many of the last blocks' outputs to return.
            output_rows: int64 `[M]`, flat indices `b * P + p`: the only patches at which the last block's output is
                wanted; None: the whole output.
        Returns:
            `last_hidden` `[B, 1 + P, D]`, class token first, and K features of that shape. With `output_rows`,
            `last_hidden` and the last feature are `[M, D]`.
        """
        token_rows = None if output_rows is None else self.token_rows(output_rows)
        output: EncoderOutput = self.encoder(self.embedding(pixels, rows), self.position_bias(), top_k, token_rows)
        return output

    def token_rows(self, rows: Tensor) -> Tensor:
        """From rows of patches `b * P + p` to rows of tokens: a class token precedes the patches of every image."""
        return rows + rows // self.num_patches + 1


class Data2Vec(nn.Module):
    """Student encoder, regression head, and the objective.

    Args:
        config: the model, which of the teacher's layers make the target and how, and the loss.
    """

    def __init__(self, config: D2VConfig) -> None:
        super().__init__()
        self.target = config.target
        self.num_patches = config.model.num_patches
        # statistics over positions need the last layer at all of them
        self.target_is_per_row = {config.target.layer_norm, config.target.final_norm} <= {"none", "layer"}
        self.beta = config.loss.beta
        self.student = VisionModel(config.model)
        self.head = nn.Linear(config.model.width, config.model.width)
        init_linear_(self.head)

    def forward(self, batch: MaskedImages, teacher: nn.Module) -> StepOutput:
        """Loss of one batch against a teacher: a `VisionModel` in eval mode, of any floating dtype.

        Raises:
            ValueError: `batch` is not as `MaskedImages` describes it. Rows out of range are torch's IndexError or
                RuntimeError on a CPU; a GPU is not waited for.
        """
        rows = batch.rows
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(
                f"`rows` must be a 1-d int64 tensor, but is {rows.dtype} of shape {list(rows.shape)} instead. "
                "A mask `[B, P]`, True where masked, has the rows `mask.flatten().nonzero()[:, 0]`."
            )
        if rows.device != batch.pixels.device:
            raise ValueError(
                f"`rows` must be on {batch.pixels.device} as `pixels` are, but is on {rows.device} instead."
            )
        # the teacher goes first: its working memory is free again when the student's activations pile up
        features = self.teacher_features(batch, teacher)
        return self.objective(self.student_forward(batch), features, batch.rows)

    def student_forward(self, batch: MaskedImages) -> Tensor:
        """Predictions `[N, D]` at the masked patches of the masked images; norm and head see no other row."""
        hidden = self.student(batch.pixels, batch.rows, output_rows=batch.rows).last_hidden
        prediction: Tensor = self.head(self.student.norm(hidden))
        return prediction

    @torch.no_grad()
    def teacher_features(self, batch: MaskedImages, teacher: nn.Module) -> list[Tensor]:
        """Outputs `[B, P, D]` of the teacher's last K blocks at the patches of the unmasked images.

        Where the target is a function of each row alone, the last of them is computed at `batch.rows` only: its other
        rows are uninitialised.
        """
        if teacher.training:
            raise ValueError("`teacher` must be in eval mode, but is in training mode instead: `teacher.eval()`.")
        # a working copy in the compute dtype needs no autocast, which would only run its norms in fp32
        is_working_copy = next(teacher.parameters()).dtype != torch.float32
        device_type = batch.pixels.device.type
        without_autocast = is_working_copy and torch.amp.is_autocast_available(device_type)
        with torch.autocast(device_type, enabled=False) if without_autocast else nullcontext():
            output_rows = batch.rows if self.target_is_per_row else None
            *features, last = teacher(batch.pixels, top_k=self.target.top_k, output_rows=output_rows).features
        features = [feature[:, 1:] for feature in features]
        if output_rows is None:
            return [*features, last[:, 1:]]
        # laid out as the other layers are, class token and all: layers with different strides would be copied
        scattered = last.new_empty(len(batch.pixels), 1 + self.num_patches, last.shape[1])
        scattered.flatten(0, 1).index_copy_(0, self.student.token_rows(output_rows), last)
        return [*features, scattered[:, 1:]]

    def objective(self, prediction: Tensor, features: list[Tensor], rows: Tensor) -> StepOutput:
        """Regress the normalised average of the features at the masked rows.

        Args:
            prediction: `[N, D]`, of `student_forward`.
            features: K tensors `[B, P, D]`, of `teacher_features`.
            rows: int64 `[N]`.
        """
        loss, moments = ops.data2vec_loss(
            prediction,
            features,
            layer_norm=self.target.layer_norm,
            final_norm=self.target.final_norm,
            rows=rows,
            eps=self.target.eps,
            beta=self.beta,
            reduction="sum",
        )
        return StepOutput(loss, len(rows), moments)


def build_model(config: D2VConfig) -> Data2Vec:
    """A student with the published initialisation; seed torch before calling."""
    return Data2Vec(config)
