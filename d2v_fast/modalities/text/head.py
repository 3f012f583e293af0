"""The head of text: two linear maps of the encoder's pooled output, with a tanh between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2v_fast.modalities.text.config_finetune import TextClassifyConfig, TextFinetuneConfig
from d2v_fast.models.layers import Linear, dropout, init_linear_
from d2v_fast.models.post_norm import mean_of_places


class TextHead(nn.Module):
    """Classify or score texts by their begin token, as RoBERTa does, or by the mean of their tokens.

    Args:
        config: The run's section; of a classification with `labels`.
    """

    def __init__(self, config: TextFinetuneConfig) -> None:
        super().__init__()
        width = config.model.width
        is_class = isinstance(config, TextClassifyConfig)
        self.uses_mean, self.dropout = config.head.pooling == "mean", config.head.dropout
        self.returns_scores = not is_class
        self.dense = Linear(width, width)
        self.out = Linear(width, len(config.labels or ()) if is_class else 1)
        for linear in (self.dense, self.out):
            init_linear_(linear)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`, or scores `[B]`.

        Args:
            hidden: `[B, T, D]`, begin token first.
            lengths: int64 `[B]`, tokens of each text before its padding; None means T.
        """
        pooled = mean_of_places(hidden, lengths) if self.uses_mean else hidden[:, 0]
        x = torch.tanh(self.dense(dropout(pooled, self.dropout, self.training)))
        predicted: Tensor = self.out(dropout(x, self.dropout, self.training))
        return predicted[:, 0] if self.returns_scores else predicted
