"""The image encoder of data2vec 2.0: patches with fixed positions, a class token, post-norm blocks.

Shape letters: B samples, C channels, P patches, R rows (masked copies of samples), V visible patches of a row, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_fast.config import MaskedVisionModelConfig
from d2v_fast.modalities.vision.encoder import patches_of
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.layers import Linear
from d2v_fast.models.student import MaskedBatch, Student
from d2v_fast.models.visible import MaskedContext, Places, sine_positions


class PatchEmbedding(nn.Module):
    """Linear embedding of square patches with fixed positions, and the class token, which has none."""

    positions: Tensor

    def __init__(self, config: MaskedVisionModelConfig) -> None:
        super().__init__()
        self.shape = (config.channels, config.image_size, config.patch_size)
        self.projection = Linear(config.channels * config.patch_size**2, config.width)
        self.cls_token = nn.Parameter(torch.empty(config.width))
        self.register_buffer("positions", sine_positions(config.width, config.grid_size), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the published initialization: Xavier-uniform weight, PyTorch's bias, class token N(0, 1)."""
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.normal_(self.cls_token)

    def forward(self, pixels: Tensor, places: Places | None = None) -> Tensor:
        """Embed `[B, C, H, W]` as `[B, 1 + P, D]`, class token first; with `places` the visible ones, `[R, 1 + V, D]`.

        Raises:
            ValueError: `pixels` have another shape.
        """
        # pixels are fp32; the model may have another precision
        patches = patches_of(pixels.to(self.projection.weight.dtype), *self.shape)
        tokens = self.projection(patches) + self.positions
        if places is not None:
            tokens = places.gather(tokens)
        return torch.cat((self.cls_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), dim=1)


@dataclass(frozen=True)
class MaskedImages:
    """Input of `MaskedVisionModel`: the images themselves, since the whole model is averaged.

    Attributes:
        pixels: `[B, C, H, W]`, normalized.
        num_places: P.
        places: visible and masked patches. `None`: all are visible.
        drop_keys: see `models.encoder.Drops`.
    """

    pixels: Tensor
    num_places: int
    places: Places | None = None
    drop_keys: Drops = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.pixels)

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`; computes all rows."""
        output: EncoderOutput = averaged(self.pixels, self.places, self.drop_keys, top_k=top_k)
        return output


class MaskedVisionModel(Student):
    """The image encoder, averaged into the teacher as a whole.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    num_prefix_tokens = 1
    entrance_name = "embedding"

    def __init__(self, config: MaskedVisionModelConfig) -> None:
        super().__init__()
        self.width, self.decoder_config = config.width, config.decoder
        self.num_patches, self.grid_size = config.num_patches, config.grid_size
        self.embedding = PatchEmbedding(config)
        self.context = MaskedContext(config, has_norm=True)

    def forward(
        self,
        pixels: Tensor,
        places: Places | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
    ) -> EncoderOutput:
        """Encode a batch of images.

        Args:
            pixels: `[B, C, H, W]`, normalized.
            places: visible and masked patches of every row. `None`: all are visible, and R is B.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' features to return.

        Returns:
            `last_hidden` and K features, each `[R, 1 + V, D]`, class token first.
        """
        return self.context.encode(self.embedding(pixels, places), None, top_k, drop_keys)

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`; images have no `lengths`.

        Of several blocks these are what the MLPs add, as in the target; of one block, the encoder's output.
        """
        output: EncoderOutput = self(inputs, top_k=top_k)
        found = [output.last_hidden] if top_k == 1 else output.features
        return [feature[:, 1:] for feature in found]

    def embed(self, batch: MaskedBatch) -> tuple[MaskedImages, MaskedImages]:
        """See `Student`; images share nothing."""
        places = Places.of(batch, self.num_patches)
        student = MaskedImages(batch.inputs, self.num_patches, places, batch.drop_keys)
        return student, MaskedImages(batch.inputs, self.num_patches)

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`."""
        hidden: Tensor = self(batch.inputs, None, batch.drop_keys).last_hidden
        return hidden

    def make_head(self) -> ConvDecoder:
        """See `Student`; a decoder with 2-D convolutions."""
        return ConvDecoder(self.width, self.decoder_config, self.grid_size)
