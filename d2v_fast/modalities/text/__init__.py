"""Text: token ids, one row per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v_fast.modalities import Modality
from d2v_fast.modalities.text.config import TextConfig

if TYPE_CHECKING:
    from d2v_fast.data import BatchMaker
    from d2v_fast.modalities.text.encoder import TextModel

__all__ = ["MODALITY"]


def _encoder() -> type[TextModel]:
    from d2v_fast.modalities.text.encoder import TextModel

    return TextModel


def _batches(config: TextConfig) -> BatchMaker:
    from d2v_fast.modalities.text.batches import TextBatches
    from d2v_fast.modalities.text.tasks import TextDataset

    return TextBatches(TextDataset(config.data, config.model, patience_s=config.run.timeout_s), config)


def _resolved(config: TextConfig) -> TextConfig:
    from d2v_fast.modalities.text.tasks import with_vocabulary

    return with_vocabulary(config)


MODALITY = Modality(
    name="text", place="token", config=TextConfig, encoder=_encoder, batches=_batches, resolved=_resolved
)
