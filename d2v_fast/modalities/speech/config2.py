"""Configuration sections of data2vec 2.0 on speech. The defaults are the published Base run (arXiv 2212.07525)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from d2v_fast.config.data2vec2 import DecoderConfig, MaskedEncoderSection, MultiMaskSection, problems_of_counts
from d2v_fast.config.errors import MAX_SIZE, Problem
from d2v_fast.config.schema import LossConfig, ScheduleConfig, TargetConfig, TeacherConfig
from d2v_fast.modalities.speech.config import RecordingsConfig, SpeechDataConfig, SpeechModelSection


class MaskedSpeechModelConfig(MaskedEncoderSection, SpeechModelSection):
    """The speech encoder: convolutions over the waveform, convolutional positions, post-norm blocks with ALiBi.

    Attributes:
        attention: On a GPU, "stock" is PyTorch's attention with a bias in memory, and "fused" the kernels of this
            library, which compute it from places. A CPU computes it from places with either, a few heads at a time.
        front_end_checkpointing: Recompute part of the convolutions in the backward pass.
    """

    context_dropout: float = Field(default=0.1, ge=0, lt=1)
    layer_drop: float = Field(default=0.05, ge=0, lt=1)
    decoder: DecoderConfig = DecoderConfig(width=384, depth=4, kernel=7, groups=16, dropout=0.1)
    attention: Literal["stock", "fused"] = "stock"
    front_end_checkpointing: bool = False


class BlockMask1DConfig(MultiMaskSection):
    """Masks of blocks of frames.

    Attributes:
        kind: Kind of the masks.
        length: Frames of a block.
        prob_adjust: Added to the share of the blocks that are placed, to make up for their overlap.
        inverse: Place the blocks that stay visible instead of the masked ones.
    """

    kind: Literal["block_1d"] = "block_1d"
    num_masks: int = Field(default=8, ge=1, le=1024)
    prob: float = Field(default=0.5, gt=0, lt=1)
    length: int = Field(default=5, ge=1, le=MAX_SIZE)
    prob_adjust: float = Field(default=0.05, ge=0, le=1)
    inverse: bool = False


class MaskedSpeechConfig(RecordingsConfig):
    """data2vec 2.0 on recordings. The defaults are the published Base run on LibriSpeech."""

    objective: Literal["data2vec2"] = "data2vec2"
    model: MaskedSpeechModelConfig = MaskedSpeechModelConfig()
    mask: BlockMask1DConfig = BlockMask1DConfig()
    target: TargetConfig = TargetConfig(top_k=8, layer_norm="instance", final_norm="none")
    loss: LossConfig = LossConfig(beta=0.0, channel_reduction="rsqrt")
    teacher: TeacherConfig = TeacherConfig(decay_start=0.999, decay_end=0.99999, decay_steps=75_000)
    schedule: ScheduleConfig = ScheduleConfig(kind="cosine", steps=400_000, warmup_steps=8_000)
    data: SpeechDataConfig = SpeechDataConfig()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().problems_across(sections)
        model, mask, data = (sections.get(name) for name in ("model", "mask", "data"))
        if model and mask and data:
            fewest = model.num_frames(int(data.min_seconds * model.sample_rate))
            yield from problems_of_counts(mask.prob, fewest, "frame", inverse=mask.inverse)
