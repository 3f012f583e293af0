"""Encode the visible places of masked samples, for data2vec 2.0 (arXiv 2212.07525, section 3).

Shape letters: B samples, M masks per sample, R rows (B * M with masks, B without), T places of a sample, V visible
places of a row, D width, H heads. Row `b * M + m` is mask m of sample b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models.encoder import Drops, Encoder, EncoderOutput
from d2v_fast.models.layers import Norm, dropout
from d2v_fast.models.post_norm import AlibiPlaces, PostNormBlock, padding_of
from d2v_fast.models.student import MaskedBatch

# of every norm that is not in a block or before the blocks, whatever `norm_eps` is
NORM_EPS = 1e-5


class MaskedSizes(Protocol):
    """The fields of a model's configuration that describe norm, context blocks and averaged blocks."""

    @property
    def width(self) -> int: ...
    @property
    def context_depth(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...
    @property
    def activation_dropout(self) -> float: ...
    @property
    def context_dropout(self) -> float: ...
    @property
    def layer_drop(self) -> float: ...
    @property
    def context_layer_drop(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def gradient_checkpointing(self) -> bool: ...


class MaskedBlock(PostNormBlock):
    """A block whose linear maps do not save the outputs of its norms."""

    norm_class = Norm


class MaskedContext(nn.Module):
    """Norm, dropout, context blocks and averaged blocks.

    Args:
        config: sizes and rates.
        has_norm: whether there are a norm and dropout before the blocks. Text has neither without context blocks.

    Attributes:
        norm: the norm, or None.
        encoder: the context blocks, followed by the averaged ones.
    """

    def __init__(self, config: MaskedSizes, *, has_norm: bool) -> None:
        super().__init__()
        self.dropout = config.context_dropout if has_norm else 0.0
        self.norm = Norm(config.width, eps=config.norm_eps) if has_norm else None
        rates = [config.context_layer_drop] * config.context_depth + [config.layer_drop] * config.depth
        blocks = (
            MaskedBlock(
                config.width,
                config.heads,
                int(config.width * config.mlp_ratio),
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                activation_dropout=config.activation_dropout,
                norm_eps=config.norm_eps,
                layer_drop=rate,
            )
            for rate in rates
        )
        self.encoder = Encoder(blocks, gradient_checkpointing=config.gradient_checkpointing)

    def encode(self, x: Tensor, attendable: Tensor | AlibiPlaces | None, top_k: int, drop_keys: Drops) -> EncoderOutput:
        """Encode `[R, V, D]`; the arguments are those of `Encoder`."""
        if self.norm is not None:
            x = dropout(self.norm(x), self.dropout, self.training)
        output: EncoderOutput = self.encoder(x, attendable, top_k, None, drop_keys)
        return output


class Alibi(nn.Module):
    """Attention bias that falls linearly with the distance, with a learned scale per head (arXiv 2108.12409).

    Args:
        heads: H, any number.

    Attributes:
        scale: `[H]`, learned, shared by all blocks; a negative one counts as 0 and gets no gradient.
        device_type: the device that `meta` stands for.
    """

    exponents: Tensor
    device_type = "meta"

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(heads))
        # exact in 16 bits, which the slopes are not
        exponents = [math.log2(slope) for slope in alibi_slopes(heads)]
        self.register_buffer("exponents", torch.tensor(exponents, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the slopes themselves."""
        nn.init.ones_(self.scale)

    def forward(self, places: Tensor) -> Tensor:
        """Return the bias of attention logits, fp32 `[R, H, V, V]`, for tokens at `places`, int64 `[R, V]`."""
        slopes = self.scaled_slopes()
        distances = (places[:, :, None] - places[:, None, :]).abs().to(slopes.dtype)
        return -distances[:, None] * slopes[:, None, None]

    def needs_no_bias(self, x: Tensor, by_kernels: bool) -> bool:
        """Return whether attention on the device of `x` computes the bias itself; on a GPU only `by_kernels`."""
        device = self.device_type if x.device.type == "meta" else x.device.type
        return device == "cpu" or (by_kernels and device == "cuda")

    def without_bias(self, places: Tensor | None, lengths: Tensor | None) -> AlibiPlaces:
        """Return what attention computes the bias from, instead of the bias; see `AlibiPlaces`."""
        return AlibiPlaces(self.scaled_slopes(), places, lengths)

    def scaled_slopes(self) -> Tensor:
        """Return the slopes times the clamped scale, `[H]` in fp32, or in fp64 if the scale is."""
        scale = self.scale if self.scale.dtype == torch.float64 else self.scale.float()
        return self.exponents.float().exp2() * scale.clamp_min(0)


def alibi_slopes(heads: int) -> list[float]:
    """Return the slopes of the heads.

    Examples:
        >>> alibi_slopes(3)
        [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * number / power) for number in range(1, power + 1)]
    between = [2.0 ** (-8.0 * number / (2 * power)) for number in range(1, 2 * power + 1)]
    return slopes + between[0::2][: heads - power]


class Places(NamedTuple):
    """Which places of masked samples are visible and which are masked.

    Attributes:
        visible: int64 `[R, V]`, flat indices `r * T + t` of the visible places, ascending; `R * T` is padding.
        rows: int64 `[N]`, flat indices of the masked places, ascending.
        num_places: T.
        lengths: int64 `[R]`, places of each row before its padding. `None` means T.
        visible_lengths: int64 `[R]`, visible places of each row. `None` means V.
    """

    visible: Tensor
    rows: Tensor
    num_places: int
    lengths: Tensor | None = None
    visible_lengths: Tensor | None = None

    @classmethod
    def of(cls, batch: MaskedBatch, num_places: int) -> Places:
        """Return the places of a batch, with T."""
        assert batch.visible is not None
        num_masks = len(batch.visible) // len(batch.inputs)
        lengths = None if batch.lengths is None else batch.lengths.repeat_interleave(num_masks)
        return cls(batch.visible, batch.rows, num_places, lengths, batch.visible_lengths)

    def sources(self, rows: Tensor, num_samples: int) -> Tensor:
        """Convert flat indices `(b * M + m) * T + t` to those of the samples, `b * T + t`; padding to any."""
        T, num_masks = self.num_places, len(self.visible) // num_samples
        found = rows // (num_masks * T) * T + rows % T
        return found if self.visible_lengths is None else found.clamp_max(num_samples * T - 1)

    def gather(self, tokens: Tensor) -> Tensor:
        """Return the visible tokens `[R, V, D]` straight from those of the samples, `[B, T, D]`."""
        # as an embedding, whose gradient has a fast and deterministic kernel
        return F.embedding(self.sources(self.visible, len(tokens)), tokens.flatten(0, 1))

    def scatter(self, visible: Tensor, masked: Tensor | None = None) -> Tensor:
        """Return `[R, T, D]` of `[R, V, D]` at the visible places and `[N, D]`, or 0, at the masked ones."""
        R, _, D = visible.shape
        num_places = R * self.num_places
        # padding is written to one more place
        padded = self.visible_lengths is not None
        x = visible.new_zeros(num_places + 1, D) if padded or masked is None else visible.new_empty(num_places, D)
        if masked is not None:
            x.index_copy_(0, self.rows, masked.to(x.dtype))
        x = x.index_copy_(0, self.visible.flatten(), visible.flatten(0, 1))
        return x[:num_places].view(R, self.num_places, D)


@dataclass(frozen=True)
class MaskedSequences:
    """Input of the averaged part of a sequence encoder; student and teacher share what comes before it.

    Attributes:
        embedded: `[B, T, D]`, frames or tokens.
        lengths: int64 `[B]`, places of each sample before its padding. `None` means T.
        places: visible and masked places. `None`: all are visible.
        drop_keys: see `models.encoder.Drops`.
    """

    embedded: Tensor
    lengths: Tensor | None
    places: Places | None = None
    drop_keys: Drops = None

    @classmethod
    def pair(cls, embedded: Tensor, batch: MaskedBatch) -> tuple[MaskedSequences, MaskedSequences]:
        """Return the inputs of student and teacher; the teacher's has no masks and no gradient."""
        student = cls(embedded, batch.lengths, Places.of(batch, embedded.shape[1]), batch.drop_keys)
        return student, cls(embedded.detach(), batch.lengths)

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.embedded)

    @property
    def num_places(self) -> int:
        """T."""
        return self.embedded.shape[1]

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`; computes all rows."""
        output: EncoderOutput = averaged(self.embedded, self.lengths, self.places, self.drop_keys, top_k=top_k)
        return output


def key_mask(lengths: Tensor | None, num_tokens: int) -> Tensor | None:
    """Return bool `[R, 1, 1, V]`, True for tokens before `lengths`, int64 `[R]`; None without lengths."""
    return None if lengths is None else ~padding_of(lengths, num_tokens)[:, None, None, :]


def biased(bias: Tensor, attended: Tensor | None) -> Tensor:
    """Return an attention bias `[R, H, V, V]`, minus infinity where `attended`, see `key_mask`, is False."""
    return bias if attended is None else bias.masked_fill(~attended, -math.inf)


def sine_positions(width: int, grid_size: int) -> Tensor:
    """Return fixed positions of patches, fp32 `[grid_size ** 2, D]`.

    The first half of the channels depends on the column, the second on the row; each is sine, then cosine, at the
    frequencies `10000 ** (-k / (D / 4))`.
    """
    quarter = width // 4
    frequencies = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = along[None, :].expand(grid_size, grid_size, -1)
    rows = along[:, None].expand(grid_size, grid_size, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()
