"""Configuration sections of data2vec 2.0 on text. The defaults are the published Base run (arXiv 2212.07525)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from d2v_fast.config.data2vec2 import DecoderConfig, MaskedEncoderSection, MultiMaskSection, problems_of_counts
from d2v_fast.config.errors import Problem
from d2v_fast.config.schema import LossConfig, ScheduleConfig, TargetConfig, TeacherConfig
from d2v_fast.modalities.text.config import DocumentsConfig, TextDataConfig, TextModelSection, TextProbeConfig


class MaskedTextModelConfig(MaskedEncoderSection, TextModelSection):
    """The text encoder: token and position embeddings, a norm, post-norm blocks."""

    decoder: DecoderConfig = DecoderConfig(
        width=768, depth=5, kernel=9, groups=1, residual=False, projection=2, dropout=0.1
    )


class RandomMaskConfig(MultiMaskSection):
    """Masks of single tokens, special tokens included; every set of so many tokens is equally likely.

    Attributes:
        kind: Kind of the masks.
    """

    kind: Literal["random"] = "random"
    num_masks: int = Field(default=8, ge=1, le=1024)
    prob: float = Field(default=0.48, gt=0, lt=1)


class MaskedTextConfig(DocumentsConfig):
    """data2vec 2.0 on text. The defaults are the published Base run."""

    objective: Literal["data2vec2"] = "data2vec2"
    model: MaskedTextModelConfig = MaskedTextModelConfig()
    mask: RandomMaskConfig = RandomMaskConfig()
    target: TargetConfig = TargetConfig(top_k=12, layer_norm="instance", final_norm="none")
    loss: LossConfig = LossConfig(beta=0.0, channel_reduction="sum")
    teacher: TeacherConfig = TeacherConfig(decay_start=0.9999, decay_end=0.99999, decay_steps=100_000)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", steps=1_000_000, warmup_steps=4_000)
    data: TextDataConfig = TextDataConfig(packing="stream")
    probe: TextProbeConfig = TextProbeConfig()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().problems_across(sections)
        mask, data = sections.get("mask"), sections.get("data")
        if mask and data:
            # the end of a document may be a block of two tokens, whatever `min_tokens` is
            yield from problems_of_counts(mask.prob, data.block_size, "token")
        if data and data.separate_documents:
            hint = 'The tokens of a block attend to each other; "document" packing pads instead of cutting documents.'
            yield Problem("data.separate_documents", "be false with data2vec 2.0", True, hint)
