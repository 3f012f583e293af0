"""Speech: waveforms, one row per frame."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v_fast.modalities import Modality
from d2v_fast.modalities.speech.config import SpeechConfig

if TYPE_CHECKING:
    from d2v_fast.data import BatchMaker
    from d2v_fast.modalities.speech.encoder import SpeechModel

__all__ = ["MODALITY"]


def _encoder() -> type[SpeechModel]:
    from d2v_fast.modalities.speech.encoder import SpeechModel

    return SpeechModel


def _batches(config: SpeechConfig) -> BatchMaker:
    from d2v_fast.modalities.speech.batches import SpeechBatches, speech_dataset

    return SpeechBatches(speech_dataset(config), config)


MODALITY = Modality(name="speech", place="frame", config=SpeechConfig, encoder=_encoder, batches=_batches)
