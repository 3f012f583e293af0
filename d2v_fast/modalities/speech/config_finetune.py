"""Configuration sections of fine-tuning on recordings: transcripts by CTC, or a class per recording.

The defaults of CTC are the published Base fine-tuning on 100 hours (arXiv 2006.11477, appendix B, and its released
recipe), which data2vec uses unchanged (2202.03555, section 4.2).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from d2v_fast.config.errors import MAX_SIZE, MAX_STEPS, PathText, Section
from d2v_fast.config.finetune import (
    ClassHeadSection,
    ClassifyConfig,
    FewLabelsSection,
    FinetuneConfig,
    ValidSection,
)
from d2v_fast.config.schema import ScheduleConfig
from d2v_fast.modalities.speech.config import RecordingInputsConfig, SpeechDataConfig, SpeechModelConfig
from d2v_fast.modalities.speech.config2 import MaskedSpeechModelConfig

__all__ = ["SpeechClassifyConfig", "SpeechCtcConfig", "SpeechFinetuneConfig"]


class FinetuneMaskConfig(Section):
    """Masks of frames and channels, which keep an encoder from learning few labels by heart.

    Attributes:
        prob: Share of the frames that would be masked if no spans overlapped; 0 masks none.
        length: Frames of a span.
        channel_prob: The same share of the channels of a frame, which become 0 in all frames; 0 masks none.
        channel_length: Channels of a span.
    """

    prob: float = Field(default=0.65, ge=0, le=1)
    length: int = Field(default=10, ge=1, le=MAX_SIZE)
    channel_prob: float = Field(default=0.5, ge=0, le=1)
    channel_length: int = Field(default=64, ge=1, le=MAX_SIZE)


class LabeledSpeechConfig(SpeechDataConfig):
    """Labeled recordings. They are read whole and padded to the longest of the batch.

    Attributes:
        labels_path: Table of labels (.tsv or .jsonl), or fairseq's `.ltr`; null looks beside the recordings.
        path_field: Column of a table that holds the path of a recording.
        label_field: Column of a table that holds its label.
    """

    own_preset: ClassVar[str] = "finetune_speech_base"
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "audio": (*SpeechDataConfig.only_for["audio"], "labels_path", "path_field", "label_field")
    }

    min_seconds: float = Field(default=0.1, gt=0, le=1e6)
    max_seconds: float = Field(default=40.0, gt=0, le=1e6)
    lengths: Literal["pad"] = "pad"
    labels_path: PathText | None = None
    path_field: str = Field(default="path", min_length=1)
    label_field: str = Field(default="label", min_length=1)


class TranscribedConfig(LabeledSpeechConfig):
    """Recordings with transcripts. Those longer than `max_seconds` are left out.

    Attributes:
        letter_case: Whether transcripts are changed to "lower" or "upper" case, or kept.
        vocabulary: File of letters: a fairseq dictionary, one letter per line, or a Transformers `vocab.json`; null
            takes the letters of a source that was fine-tuned by CTC, else `dict.ltr.txt` beside a `.ltr`, and else the
            characters of the transcripts.
    """

    only_for: ClassVar[dict[str, tuple[str, ...]]] = LabeledSpeechConfig.only_for

    label_field: str = Field(default="text", min_length=1)
    letter_case: Literal["keep", "lower", "upper"] = "keep"
    vocabulary: PathText | None = None


class ClassifiedConfig(LabeledSpeechConfig, FewLabelsSection):
    """Recordings with a class each: by a table, or by the sub-folder of `path`.

    Attributes:
        label: With kind "speech": what is classified, the spoken "word" or the "voice".
    """

    only_for: ClassVar[dict[str, tuple[str, ...]]] = {**LabeledSpeechConfig.only_for, "speech": ("label",)}

    label: Literal["word", "voice"] = "word"


class SpeechValidSection(ValidSection):
    """Held-out recordings, and when they are scored.

    Attributes:
        labels_path: Labels of `path`, as `d2v.data.labels_path`; null looks beside the recordings.
    """

    labels_path: PathText | None = None
    batch_size: int = Field(default=16, ge=1, le=MAX_STEPS)


class CtcValidSection(SpeechValidSection):
    """Held-out recordings with transcripts, and when they are scored."""

    metric: str = "wer"


class CtcHeadConfig(Section):
    """A classifier of frames.

    Attributes:
        dropout: Dropout of the encoder's output.
    """

    dropout: float = Field(default=0.0, ge=0, lt=1)


class RecordingHeadConfig(ClassHeadSection):
    """A classifier of recordings: a projection of every frame, the mean over frames, and a linear map.

    Attributes:
        projection: Width of the projection.
    """

    projection: int = Field(default=256, ge=1, le=MAX_SIZE)


class SpeechFinetuneConfig(RecordingInputsConfig, FinetuneConfig):
    """What both tasks on recordings have.

    Attributes:
        mask: Spans of frames and of channels that the encoder does not see in training.
    """

    mask: FinetuneMaskConfig = FinetuneMaskConfig()
    data: LabeledSpeechConfig
    valid: SpeechValidSection = SpeechValidSection()
    schedule: ScheduleConfig = ScheduleConfig(
        kind="tri_stage", steps=80_000, warmup_steps=8_000, hold_ratio=0.4, initial_lr_ratio=0.01, final_lr_ratio=0.05
    )


class SpeechCtcConfig(SpeechFinetuneConfig):
    """Transcripts of recordings, letter by letter, by either version of the encoder."""

    metrics: ClassVar[dict[str, bool]] = {"wer": False, "cer": False, "loss": False}

    objective: Literal["ctc"] = "ctc"
    data: TranscribedConfig = TranscribedConfig()
    head: CtcHeadConfig = CtcHeadConfig()
    valid: CtcValidSection = CtcValidSection()


class SpeechClassifyConfig(SpeechFinetuneConfig, ClassifyConfig):
    """A class per recording, by either version of the encoder."""

    objective: Literal["classify"] = "classify"
    data: ClassifiedConfig = ClassifiedConfig()
    head: RecordingHeadConfig = RecordingHeadConfig()


# dropout as published: only inside the MLP
_MODEL = SpeechModelConfig(dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, layer_drop=0.1)
_MODEL2 = MaskedSpeechModelConfig(
    dropout=0.0, attention_dropout=0.0, activation_dropout=0.1, context_dropout=0.0, layer_drop=0.1
)


class SpeechCtcConfig1(SpeechCtcConfig):
    """Transcripts by an encoder of the first version."""

    encoder: Literal["data2vec"] = "data2vec"
    model: SpeechModelConfig = _MODEL


class SpeechCtcConfig2(SpeechCtcConfig):
    """Transcripts by an encoder of data2vec 2.0."""

    encoder: Literal["data2vec2"] = "data2vec2"
    model: MaskedSpeechModelConfig = _MODEL2


class SpeechClassifyConfig1(SpeechClassifyConfig):
    """Classes by an encoder of the first version."""

    encoder: Literal["data2vec"] = "data2vec"
    model: SpeechModelConfig = _MODEL


class SpeechClassifyConfig2(SpeechClassifyConfig):
    """Classes by an encoder of data2vec 2.0."""

    encoder: Literal["data2vec2"] = "data2vec2"
    model: MaskedSpeechModelConfig = _MODEL2


SpeechCtcConfig.by_encoder = {"data2vec": SpeechCtcConfig1, "data2vec2": SpeechCtcConfig2}
SpeechClassifyConfig.by_encoder = {"data2vec": SpeechClassifyConfig1, "data2vec2": SpeechClassifyConfig2}
