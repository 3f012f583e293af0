"""The image encoder as an ONNX graph.

Input: `pixel_values` fp32 `[B, C, H, W]`. Output: `last_hidden_state` `[B, 1 + P, D]`, class token first, after the
last norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2v_fast.interop.onnx import EXAMPLE_BATCH, Graph
from d2v_fast.modalities.vision.config import ImagesConfig
from d2v_fast.models.student import Student


def vision_graph(model: Student, config: ImagesConfig) -> Graph:
    """Return the graph to export for an encoder in eval mode."""
    sizes = config.model
    pixels = torch.zeros(EXAMPLE_BATCH, sizes.channels, sizes.image_size, sizes.image_size)
    return Graph(_Vision(model), {"pixel_values": pixels}, {"pixel_values": {0: torch.export.Dim("batch")}})


class _Vision(nn.Module):
    """An image encoder with its last norm."""

    def __init__(self, model: Student) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.finish(self.model(pixel_values).last_hidden)
