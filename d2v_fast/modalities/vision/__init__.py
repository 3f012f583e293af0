"""Images: patches, one row per patch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v_fast.modalities import Modality
from d2v_fast.modalities.vision.config import VisionConfig

if TYPE_CHECKING:
    from d2v_fast.data import BatchMaker
    from d2v_fast.modalities.vision.encoder import VisionModel

__all__ = ["MODALITY"]


def _encoder() -> type[VisionModel]:
    from d2v_fast.modalities.vision.encoder import VisionModel

    return VisionModel


def _batches(config: VisionConfig) -> BatchMaker:
    from d2v_fast.modalities.vision.batches import ImageBatches, image_dataset

    return ImageBatches(image_dataset(config), config)


MODALITY = Modality(name="vision", place="patch", config=VisionConfig, encoder=_encoder, batches=_batches)
