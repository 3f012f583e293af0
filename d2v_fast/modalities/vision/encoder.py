"""The image encoder: patch embeddings, mask token, class token, pre-norm blocks.

Shape letters: B batch, C channels, P patches, D width, N masked rows, G patches along one side of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_fast.config import VisionModelConfig
from d2v_fast.models.encoder import Drops, Encoder, EncoderOutput
from d2v_fast.models.layers import Linear, init_linear_, truncated_normal_
from d2v_fast.models.pre_norm import PreNormBlock, RelativePositionBias
from d2v_fast.models.student import MaskedBatch, Student, masked_places


def patches_of(pixels: Tensor, channels: int, image_size: int, patch_size: int) -> Tensor:
    """Return the values of square patches, `[B, P, C * patch_size ** 2]`, in the order of a convolution's weight.

    Args:
        pixels: `[B, C, image_size, image_size]`.
        channels: C.
        image_size, patch_size: sides in pixels.

    Raises:
        ValueError: `pixels` have another shape.
    """
    expected = (channels, image_size, image_size)
    if pixels.dim() != 4 or pixels.shape[1:] != expected:
        raise ValueError(f"`pixels` must be [B, {', '.join(map(str, expected))}], but is {list(pixels.shape)} instead.")
    B, G, S = pixels.shape[0], image_size // patch_size, patch_size
    patches = pixels.view(B, channels, G, S, G, S).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, G * G, channels * S * S)


class VisionEmbedding(nn.Module):
    """Linear embedding of square patches without overlap.

    Positions enter as an attention bias in the blocks, and with `absolute_position` as learned embeddings here. The
    linear map equals the published convolution with `kernel = stride = patch_size`: its weight
    `[D, C * patch_size ** 2]` is the convolution's weight, flattened.
    """

    def __init__(self, config: VisionModelConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.channels = config.channels
        self.grid_size = config.grid_size
        patch_values = config.channels * config.patch_size * config.patch_size
        self.projection = Linear(patch_values, config.width)
        # the published recipe decays the mask token but not the class token; 1-D parameters are not decayed,
        # so the shapes distinguish them
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.mask_token = nn.Parameter(torch.empty(1, config.width))
        shape = (1 + config.num_patches, config.width)
        self.position = nn.Parameter(torch.empty(shape)) if config.absolute_position else None
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the published initialization: truncated normal, zero bias."""
        init_linear_(self.projection)
        truncated_normal_(self.cls_token)
        truncated_normal_(self.mask_token)
        if self.position is not None:
            truncated_normal_(self.position)

    def forward(self, pixels: Tensor, rows: Tensor | None = None) -> Tensor:
        """Embed a batch of images.

        Args:
            pixels: `[B, C, image_size, image_size]`, normalized.
            rows: int64 `[N]`, flat indices `b * P + p`, without repeats, of the patches to mask; or bool `[B * P]`,
                True at these.

        Returns:
            `[B, 1 + P, D]`, class token first.

        Raises:
            ValueError: `pixels` have another shape.
        """
        # pixels are fp32; the model may have a lower precision
        pixels = pixels.to(self.projection.weight.dtype)
        patches = patches_of(pixels, self.channels, self.image_size, self.patch_size)
        B, P, _ = patches.shape
        tokens = self.projection(patches.flatten(0, 1))
        if rows is not None and rows.dtype == torch.bool:
            tokens = torch.where(rows[:, None], self.mask_token.to(tokens.dtype), tokens)
        elif rows is not None:
            # in place: `tokens` is new, and the projection's backward pass does not read it
            tokens.index_copy_(0, rows, self.mask_token.to(tokens.dtype).expand(len(rows), -1))
        cls_token = self.cls_token.expand(B, 1, -1)
        tokens = torch.cat((cls_token, tokens.view(B, P, self.projection.out_features)), dim=1)
        if self.position is not None:
            tokens = tokens + self.position
        return self.dropout(tokens)


@dataclass(frozen=True)
class EmbeddedImages:
    """Input of `VisionModel`: the images themselves, since the whole model is averaged.

    Attributes:
        pixels: `[B, C, H, W]`, normalized.
        num_places: P.
        rows: int64 `[N]`, flat indices `b * P + p` of the patches to mask; or bool `[B * P]`. `None` masks nothing.
        drop_keys: see `models.encoder.Drops`.
    """

    pixels: Tensor
    num_places: int
    rows: Tensor | None = None
    drop_keys: Drops = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.pixels)

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`."""
        output: EncoderOutput = averaged(self.pixels, self.rows, self.drop_keys, top_k=top_k, output_rows=output_rows)
        return output


class VisionModel(Student):
    """The image encoder, averaged into the teacher as a whole.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    num_prefix_tokens = 1
    entrance_name = "embedding"
    upper_names = ("norm.", "position_bias.")

    def __init__(self, config: VisionModelConfig) -> None:
        super().__init__()
        self.width = config.width
        self.num_patches = config.num_patches
        self.embedding = VisionEmbedding(config)
        # shared by all blocks, unless each has its own
        shared = config.position_bias == "shared"
        self.position_bias = RelativePositionBias(config.grid_size, config.heads) if shared else None
        self.encoder = Encoder(
            (PreNormBlock(config, index) for index in range(config.depth)),
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        pixels: Tensor,
        rows: Tensor | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
        output_rows: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode a batch of images. The caller applies `norm`, if need be to some rows only.

        Args:
            pixels: `[B, C, H, W]`, normalized.
            rows: int64 `[N]`, flat indices `b * P + p` of the patches to mask; or bool `[B * P]`. `None` masks nothing.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' outputs to return.
            output_rows: int64 `[M]`, flat indices `b * P + p` of the only patches that the last block computes.
                `None` computes all.

        Returns:
            `last_hidden` `[B, 1 + P, D]`, class token first, and K features of that shape. With `output_rows`,
            `last_hidden` and the last feature are `[M, D]`.
        """
        token_rows = None if output_rows is None else self.token_rows(output_rows, self.num_patches)
        bias = None if self.position_bias is None else self.position_bias()
        output: EncoderOutput = self.encoder(self.embedding(pixels, rows), bias, top_k, token_rows, drop_keys)
        return output

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`; images have no `lengths`."""
        output: EncoderOutput = self(inputs, top_k=top_k)
        return [feature[:, 1:] for feature in output.features]

    def embed(self, batch: MaskedBatch) -> tuple[EmbeddedImages, EmbeddedImages]:
        """See `Student`; images share nothing."""
        rows = batch.rows
        if batch.num_rows is not None:
            rows = masked_places(rows, batch.num_rows, len(batch.inputs) * self.num_patches)
        student = EmbeddedImages(batch.inputs, self.num_patches, rows, batch.drop_keys)
        return student, EmbeddedImages(batch.inputs, self.num_patches)

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`."""
        hidden: Tensor = self(batch.inputs, None, batch.drop_keys).last_hidden
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """See `Student`; applies the last norm."""
        normed: Tensor = self.norm(hidden)
        return normed

    def make_head(self) -> Linear:
        """See `Student`."""
        head = Linear(self.width, self.width)
        init_linear_(head)
        return head
