"""Sections that the configurations of data2vec 2.0 share (arXiv 2212.07525).

The names of published keys that differ from the fields here are in docs/data2vec2.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SIZE, Problem, Section, problem_of_heads, refuse_if
from d2v_fast.config.schema import D2VConfig, LossConfig, ModelSection, PretrainConfig


class DecoderConfig(Section):
    """The decoder: convolutions over all places, each with a norm and GELU, and a linear map at the masked places.

    Attributes:
        width: Channels of the convolutions.
        depth: Number of convolutions.
        kernel: Places that a convolution covers along each axis; an even number covers one more before a place than
            after it.
        groups: Groups of the convolutions; they divide `width` and `d2v.model.width`.
        residual: Add a convolution's input to its output where both have as many channels.
        projection: Layers of the map to the encoder's width, 1 or 2; two have a GELU between them.
        projection_ratio: Hidden width of two such layers over `width`.
        dropout: Dropout of the encoder's output.
        noise_std: Standard deviation of the noise that stands at masked places.
    """

    width: int = Field(default=768, ge=1, le=MAX_SIZE)
    depth: int = Field(default=6, ge=1, le=64)
    kernel: int = Field(default=3, ge=1, le=255)
    groups: int = Field(default=16, ge=1, le=MAX_SIZE)
    residual: bool = True
    projection: Literal[1, 2] = 1
    projection_ratio: float = Field(default=2.0, gt=0, le=64)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    noise_std: float = Field(default=0.01, ge=0, le=1e3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.width % self.groups:
            problems.append(Problem("groups", f"divide `width` ({self.width})", self.groups))
        if self.projection == 2 and int(self.width * self.projection_ratio) < 1:
            problems.append(Problem("projection_ratio", "leave at least one hidden unit", self.projection_ratio))
        refuse_if(problems)
        return self


class MaskedEncoderSection(ModelSection):
    """An encoder of visible places: norm, context blocks, averaged blocks; and the decoder.

    Attributes:
        width: Channels of the encoder.
        context_depth: Blocks before the averaged ones (published as the prenet).
        depth: Blocks whose outputs can be averaged into the target.
        heads: Attention heads; they divide `width`.
        mlp_ratio: Hidden width of the MLP over `width`.
        dropout: Dropout of each branch's output.
        attention_dropout: Dropout of attention weights.
        activation_dropout: Dropout inside the MLP.
        context_dropout: Dropout before the first block.
        layer_drop: Probability that a masked copy of a sample skips an averaged block.
        context_layer_drop: The same for context blocks.
        norm_eps: Added to the variance in the norms of the blocks and before them.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        decoder: The decoder.
    """

    required: ClassVar[tuple[str, ...]] = ()

    width: int = Field(default=768, ge=1, le=MAX_SIZE)
    context_depth: int = Field(default=0, ge=0, le=MAX_SIZE)
    depth: int = Field(default=12, ge=1, le=MAX_SIZE)
    heads: int = Field(default=12, ge=1, le=MAX_SIZE)
    mlp_ratio: float = Field(default=4.0, gt=0, le=MAX_SIZE)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    context_dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_drop: float = Field(default=0.0, ge=0, lt=1)
    context_layer_drop: float = Field(default=0.0, ge=0, lt=1)
    norm_eps: float = Field(default=1e-5, gt=0, le=1)
    gradient_checkpointing: bool = False
    decoder: DecoderConfig = DecoderConfig()

    def without_skipping(self) -> Self:
        """See `ModelSection`."""
        return self.model_copy(update={"layer_drop": 0.0, "context_layer_drop": 0.0})

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        problems = problem_of_heads(self.width, self.heads)
        if int(self.width * self.mlp_ratio) < 1:
            problems.append(Problem("mlp_ratio", "leave at least one hidden unit", self.mlp_ratio))
        if self.width % self.decoder.groups:
            problems.append(Problem("decoder.groups", f"divide `width` ({self.width})", self.decoder.groups))
        refuse_if(problems)
        return self


class MultiMaskSection(Section):
    """Masks of a sample, each with the same number of masked places.

    Attributes:
        num_masks: Masks per sample, M. The teacher sees a sample once; the student sees each of its masked copies.
        prob: Share of the places that are masked.
    """

    num_masks: int = Field(default=8, ge=1, le=1024)
    prob: float = Field(default=0.5, gt=0, lt=1)


def num_masks_of(config: D2VConfig) -> int | None:
    """Return the masks per sample of a run; None if its objective has no such key."""
    mask = config.mask if isinstance(config, PretrainConfig) else None
    return mask.num_masks if isinstance(mask, MultiMaskSection) else None


class ClassTokenLossConfig(LossConfig):
    """The loss of masked places, and of the class token, which predicts the mean target of all places.

    Attributes:
        cls_weight: Weight of the class token's loss; 0 leaves it out.
        cls_scale: "per_sequence" weighs the mean over all masked copies of the global batch against the loss of one
            place. "per_batch" weighs their sum over the micro-batch, as published, so that it changes with the number
            of samples per process: `cls_weight` 0.01 equals 2.56 "per_sequence" at 16 samples of 16 masks.
    """

    cls_weight: float = Field(default=2.56, ge=0, le=1e6)
    cls_scale: Literal["per_sequence", "per_batch"] = "per_sequence"


def problems_of_counts(prob: float, num_places: int, place: str, *, inverse: bool = True) -> Iterator[Problem]:
    """Yield a problem if a share of so many places, rounded as published, masks nothing or leaves nothing visible.

    Args:
        prob: share of the masked places.
        num_places: of the shortest sample.
        place: one of them, in a word.
        inverse: whether the visible places are counted off, or the masked ones.
    """
    if not 1 <= int(num_places * (1 - prob if inverse else prob)) < num_places:
        hint = f"A sample may have no more than {num_places} of them."
        yield Problem("mask.prob", f"leave at least one {place} masked and one visible", prob, hint)
