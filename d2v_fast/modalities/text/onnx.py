"""The text encoder as an ONNX graph.

Inputs: `input_ids` int64 `[B, T]`, padded on either side, and `attention_mask` int64 `[B, T]`. Output:
`last_hidden_state` `[B, T, D]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.interop.onnx import EXAMPLE_BATCH, Graph
from d2v_fast.modalities.text.config import POSITION_OFFSET, DocumentsConfig
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.encoder2 import MaskedTextModel

# sequence length of the example input for tracing
_TOKENS = 6


def text_graph(model: TextModel | MaskedTextModel, config: DocumentsConfig) -> Graph:
    """Return the graph of an encoder in eval mode."""
    most = model.embedding.max_positions
    tokens = torch.zeros(EXAMPLE_BATCH, min(_TOKENS, most), dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch, length = torch.export.Dim("batch"), torch.export.Dim("sequence", max=most)
    return Graph(_Text(model), inputs, {name: {0: batch, 1: length} for name in inputs})


class _Text(nn.Module):
    """A text encoder that counts positions over the tokens that are not padding."""

    def __init__(self, model: TextModel | MaskedTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedding = self.model.embedding
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + POSITION_OFFSET
        x = embedding.norm(embedding.token(input_ids) + F.embedding(positions, embedding.position))
        # of data2vec 2.0 with context blocks
        norm = getattr(self.model.context, "norm", None)
        x = x if norm is None else norm(x)
        hidden: Tensor = self.model.context.encoder(x, attention_mask[:, None, None, :] != 0).last_hidden
        return hidden
