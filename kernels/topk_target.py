"""The target: K layers normalized, averaged, normalized again, at selected rows. Reference: ``ops/topk_target.py``.

Norms that need one row only (none, layer) are one kernel: a program reads K rows and writes one, so the traffic is that
of the asked rows. Norms over positions take statistics first. ``instance``: one more kernel that reads every layer
once; a program sees all positions of a few channels of one sample. ``batch``: the same, then the samples' statistics
are put together. A final ``instance``: the average of every position is computed and forgotten, 32 positions to a
program, and the programs' statistics are put together. No atomics: a run repeats itself bit for bit.

The layers are new tensors in every step, so their addresses travel as arguments of the launch (a tuple) and not in a
table that would have to be copied to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# indices into LAYER_NORMS and FINAL_NORMS of d2v_fast/ops/topk_target.py
NONE = tl.constexpr(0)
LAYER = tl.constexpr(1)
INSTANCE = tl.constexpr(2)
BATCH = tl.constexpr(3)

# tile of the layers' statistics: 64 bf16 channels are 128 bytes, whole sectors; 64 positions are 4 loads per thread
TILE_POSITIONS = 64
TILE_CHANNELS = 64
# positions per partial result of the statistics of the average
PART = 32


@triton.jit
def target_row(
    layers,  # tuple of K [B, T, D]
    sample,
    position,
    valid,  # if false, nothing is read
    cols,
    layer_mean,  # [K, B, D], or [K, D] for BATCH; fp32
    layer_scale,  # the same shape, includes 1 / K
    average_mean,  # [B, D] fp32
    average_scale,  # [B, D] fp32
    num_samples,
    stride_sample,
    stride_position,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    FINAL_NORM: tl.constexpr,
):
    """Return one row of the target in fp32, 0 past D."""
    inside = (cols < D) & valid
    offset = sample * stride_sample + position * stride_position + cols
    b_sum = tl.zeros(cols.shape, tl.float32)
    b_next = tl.load(layers[0] + offset, mask=inside, other=0.0)
    for k in tl.static_range(K):
        b_x = b_next.to(tl.float32)
        if k + 1 < K:
            # load the next layer while this one is reduced
            b_next = tl.load(layers[k + 1] + offset, mask=inside, other=0.0)
        if LAYER_NORM == NONE:
            b_sum += b_x
        elif LAYER_NORM == LAYER:
            b_sum += _normalize_row(b_x, inside, eps, D) * (1.0 / K)
        else:
            group = k if LAYER_NORM == BATCH else k * num_samples + sample
            b_mean = tl.load(layer_mean + group * D + cols, mask=inside, other=0.0)
            b_scale = tl.load(layer_scale + group * D + cols, mask=inside, other=0.0)
            b_sum += (b_x - b_mean) * b_scale
    if LAYER_NORM == NONE:
        b_sum *= 1.0 / K
    if FINAL_NORM == LAYER:
        b_sum = _normalize_row(b_sum, inside, eps, D)
    elif FINAL_NORM == INSTANCE:
        b_mean = tl.load(average_mean + sample * D + cols, mask=inside, other=0.0)
        b_scale = tl.load(average_scale + sample * D + cols, mask=inside, other=0.0)
        b_sum = (b_sum - b_mean) * b_scale
    return b_sum


@triton.jit
def _normalize_row(b_x, inside, eps, D: tl.constexpr):
    mean = tl.sum(b_x, 0) / D
    b_difference = tl.where(inside, b_x - mean, 0.0)
    variance = tl.sum(b_difference * b_difference, 0) / D
    return b_difference * tl.rsqrt(variance + eps)


@triton.jit(do_not_specialize=["num_samples", "num_positions", "num_rows"])
def _topk_target_fwd_kernel(
    layers,  # tuple of K [B, T, D]
    rows,  # [N] int64, or None for all
    lengths,  # [B] int64 or None
    out,  # [N, D] fp32
    layer_mean,
    layer_scale,
    average_mean,
    average_scale,
    num_samples,
    num_positions,
    num_rows,  # B * T
    stride_sample,
    stride_position,
    eps,
    K: tl.constexpr,
    D: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    FINAL_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # int64: B * T * D may exceed 2^31
    index = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    if rows is not None:
        row = tl.load(rows + index)
        valid = (row >= 0) & (row < num_rows)
        fill = float("nan")
    else:
        row = index
        valid = True
        fill = 0.0
        if lengths is not None:
            valid = row % num_positions < tl.load(lengths + row // num_positions)
    sample = row // num_positions
    b_target = target_row(
        layers,
        sample,
        row % num_positions,
        valid,
        cols,
        layer_mean,
        layer_scale,
        average_mean,
        average_scale,
        num_samples,
        stride_sample,
        stride_position,
        eps,
        K,
        D,
        LAYER_NORM,
        FINAL_NORM,
    )
    tl.store(out + index * D + cols, tl.where(valid, b_target, fill), mask=cols < D)


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
):
    NUM_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    sample = (tl.program_id(0) // NUM_TILES).to(tl.int64)
    cols = tl.program_id(0) % NUM_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(1)
    layer = layers[0]
    for other in tl.static_range(1, K):
        layer = tl.where(k == other, layers[other], layer)
    length = num_positions
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), num_positions).to(tl.int32)
    start = layer + sample * stride_sample + cols[None, :]
    positions = tl.arange(0, BLOCK_T)[:, None]
    in_row = (cols < D)[None, :]

    # subtract the mean of the first tile before squaring, so that a large mean does not cost precision
    inside = in_row & (positions < length)
    b_x = tl.load(start + positions.to(tl.int64) * stride_position, mask=inside, other=0.0).to(tl.float32)
    b_pivot = tl.sum(b_x, 0) / tl.maximum(tl.minimum(length, BLOCK_T), 1)
    b_sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    b_square = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, length, BLOCK_T):
        t = first + positions
        inside = in_row & (t < length)
        b_x = tl.load(start + t.to(tl.int64) * stride_position, mask=inside, other=0.0).to(tl.float32)
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
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    part_mean += group * num_parts * D + cols
    part_deviation += group * num_parts * D + cols
    b_pivot = tl.load(part_mean, mask=inside, other=0.0)
    b_mean = tl.zeros((BLOCK_D,), tl.float32)
    b_deviation = tl.zeros((BLOCK_D,), tl.float32)
    n = 0.0
    for p in range(num_parts):
        length = num_positions
        if lengths is not None:
            length = tl.load(lengths + (group if PART else p)).to(tl.int32)
        length = tl.minimum(tl.maximum(length, 0), num_positions)
        if PART:
            length = tl.minimum(tl.maximum(length - p * PART, 0), PART)
        more = length.to(tl.float32)
        total = tl.maximum(n + more, 1.0)
        # the pairwise update of Chan, Golub and LeVeque, relative to the first part's mean
        b_delta = tl.load(part_mean + p * D, mask=inside, other=0.0) - b_pivot - b_mean
        b_delta = tl.where(more > 0, b_delta, 0.0)
        b_more = tl.load(part_deviation + p * D, mask=inside, other=0.0)
        b_mean += b_delta * (more / total)
        b_deviation += b_more + b_delta * b_delta * (n * more / total)
        n += more
    index = group * D + cols
    tl.store(mean + index, b_pivot + b_mean, mask=inside)
    tl.store(scale + index, share * tl.rsqrt(b_deviation / tl.maximum(n, 1.0) + eps), mask=inside)


class Statistics(NamedTuple):
    """fp32 statistics of norms over positions; None without such a norm."""

    layer_mean: Tensor | None
    layer_scale: Tensor | None
    average_mean: Tensor | None
    average_scale: Tensor | None


def plain_layers(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the layers with equal strides and a contiguous last dimension; copy only if necessary."""
    first = layers[0].stride()
    if first[2] == 1 and all(x.stride() == first for x in layers):
        return tuple(layers)
    return tuple(x.contiguous() for x in layers)


