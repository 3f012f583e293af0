"""The head of text: two linear maps of the encoder's output at the begin token, with a tanh between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2v_fast.modalities.text.config_finetune import TextClassifyConfig, TextFinetuneConfig
from d2v_fast.models.layers import Linear, dropout, init_linear_


class TextHead(nn.Module):
    """Classify or score texts by their begin token, as RoBERTa does.

    Args:
        config: The run's section; of a classification with `labels`.
    """

    def __init__(self, config: TextFinetuneConfig) -> None:
        super().__init__()
        width = config.model.width
        is_class = isinstance(config, TextClassifyConfig)
        self.dropout, self.returns_scores = getattr(config.head, "dropout", 0.0), not is_class
        self.dense = Linear(width, width)
        self.out = Linear(width, len(config.labels or ()) if is_class else 1)
        for linear in (self.dense, self.out):
            init_linear_(linear)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`, or scores `[B]`.

        Args:
            hidden: `[B, T, D]`, begin token first.
            lengths: Not read: padding stands behind the begin token.
        """
        x = torch.tanh(self.dense(dropout(hidden[:, 0], self.dropout, self.training)))
        predicted: Tensor = self.out(dropout(x, self.dropout, self.training))
        return predicted[:, 0] if self.returns_scores else predicted
