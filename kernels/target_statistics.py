"""Statistics of the target's norms over positions: part of ``topk_target.py``, which tells where figures come from.

``instance``: one kernel reads every layer once; a program sees all positions of a few channels of one sample.
``batch``: the same, then the samples' statistics are put together. A final ``instance``: the average of every position
is computed and forgotten, 16 positions to a program, and the programs' statistics are put together. No atomics: a run
repeats itself bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2
from .target_row import BATCH, INSTANCE, NONE, SUM_CHANNELS, row_warps, target_row

# channels of a tile: in bf16 128 bytes of a row, whole sectors
TILE_CHANNELS = 64
# up to this many positions, one warp takes the statistics of a tile of channels
SHORT = 256
# positions per partial result of the statistics of the average
PART = 16
# partial results that are put together at once
PARTS_PER_TILE = 32


@triton.jit(do_not_specialize=["num_samples", "num_positions"])
def _layer_statistics_kernel(
    layers,  # tuple of K [B, T, D]
    lengths,  # [B] int64 or None
    mean,  # [K, B, D] fp32
    scale,  # [K, B, D] fp32; the summed squared deviation instead if PARTS
    num_samples,
    num_positions,
    stride_sample,
    stride_position,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOADS: tl.constexpr,
):
    """Take mean and scale of 64 channels of one layer of one sample.

    Small tiles with several loads in flight, and no masks but at the ends. Long samples: tiles of 16 positions, 4
    loads, 4 warps (47.9 us, 79 % of a copy of the layers' bytes, for 12 x 992 positions of 8 x 768 bf16; tiles of 64
    positions with masks 82 us). Short ones: 8 positions, 4 loads, 1 warp (19.3 us, 73 %, for 16 x 196 positions of
    10 x 768; as above 37 us). The trial kernel subtracted the first row before squaring; this one subtracts the mean of
    the first tiles, so that precision does not depend on where an outlier is.
    """
    NUM_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    STEP: tl.constexpr = BLOCK_T * LOADS
    sample = (tl.program_id(0) // NUM_TILES).to(tl.int64)
    cols = tl.program_id(0) % NUM_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1)
    layer = layers[0]
    for other in tl.static_range(1, K):
        layer = tl.where(k == other, layers[other], layer)
    length = num_positions
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), num_positions).to(tl.int32)
    positions = tl.arange(0, BLOCK_T)[:, None]
    in_row = (cols < D)[None, :]
    start = layer + sample * stride_sample + cols[None, :] + positions.to(tl.int64) * stride_position

    b_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in tl.static_range(LOADS):
        inside = in_row & (positions < length - i * BLOCK_T)
        place = start + tl.cast(i * BLOCK_T, tl.int64) * stride_position
        b_sum += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b_pivot = tl.sum(b_sum, 0) / tl.maximum(tl.minimum(length, STEP), 1)
    b_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    b_square = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    full = length // STEP * STEP
    for first in range(0, full, STEP):
        b_tiles = ()
        for i in tl.static_range(LOADS):
            place = start + tl.cast(first + i * BLOCK_T, tl.int64) * stride_position
            # Triton knows no starred expressions
            b_tiles = b_tiles + (tl.load(place, mask=in_row, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(LOADS):
            b_x = b_tiles[i].to(tl.float32) - b_pivot[None, :]
            b_sum += b_x
            b_square += b_x * b_x
    for first in range(full, length, BLOCK_T):
        inside = in_row & (positions < length - first)
        b_x = tl.load(start + tl.cast(first, tl.int64) * stride_position, mask=inside, other=0.0).to(tl.float32)
        b_x = tl.where(inside, b_x - b_pivot[None, :], 0.0)
        b_sum += b_x
        b_square += b_x * b_x
    count = tl.maximum(length, 1)
    b_shift = tl.sum(b_sum, 0) / count
    b_deviation = tl.maximum(tl.sum(b_square, 0) - b_shift * b_shift * count, 0.0)
    index = (k * num_samples + sample) * D + cols
    tl.store(mean + index, b_pivot + b_shift, mask=cols < D)
    if not PARTS:
        b_deviation = tl.rsqrt(b_deviation / count + eps) * (1.0 / K)
    tl.store(scale + index, b_deviation, mask=cols < D)


@triton.jit(do_not_specialize=["num_samples", "num_positions", "num_parts"])
def _average_statistics_kernel(
    layers,  # tuple of K [B, T, D]
    lengths,  # [B] int64 or None
    mean,  # [B, num_parts, D] fp32
    deviation,  # [B, num_parts, D] fp32: summed squared deviation
    layer_mean,
    layer_scale,
    num_samples,
    num_positions,
    num_parts,
    stride_sample,
    stride_position,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take mean and summed squared deviation of the average of the layers over 16 positions."""
    sample = (tl.program_id(0) // num_parts).to(tl.int64)
    first = tl.program_id(0) % num_parts * PART
    cols = tl.arange(0, BLOCK_D)
    length = num_positions
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), num_positions).to(tl.int32)
    last = tl.minimum(first + PART, length)
    b_pivot = tl.zeros((BLOCK_D,), tl.float32)
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    b_square = tl.zeros((BLOCK_D,), tl.float32)
    for t in range(first, last):
        # prevents the assembler from hoisting the statistics of all layers, which would spill registers
        tl.debug_barrier()
        b_row = target_row(
            layers,
            sample,
            tl.cast(t, tl.int64),
            True,
            cols,
            layer_mean,
            layer_scale,
            None,
            None,
            num_samples,
            stride_sample,
            stride_position,
            eps,
            K,
            D,
            LAYER_NORM,
            NONE,
        )
        # subtract the first row before squaring
        b_pivot = tl.where(t == first, b_row, b_pivot)
        b_row -= b_pivot
        b_sum += b_row
        b_square += b_row * b_row
    count = tl.maximum(last - first, 1)
    b_shift = b_sum / count
    index = tl.program_id(0).to(tl.int64) * D + cols
    tl.store(mean + index, b_pivot + b_shift, mask=cols < D)
    tl.store(deviation + index, tl.maximum(b_square - b_shift * b_sum, 0.0), mask=cols < D)