def row_warps(block_d: int, layer: Tensor) -> int:
    """Return the warps of a program that holds one row: 16 bytes of a layer per thread."""
    return min(max(block_d * layer.element_size() // 512, 1), 16)


def statistics(
    layers: tuple[Tensor, ...], layer_norm: int, final_norm: int, lengths: Tensor | None, eps: float
) -> Statistics:
    """Launch the statistics over positions; norms within a row need none."""
    num_samples, num_positions, width = layers[0].shape
    stride_sample, stride_position, _ = layers[0].stride()
    num_layers = len(layers)
    new = layers[0].new_empty
    layer_mean = layer_scale = average_mean = average_scale = None
    block = min(triton.next_power_of_2(width), TILE_CHANNELS)
    tiles = triton.cdiv(width, block)
    if layer_norm in (INSTANCE.value, BATCH.value):
        layer_mean, layer_scale = (new(num_layers, num_samples, width, dtype=torch.float32) for _ in range(2))
        _layer_statistics_kernel[(num_samples * tiles, num_layers)](
            layers,
            lengths,
            layer_mean,
            layer_scale,
            num_samples,
            num_positions,
            stride_sample,
            stride_position,
            eps,
            K=num_layers,
            D=width,
            PARTS=layer_norm == BATCH.value,
            BLOCK_T=min(triton.next_power_of_2(num_positions), TILE_POSITIONS),
            BLOCK_D=block,
            num_warps=4,
        )
        if layer_norm == BATCH.value:
            parts = layer_mean, layer_scale
            layer_mean, layer_scale = (new(num_layers, width, dtype=torch.float32) for _ in range(2))
            _combine_statistics_kernel[(num_layers, tiles)](
                *parts,
                lengths,
                layer_mean,
                layer_scale,
                num_positions,
                num_samples,
                1.0 / num_layers,
                eps,
                D=width,
                PART=0,
                BLOCK_D=block,
                num_warps=2,
            )
    if final_norm == INSTANCE.value:
        num_parts = triton.cdiv(num_positions, PART)
        block_d = triton.next_power_of_2(width)
        part_mean, part_deviation = (new(num_samples, num_parts, width, dtype=torch.float32) for _ in range(2))
        average_mean, average_scale = (new(num_samples, width, dtype=torch.float32) for _ in range(2))
        _average_statistics_kernel[(num_samples * num_parts,)](
            layers,
            lengths,
            part_mean,
            part_deviation,
            layer_mean,
            layer_scale,
            num_samples,
            num_positions,
            num_parts,
            stride_sample,
            stride_position,
            eps,
            K=num_layers,
            D=width,
            LAYER_NORM=layer_norm,
            PART=PART,
            BLOCK_D=block_d,
            num_warps=row_warps(block_d, layers[0]),
        )
        _combine_statistics_kernel[(num_samples, tiles)](
            part_mean,
            part_deviation,
            lengths,
            average_mean,
            average_scale,
            num_positions,
            num_parts,
            1.0,
            eps,
            D=width,
            PART=PART,
            BLOCK_D=block,
            num_warps=2,
        )
    return Statistics(layer_mean, layer_scale, average_mean, average_scale)


def topk_target(
    layers: Sequence[Tensor],
    layer_norm: int,
    final_norm: int,
    rows: Tensor | None,
    lengths: Tensor | None,
    eps: float,
) -> Tensor:
    """Launch the statistics of the norms and one program per row, without host synchronization."""
    num_samples, num_positions, width = layers[0].shape
    if rows is None:
        out = layers[0].new_empty((num_samples, num_positions, width), dtype=torch.float32)
    else:
        out = layers[0].new_empty((rows.shape[0], width), dtype=torch.float32)
    if out.numel() == 0 or layers[0].numel() == 0:
        # without positions, every row is out of range
        return out.fill_(float("nan"))
    layers = plain_layers(layers)
    lengths = None if lengths is None else lengths.contiguous()
    block_d = triton.next_power_of_2(width)
    stats = statistics(layers, layer_norm, final_norm, lengths, eps)
    _topk_target_fwd_kernel[(out.numel() // width,)](
        layers,
        None if rows is None else rows.contiguous(),
        lengths,
        out,
        *stats,
        num_samples,
        num_positions,
        num_samples * num_positions,
        *layers[0].stride()[:2],
        eps,
        K=len(layers),
        D=width,
        LAYER_NORM=layer_norm,
        FINAL_NORM=final_norm,
        BLOCK_D=block_d,
        num_warps=row_warps(block_d, layers[0]),
    )
    return out
