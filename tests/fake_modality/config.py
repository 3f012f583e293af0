"""The `"d2v"` section of curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from d2v_fast.config import (
    DataSection,
    LossConfig,
    ModelSection,
    PretrainConfig,
    ScheduleConfig,
    TargetConfig,
    TeacherConfig,
)
from d2v_fast.config.errors import Section


class CurvesModelConfig(ModelSection):
    """A linear map of every vector, and post-norm blocks."""

    channels: int = Field(default=3, ge=1)
    width: int = Field(default=16, ge=1)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=2, ge=1)
    mlp_ratio: float = Field(default=2.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_drop: float = Field(default=0.2, ge=0, lt=1)
    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    gradient_checkpointing: bool = False

    def num_places(self, shape: Sequence[int]) -> int:
        """See `ModelSection`."""
        return shape[1]

    def without_skipping(self) -> CurvesModelConfig:
        """See `ModelSection`."""
        return self.model_copy(update={"layer_drop": 0.0})


class PointMaskConfig(Section):
    """Spans of `length` points; `prob` is the share that they would mask if none overlapped."""

    prob: float = Field(default=0.4, gt=0, le=1)
    length: int = Field(default=2, ge=1)


class CurvesDataConfig(DataSection):
    """`num_samples` curves of `length` points."""

    kind: Literal["waves"] = "waves"
    on_change: Literal["refuse", "accept"] = "refuse"
    num_workers: int = Field(default=0, ge=0)
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    strict: bool = False
    num_samples: int = Field(default=120, ge=1)
    length: int = Field(default=12, ge=2)


class CurvesConfig(PretrainConfig):
    """Curves."""

    modality: Literal["curves"] = "curves"
    model: CurvesModelConfig = CurvesModelConfig()
    mask: PointMaskConfig = PointMaskConfig()
    target: TargetConfig = TargetConfig(top_k=2)
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    schedule: ScheduleConfig = ScheduleConfig(steps=100)
    data: CurvesDataConfig = CurvesDataConfig()
