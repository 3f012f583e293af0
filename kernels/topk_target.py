"""The target: K layers normalized, averaged, normalized again, at selected rows. Reference: ``ops/topk_target.py``.

Norms that need one row only (none, layer) are one kernel: a program reads K rows and writes one, so the traffic is that
of the asked rows. Norms over positions take statistics first (``target_statistics.py``).

The layers are new tensors in every step, so their addresses travel as arguments of the launch (a tuple) and not in a
table that would have to be copied to the device.

Figures in the kernels' docstrings were measured on one H200 on 2026-11-26 with trial kernels of the same form, as time
and as share of the speed of a copy. In their present form the kernels have not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import next_power_of_2
from .target_row import ROW_CHANNELS, plain_layers, row_warps, target_row
from .target_statistics import statistics


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
    """Write one row of the target: one warp up to 1,024 channels, which loads the next layer while it reduces this one.

    One warp per row reduces by shuffles alone and leaves room for many rows on an SM: 52.8 us, 88 % of a copy, for
    15,052 rows of 6 x 768 bf16; two and four warps per row took 72 and 87 us, all layers loaded at once 77 us.
    """
    # int64: B * T * D may exceed 2^31
    index = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    row = index
    valid = True
    fill = 0.0
    if rows is not None:
        row = tl.load(rows + index)
        valid = (row >= 0) & (row < num_rows)
        fill = float("nan")
    # 32 bits, unless there are more rows: ptxas calls a function to divide 64
    row = row.to(num_rows.dtype)
    sample = (row // num_positions).to(tl.int64)
    position = (row % num_positions).to(tl.int64)
    if rows is None and lengths is not None:
        valid = position < tl.load(lengths + sample)
    b_target = target_row(
        layers,
        sample,
        position,
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
        BLOCK_D=next_power_of_2(width),
        num_warps=row_warps(width, ROW_CHANNELS),
    )
    return out
