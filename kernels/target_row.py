"""One row of the target, held by one warp: part of ``topk_target.py`` and ``data2vec_loss.py``."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

# indices into LAYER_NORMS and FINAL_NORMS of d2v_fast/ops/topk_target.py
NONE = tl.constexpr(0)
LAYER = tl.constexpr(1)
INSTANCE = tl.constexpr(2)
BATCH = tl.constexpr(3)

# channels up to which one warp can hold a row, and a row and the sums of several, without spilling registers
ROW_CHANNELS = 1024
SUM_CHANNELS = 768


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
    """Return one row of the target in fp32, 0 past D.

    Products are fused explicitly, so that every kernel rounds the average alike: the compiler would fuse the last one
    with the subtraction of the average's mean, and 1 / sqrt(eps) would magnify the difference.
    """
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
            b_sum = tl.fma(_normalize_row(b_x, inside, eps, D), 1.0 / K, b_sum)
        else:
            group = k if LAYER_NORM == BATCH else k * num_samples + sample
            b_mean = tl.load(layer_mean + group * D + cols, mask=inside, other=0.0)
            b_scale = tl.load(layer_scale + group * D + cols, mask=inside, other=0.0)
            b_sum = tl.fma(b_x - b_mean, b_scale, b_sum)
    if LAYER_NORM == NONE:
        b_sum = mean_of(b_sum, K)
    if FINAL_NORM == LAYER:
        b_sum = _normalize_row(b_sum, inside, eps, D)
    elif FINAL_NORM == INSTANCE:
        b_mean = tl.load(average_mean + sample * D + cols, mask=inside, other=0.0)
        b_scale = tl.load(average_scale + sample * D + cols, mask=inside, other=0.0)
        b_sum = (b_sum - b_mean) * b_scale
    return b_sum


@triton.jit
def mean_of(total, COUNT: tl.constexpr):
    """Return total / COUNT, correctly rounded: the mean of equal values must be that value, since the scale of their
    deviation is 1 / sqrt(eps). For `tl.div_rn`, ptxas calls a function, which costs a row up to 80 registers."""
    share: tl.constexpr = 1.0 / COUNT
    mean = total * share
    return tl.fma(tl.fma(-mean, COUNT, total), share, mean)


@triton.jit
def _normalize_row(b_x, inside, eps, D: tl.constexpr):
    mean = mean_of(tl.sum(b_x, 0), D)
    b_difference = tl.where(inside, b_x - mean, 0.0)
    variance = tl.sum(b_difference * b_difference, 0) / D
    return b_difference * tl.rsqrt(variance + eps)


def plain_layers(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the layers with equal strides and a contiguous last dimension; copy only if necessary."""
    first = layers[0].stride()
    if first[2] == 1 and all(x.stride() == first for x in layers):
        return tuple(layers)
    return tuple(x.contiguous() for x in layers)


def row_warps(width: int, single: int, has_statistics: bool = False) -> int:
    """Return the warps of a program that holds one row.

    One up to `single` channels; above that, 16 channels per thread. With statistics of the layers 8 per thread, because
    the compiler loads those of several layers ahead.
    """
    if width <= single and not has_statistics:
        return 1
    return min(next_power_of_2(cdiv(width, 256 if has_statistics else 512)), 16)
