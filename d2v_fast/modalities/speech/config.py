"""Configuration sections of the speech modality. The defaults are the published Base run (arXiv 2202.03555, 4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SIZE, MAX_WORKERS, PathText, Problem, Section, problem_of_heads, refuse_if
from d2v_fast.config.schema import (
    D2VConfig,
    DataSection,
    GuardConfig,
    LossConfig,
    ModelSection,
    PretrainConfig,
    ScheduleConfig,
    TargetConfig,
    TeacherConfig,
)


class SpeechModelSection(ModelSection):
    """What every speech encoder has: the convolutions over the waveform, and those that give positions.

    Attributes:
        sample_rate: Samples per second; recordings at other rates are resampled.
        conv_width: Channels of the front-end convolutions.
        conv_kernels: Kernel size of each front-end convolution, in elements of its input.
        conv_strides: Stride of each front-end convolution, in elements of its input.
        position_depth: Number of positional convolutions.
        position_kernel: Kernel size of the positional convolutions in frames; an even one covers one more frame before
            a place than after it.
        position_groups: Groups of the positional convolutions; must divide `width`.
    """

    required: ClassVar[tuple[str, ...]] = ()

    sample_rate: int = Field(default=16_000, ge=1_000, le=192_000)
    conv_width: int = Field(default=512, ge=1, le=MAX_SIZE)
    conv_kernels: tuple[int, ...] = Field(default=(10, 3, 3, 3, 3, 2, 2), strict=False)
    conv_strides: tuple[int, ...] = Field(default=(5, 2, 2, 2, 2, 2, 2), strict=False)
    position_depth: int = Field(default=5, ge=1, le=64)
    position_kernel: int = Field(default=19, ge=1, le=1024)
    position_groups: int = Field(default=16, ge=1, le=MAX_SIZE)

    @property
    def hop(self) -> int:
        """Number of samples from one frame to the next."""
        product = 1
        for stride in self.conv_strides:
            product *= stride
        return product

    @property
    def receptive_field(self) -> int:
        """Number of samples that one frame covers, which is the shortest usable waveform."""
        field, hop = 1, 1
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        return field

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames of a waveform; 0 if it is shorter than one frame."""
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            num_samples = (num_samples - kernel) // stride + 1 if num_samples >= kernel else 0
        return num_samples

    def num_samples(self, num_frames: int) -> int:
        """Return the smallest number of samples that gives `num_frames` frames."""
        return (num_frames - 1) * self.hop + self.receptive_field

    def num_places(self, shape: Sequence[int]) -> int:
        """See `ModelSection`."""
        return self.num_frames(shape[1])

    @model_validator(mode="after")
    def _check_convolutions(self) -> Self:
        problems = []
        if self.width % self.position_groups:
            problems.append(Problem("position_groups", f"divide `width` ({self.width})", self.position_groups))
        if not 1 <= len(self.conv_kernels) <= 16:
            problems.append(Problem("conv_kernels", "hold 1 to 16 values", self.conv_kernels))
        if len(self.conv_kernels) != len(self.conv_strides):
            must = f"hold as many values as `conv_kernels` ({len(self.conv_kernels)})"
            problems.append(Problem("conv_strides", must, self.conv_strides))
        for name in ("conv_kernels", "conv_strides"):
            if not all(1 <= value <= 1024 for value in getattr(self, name)):
                problems.append(Problem(name, "hold values in [1, 1024]", getattr(self, name)))
        refuse_if(problems)
        return self


class SpeechModelConfig(SpeechModelSection):
    """The speech encoder: convolutions over the waveform, convolutional positions, post-norm blocks.

    Attributes:
        position_in_teacher: Whether the teacher averages the positional convolutions ("averaged") or uses the student's
            ("shared", as the published recipe does).
        heads: Attention heads; must divide `width`.
        mlp_ratio: Hidden width of the MLP divided by `width`.
        dropout: Dropout of the encoder's input and of each branch's output.
        attention_dropout: Dropout of attention weights.
        activation_dropout: Dropout inside the MLP.
        input_dropout: Dropout of the student's frames before masking.
        layer_drop: Probability that a sample skips a block.
        norm_eps: Value added to the variance in every norm.
        attention: "padded" computes padding too; "packed" skips it, with PyTorch's kernel on a GPU in 16-bit precision
            without dropout of attention weights; "xformers" skips it with that package's, with dropout too.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        front_end_checkpointing: Recompute part of the convolutions in the backward pass.
    """

    position_in_teacher: Literal["averaged", "shared"] = "shared"
    width: int = Field(default=768, ge=1, le=MAX_SIZE)
    depth: int = Field(default=12, ge=1, le=MAX_SIZE)
    heads: int = Field(default=12, ge=1, le=MAX_SIZE)
    mlp_ratio: float = Field(default=4.0, gt=0, le=MAX_SIZE)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    input_dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_drop: float = Field(default=0.05, ge=0, lt=1)
    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    attention: Literal["padded", "packed", "xformers"] = "padded"
    gradient_checkpointing: bool = False
    front_end_checkpointing: bool = False

    def without_skipping(self) -> Self:
        """See `ModelSection`."""
        return self.model_copy(update={"layer_drop": 0.0})

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = problem_of_heads(self.width, self.heads)
        if int(self.width * self.mlp_ratio) < 1:
            problems.append(Problem("mlp_ratio", "leave at least one hidden unit", self.mlp_ratio))
        refuse_if(problems)
        return self


