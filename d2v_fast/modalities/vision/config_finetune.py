"""Configuration sections of the classification of images.

The defaults are the published ViT-B fine-tuning (arXiv 2202.03555, section 4.1, and its released recipe).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from d2v_fast.config.finetune import ClassHeadSection, ClassifyConfig, FewLabelsSection, FinetuneSection, ValidSection
from d2v_fast.config.schema import ScheduleConfig
from d2v_fast.modalities.vision.config import ImageInputsConfig, VisionDataConfig, VisionModelConfig
from d2v_fast.modalities.vision.config2 import MaskedVisionModelConfig


class LabeledImagesConfig(VisionDataConfig, FewLabelsSection):
    """Where the images and their classes come from, and how they are augmented.

    With "images", every sub-folder of `path` is a class.

    Attributes:
        mixup: Two images are blended with a share drawn from Beta(mixup, mixup), and so are their classes; 0 blends
            none.
        cutmix: A box of one image replaces that of another, with an area drawn from Beta(cutmix, cutmix); 0 replaces
            none. With both, half of the mixed pairs are blended.
        mix_prob: Share of the pairs of images that are mixed.
        erase_prob: Share of the images in which a box is replaced by noise.
    """

    own_preset: ClassVar[str] = "finetune_images"
    only_for: ClassVar[dict[str, tuple[str, ...]]] = VisionDataConfig.only_for

    mixup: float = Field(default=0.0, ge=0, le=100)
    cutmix: float = Field(default=0.0, ge=0, le=100)
    mix_prob: float = Field(default=1.0, ge=0, le=1)
    erase_prob: float = Field(default=0.0, ge=0, le=1)


class ImageHeadConfig(ClassHeadSection):
    """A classifier on the encoder's output.

    Attributes:
        pooling: What is classified: the "mean" of the patches, or the class "token".
    """

    pooling: Literal["mean", "token"] = "mean"


class VisionClassifyConfig(ImageInputsConfig, ClassifyConfig):
    """Classification of images, by either version of the encoder."""

    objective: Literal["classify"] = "classify"
    finetune: FinetuneSection = FinetuneSection(layer_decay=0.65)
    schedule: ScheduleConfig = ScheduleConfig(epochs=100, warmup_epochs=10, final_lr_ratio=2.5e-4)
    data: LabeledImagesConfig = LabeledImagesConfig()
    head: ImageHeadConfig = ImageHeadConfig(label_smoothing=0.1)
    valid: ValidSection = ValidSection()


class VisionClassifyConfig1(VisionClassifyConfig):
    """Classification of images by an encoder of the first version."""

    encoder: Literal["data2vec"] = "data2vec"
    model: VisionModelConfig = VisionModelConfig(drop_path=0.2, attention_dropout=0.0)


class VisionClassifyConfig2(VisionClassifyConfig):
    """Classification of images by an encoder of data2vec 2.0."""

    encoder: Literal["data2vec2"] = "data2vec2"
    model: MaskedVisionModelConfig = MaskedVisionModelConfig(layer_drop=0.2)


VisionClassifyConfig.by_encoder = {"data2vec": VisionClassifyConfig1, "data2vec2": VisionClassifyConfig2}
