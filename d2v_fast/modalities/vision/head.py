"""The classifier of images: a norm and a linear map of the pooled output of the encoder."""

from __future__ import annotations

from torch import Tensor, nn

from d2v_fast.modalities.vision.config_finetune import VisionClassifyConfig
from d2v_fast.models.layers import Linear, dropout, init_linear_


class ImageHead(nn.Module):
    """Classify images by the mean of their patches, or by the class token.

    Args:
        config: the run's section, with `labels`.
    """

    def __init__(self, config: VisionClassifyConfig) -> None:
        super().__init__()
        self.uses_mean, self.dropout = config.head.pooling == "mean", config.head.dropout
        # the epsilon of the encoder's last norm, which this one replaces
        self.norm = nn.LayerNorm(config.model.width, eps=getattr(config.model, "norm_eps", 1e-6))
        self.classifier = Linear(config.model.width, len(config.labels or ()))
        init_linear_(self.classifier)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`.

        Args:
            hidden: `[B, 1 + P, D]`, class token first.
            lengths: not read; images have no padding.
        """
        pooled = hidden[:, 1:].mean(1) if self.uses_mean else hidden[:, 0]
        logits: Tensor = self.classifier(dropout(self.norm(pooled), self.dropout, self.training))
        return logits
