"""Heads on the speech encoder, as Transformers builds them: letters of every frame, or a class of the recording.

Shape letters: B samples, T frames, D width, V letters, C classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from d2v_fast.modalities.speech.config_finetune import SpeechClassifyConfig, SpeechCtcConfig
from d2v_fast.models.layers import Linear, dropout
from d2v_fast.models.post_norm import clear_padding, mean_of_places

__all__ = ["LetterHead", "RecordingHead", "make_head"]


class LetterHead(nn.Module):
    """Classify frames.

    Args:
        config: the run's section, with `labels`.
    """

    def __init__(self, config: SpeechCtcConfig) -> None:
        super().__init__()
        self.dropout = config.head.dropout
        self.classifier = Linear(config.model.width, len(config.labels or ()))
        # as published
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits `[B, T, V]`.

        Args:
            hidden: `[B, T, D]`; padding may hold any value.
            lengths: int64 `[B]`, frames of each recording before its padding; None means T.
        """
        logits: Tensor = self.classifier(dropout(clear_padding(hidden, lengths), self.dropout, self.training))
        return logits


class RecordingHead(nn.Module):
    """Classify recordings by the mean of their projected frames. Both maps begin with PyTorch's initialization.

    Args:
        config: the run's section, with `labels`.
    """

    def __init__(self, config: SpeechClassifyConfig) -> None:
        super().__init__()
        self.dropout = config.head.dropout
        self.projector = Linear(config.model.width, config.head.projection)
        self.classifier = Linear(config.head.projection, len(config.labels or ()))

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits `[B, C]`.

        Args:
            hidden: `[B, T, D]`; padding may hold any value.
            lengths: int64 `[B]`, frames of each recording before its padding; None means T.
        """
        frames = self.projector(dropout(clear_padding(hidden, lengths), self.dropout, self.training))
        logits: Tensor = self.classifier(mean_of_places(frames, lengths))
        return logits


def make_head(config: SpeechCtcConfig | SpeechClassifyConfig) -> nn.Module:
    """Return the head of a run, with new weights."""
    return LetterHead(config) if isinstance(config, SpeechCtcConfig) else RecordingHead(config)