@triton.jit(do_not_specialize=["num_positions", "num_parts"])
def _combine_statistics_kernel(
    part_mean,  # [num_groups, num_parts, D] fp32
    part_deviation,  # [num_groups, num_parts, D] fp32
    lengths,  # [B] int64 or None
    mean,  # [num_groups, D] fp32
    scale,  # [num_groups, D] fp32
    num_positions,
    num_parts,
    share,
    eps,
    D: tl.constexpr,
    PART: tl.constexpr,  # positions of a part of group b's sample; 0: part b is the whole sample b
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Put the statistics of parts together, 32 parts at a time: the mean first, then the deviation from it."""
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    part_mean += group * num_parts * D + cols
    part_deviation += group * num_parts * D + cols
    # sum differences from the first mean, so that a large mean does not cost precision
    b_pivot = tl.load(part_mean, mask=cols < D, other=0.0)
    b_sum = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    b_count = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        b_more = _part_sizes(lengths, group, parts, num_positions, num_parts, PART)
        inside = (b_more > 0)[:, None] & (cols < D)[None, :]
        b_mean = tl.load(part_mean[None, :] + parts[:, None] * D, mask=inside, other=0.0)
        b_sum += tl.where(inside, b_mean - b_pivot[None, :], 0.0) * b_more[:, None]
        b_count += b_more
    count = tl.maximum(tl.sum(b_count, 0), 1.0)
    b_mean = b_pivot + tl.sum(b_sum, 0) / count
    b_sum = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        parts = first + tl.arange(0, BLOCK_P)
        b_more = _part_sizes(lengths, group, parts, num_positions, num_parts, PART)
        inside = (b_more > 0)[:, None] & (cols < D)[None, :]
        b_delta = tl.load(part_mean[None, :] + parts[:, None] * D, mask=inside, other=0.0) - b_mean[None, :]
        b_delta = tl.where(inside, b_delta, 0.0)
        b_sum += tl.load(part_deviation[None, :] + parts[:, None] * D, mask=inside, other=0.0)
        b_sum += b_delta * b_delta * b_more[:, None]
    index = group * D + cols
    tl.store(mean + index, b_mean, mask=cols < D)
    tl.store(scale + index, share * tl.rsqrt(tl.sum(b_sum, 0) / count + eps), mask=cols < D)


@triton.jit
def _part_sizes(lengths, group, parts, num_positions, num_parts, PART: tl.constexpr):
    """Return the number of positions of each part, in fp32."""
    b_length = tl.zeros(parts.shape, tl.int32) + num_positions
    if lengths is not None:
        if PART:
            b_length = tl.zeros(parts.shape, tl.int64) + tl.load(lengths + group)
        else:
            b_length = tl.load(lengths + parts, mask=parts < num_parts, other=0)
        b_length = tl.minimum(tl.maximum(b_length, 0), num_positions).to(tl.int32)
    if PART:
        b_length = tl.minimum(tl.maximum(b_length - parts * PART, 0), PART)
    return tl.where(parts < num_parts, b_length, 0).to(tl.float32)


class Statistics(NamedTuple):
    """fp32 statistics of norms over positions; None without such a norm."""

    layer_mean: Tensor | None
    layer_scale: Tensor | None
    average_mean: Tensor | None
    average_scale: Tensor | None


def statistics(
    layers: tuple[Tensor, ...], layer_norm: int, final_norm: int, lengths: Tensor | None, eps: float
) -> Statistics:
    """Launch the statistics over positions; norms within a row need none."""
    num_samples, num_positions, width = layers[0].shape
    shape = num_samples, num_positions
    strides = layers[0].stride()[:2]
    num_layers = len(layers)
    layer_mean = layer_scale = average_mean = average_scale = None
    if layer_norm in (INSTANCE.value, BATCH.value):
        layer_mean, layer_scale = _new_pair(layers[0], num_layers, num_samples, width)
        block = channel_tile(width)
        _layer_statistics_kernel[(num_samples * cdiv(width, block), num_layers)](
            layers,
            lengths,
            layer_mean,
            layer_scale,
            *shape,
            *strides,
            eps,
            K=num_layers,
            D=width,
            PARTS=layer_norm == BATCH.value,
            BLOCK_T=8 if num_positions <= SHORT else 16,
            BLOCK_D=block,
            LOADS=4,
            num_warps=1 if num_positions <= SHORT else 4,
        )
        if layer_norm == BATCH.value:
            layer_mean, layer_scale = _combined(layer_mean, layer_scale, lengths, num_positions, 0, 1 / num_layers, eps)
    if final_norm == INSTANCE.value:
        num_parts = cdiv(num_positions, PART)
        parts = _new_pair(layers[0], num_samples, num_parts, width)
        _average_statistics_kernel[(num_samples * num_parts,)](
            layers,
            lengths,
            *parts,
            layer_mean,
            layer_scale,
            *shape,
            num_parts,
            *strides,
            eps,
            K=num_layers,
            D=width,
            LAYER_NORM=layer_norm,
            PART=PART,
            BLOCK_D=next_power_of_2(width),
            num_warps=row_warps(width, SUM_CHANNELS, layer_mean is not None),
        )
        average_mean, average_scale = _combined(*parts, lengths, num_positions, PART, 1.0, eps)
    return Statistics(layer_mean, layer_scale, average_mean, average_scale)


def _new_pair(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.float32)


def channel_tile(width: int) -> int:
    """Return the channels of a tile of statistics."""
    return min(next_power_of_2(width), TILE_CHANNELS)


def _combined(
    part_mean: Tensor,
    part_deviation: Tensor,
    lengths: Tensor | None,
    num_positions: int,
    part: int,
    share: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the combination of parts `[num_groups, num_parts, D]`; return mean and scale `[num_groups, D]`."""
    num_groups, num_parts, width = part_mean.shape
    pair = _new_pair(part_mean, num_groups, width)
    block = channel_tile(width)
    _combine_statistics_kernel[(num_groups, cdiv(width, block))](
        part_mean,
        part_deviation,
        lengths,
        *pair,
        num_positions,
        num_parts,
        share,
        eps,
        D=width,
        PART=part,
        BLOCK_P=PARTS_PER_TILE,
        BLOCK_D=block,
        num_warps=4,
    )
    return pair
