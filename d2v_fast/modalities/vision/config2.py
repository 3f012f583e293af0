"""Configuration sections of data2vec 2.0 on images. The defaults are the published ViT-B run (arXiv 2212.07525)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.data2vec2 import (
    ClassTokenLossConfig,
    DecoderConfig,
    MaskedEncoderSection,
    MultiMaskSection,
    problems_of_counts,
)
from d2v_fast.config.errors import MAX_SIZE, Problem, refuse_if
from d2v_fast.config.schema import GuardConfig, ScheduleConfig, TargetConfig, TeacherConfig
from d2v_fast.modalities.vision.config import ImageModelSection, ImagesConfig, VisionDataConfig, VisionProbeConfig


class MaskedVisionModelConfig(MaskedEncoderSection, ImageModelSection):
    """The image encoder: patches with fixed sine positions, a class token, post-norm blocks."""

    context_depth: int = Field(default=2, ge=0, le=MAX_SIZE)
    depth: int = Field(default=10, ge=1, le=MAX_SIZE)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    decoder: DecoderConfig = DecoderConfig(width=768, depth=6, kernel=3, groups=16)

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.width % 4:
            must = "be a multiple of 4: sine and cosine of row and column"
            refuse_if([Problem("width", must, self.width)])
        return self


class InverseBlockMaskConfig(MultiMaskSection):
    """Masks that leave square blocks of patches visible.

    Attributes:
        kind: Kind of the masks.
        length: Patches along the side of a block.
        prob_adjust: Added to the visible share when blocks are placed, to make up for their overlap.
    """

    kind: Literal["inverse_block"] = "inverse_block"
    num_masks: int = Field(default=16, ge=1, le=1024)
    prob: float = Field(default=0.8, gt=0, lt=1)
    length: int = Field(default=3, ge=1, le=MAX_SIZE)
    prob_adjust: float = Field(default=0.07, ge=0, le=1)


class MaskedVisionConfig(ImagesConfig):
    """data2vec 2.0 on images. The defaults are the published ViT-B run."""

    objective: Literal["data2vec2"] = "data2vec2"
    decay_1d: bool = True
    model: MaskedVisionModelConfig = MaskedVisionModelConfig()
    mask: InverseBlockMaskConfig = InverseBlockMaskConfig()
    target: TargetConfig = TargetConfig(top_k=10, layer_norm="instance", final_norm="layer")
    loss: ClassTokenLossConfig = ClassTokenLossConfig(beta=0.0, channel_reduction="rsqrt")
    teacher: TeacherConfig = TeacherConfig(decay_start=0.9998, decay_end=0.99999, decay_steps=100_000)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", steps=375_300, warmup_steps=50_040)
    data: VisionDataConfig = VisionDataConfig(crop_scale=(0.2, 1.0))
    guard: GuardConfig = GuardConfig(min_target_std=0.0, min_prediction_std=0.0)
    probe: VisionProbeConfig = VisionProbeConfig()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        model, mask = sections.get("model"), sections.get("mask")
        if model and mask:
            yield from problems_of_counts(mask.prob, model.num_patches, "patch")
            if mask.length > model.grid_size:
                yield Problem("mask.length", f"be in [1, {model.grid_size}]", mask.length)
        yield from super().problems_across(sections)
