"""The encoder of curves, of the parts that all encoders share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.post_norm import post_norm_encoder
from d2v_fast.models.student import MaskedBatch, Student, masked_places
from tests.fake_modality.config import CurvesModelConfig


class CurvesContext(nn.Module):
    """The blocks."""

    def __init__(self, config: CurvesModelConfig) -> None:
        super().__init__()
        self.encoder = post_norm_encoder(config)

    def forward(
        self,
        x: Tensor,
        drop_keys: Drops = None,
        top_k: int = 0,
        output_rows: Tensor | None = None,
    ) -> EncoderOutput:
        """`[B, T, D]` to an `EncoderOutput`."""
        x = x.to(next(self.parameters()).dtype)
        output: EncoderOutput = self.encoder(x, None, top_k, output_rows, drop_keys)
        return output


@dataclass(frozen=True)
class EmbeddedPoints:
    """Input of `CurvesContext`: points `[B, T, D]`."""

    points: Tensor
    drop_keys: Drops = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.points)

    @property
    def num_places(self) -> int:
        """T."""
        return self.points.shape[1]

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`."""
        output: EncoderOutput = averaged(self.points, self.drop_keys, top_k=top_k, output_rows=output_rows)
        return output


class CurvesModel(Student):
    """The teacher shares the linear map."""

    averaged_name = "context"
    entrance_name = "embedding"

    def __init__(self, config: CurvesModelConfig) -> None:
        super().__init__()
        self.width = config.width
        self.embedding = nn.Linear(config.channels, config.width)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.context = CurvesContext(config)

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`."""
        output: EncoderOutput = self.context(self.embedding(inputs), top_k=top_k)
        return output.features

    def embed(self, batch: MaskedBatch) -> tuple[EmbeddedPoints, EmbeddedPoints]:
        """See `Student`."""
        points = self.embedding(batch.inputs)
        token, flat = self.mask_token.to(points.dtype), points.flatten(0, 1)
        if batch.num_rows is None:
            masked = flat.index_copy(0, batch.rows, token.expand(len(batch.rows), -1))
        else:
            masked = torch.where(masked_places(batch.rows, batch.num_rows, len(flat))[:, None], token, flat)
        masked = masked.view_as(points)
        return EmbeddedPoints(masked, batch.drop_keys), EmbeddedPoints(points.detach())

    def make_head(self) -> nn.Module:
        """See `Student`."""
        return nn.Linear(self.width, self.width)