class SpanMaskConfig(Section):
    """Masks of random spans of frames.

    Attributes:
        kind: Kind of mask.
        prob: Share of frames that would be masked if no spans overlapped.
        length: Length of a span in frames.
        min_masks: Minimum number of spans per utterance.
        equal_counts: Reduce all utterances of a step to the smallest number of masked frames among them, as published.
    """

    kind: Literal["span"] = "span"
    prob: float = Field(default=0.65, gt=0, le=1)
    length: int = Field(default=10, ge=1, le=MAX_SIZE)
    min_masks: int = Field(default=1, ge=1, le=MAX_SIZE)
    equal_counts: bool = True


class SpeechDataConfig(DataSection):
    """Source and limits of the recordings. Each step groups utterances of similar length. Silent and non-finite
    recordings count as unreadable.

    Attributes:
        kind: "audio" reads a folder tree or a manifest (.tsv) of recordings; "speech" reads the bundled sample set.
        path: Folder or manifest for kind "audio".
        min_seconds: Skip recordings shorter than this.
        max_seconds: Use a random part of this length of longer recordings.
        max_batch_seconds: Maximum seconds of sound per step; null sets no limit besides `train_batch_size`.
        lengths: "crop" cuts all utterances to the shortest of the step, to a multiple of 8 frames; "pad" pads them to
            the longest of the batch.
        silence: A recording is silent if no sample differs from the mean by more than this share of full scale.
        max_file_bytes: Larger files count as unreadable.
        follow_outside: Follow links that lead out of `path`; otherwise skip them.
    """

    # keys that only one `kind` reads
    # for a user's own recordings, in a message
    own_preset: ClassVar[str] = "speech_small"
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {"audio": ("follow_outside",)}

    kind: Literal["speech", "audio"] = "speech"
    path: PathText | None = None
    on_change: Literal["refuse", "accept"] = "refuse"
    num_workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    min_seconds: float = Field(default=2.0, gt=0, le=1e6)
    max_seconds: float = Field(default=20.0, gt=0, le=1e6)
    max_batch_seconds: float | None = Field(default=None, gt=0, le=1e9)
    lengths: Literal["crop", "pad"] = "crop"
    silence: float = Field(default=1e-4, ge=0, lt=1)
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    strict: bool = False
    max_file_bytes: int = Field(default=4_000_000_000, ge=1, le=10**15)
    follow_outside: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.kind == "audio" and not self.path:
            hint = "Set the folder or manifest: `--set d2v.data.path=/my/recordings`."
            problems.append(Problem("path", 'be a folder or a .tsv manifest with `kind` "audio"', self.path, hint))
        if self.kind == "speech" and self.path is not None:
            hint = f'For your own recordings, use `kind` "audio", for example with the preset `{self.own_preset}`.'
            problems.append(Problem("path", 'be null with `kind` "speech", a sample set', self.path, hint))
        if self.max_seconds < self.min_seconds:
            problems.append(Problem("max_seconds", f"be >= `min_seconds` ({self.min_seconds})", self.max_seconds))
        if self.max_batch_seconds is not None and self.max_batch_seconds < self.max_seconds:
            must = f"be >= `max_seconds` ({self.max_seconds})"
            problems.append(Problem("max_batch_seconds", must, self.max_batch_seconds))
        refuse_if(problems)
        return self


class RecordingInputsConfig(D2VConfig):
    """What every run on recordings has."""

    modality: Literal["speech"] = "speech"
    decay_1d: bool = True
    model: SpeechModelSection
    data: SpeechDataConfig

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        yield from super().problems_across(sections)
        model, data = sections.get("model"), sections.get("data")
        if model and data and model.num_frames(int(data.min_seconds * model.sample_rate)) < 2:
            fewest = model.num_samples(2) / model.sample_rate
            hint = "Every recording needs one frame to mask and one to leave visible."
            yield Problem("data.min_seconds", f"be >= {fewest:.4g} (two frames)", data.min_seconds, hint)


class RecordingsConfig(RecordingInputsConfig, PretrainConfig):
    """What every pre-training on recordings has."""

    # the first base has it of any run
    guard: GuardConfig = GuardConfig()


class SpeechConfig(RecordingsConfig):
    """Configuration of a speech run. The defaults are the published Base run on LibriSpeech."""

    objective: Literal["data2vec"] = "data2vec"
    model: SpeechModelConfig = SpeechModelConfig()
    mask: SpanMaskConfig = SpanMaskConfig()
    target: TargetConfig = TargetConfig(top_k=8, layer_norm="instance", final_norm="none")
    loss: LossConfig = LossConfig(beta=0.0, channel_reduction="rsqrt")
    teacher: TeacherConfig = TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_steps=30_000)
    schedule: ScheduleConfig = ScheduleConfig(
        kind="tri_stage", steps=400_000, warmup_steps=12_000, initial_lr_ratio=0.01, final_lr_ratio=0.01
    )
    data: SpeechDataConfig = SpeechDataConfig()
