"""Target and loss in one operation. Reference: ``ops/data2vec_loss.py``.

Without a row map, one kernel computes both, with the target in registers. Traffic per masked element: K reads of the
layers (2 or 4 B each), one read of the prediction, one write of the slope. Norms over positions first read all
positions of the layers for their statistics (``target_statistics.py``). A program processes a fixed set of predictions
row by row and writes its sums, which ``masked_loss.py`` adds in a fixed order.

With a row map, several predictions share a target: it is computed once, in fp32 `[M, D]`, and then compared by
``masked_loss.py``. For 16 masks per sample, one kernel that computes it for every prediction took 516 us, and the two
operations 181 us.

The figures were measured on one H200 on 2026-11-26, those in the kernel's docstring with a trial kernel of the same
form, as time and as share of the speed of a copy. In its present form the kernel has not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked_loss import (
    beta_and_inverse,
    element_loss,
    loss_factor,
    masked_smooth_l1,
    no_rows,
    plain_rows,
    split_factor,
    sum_blocks,
)
from .sizes import cdiv, next_power_of_2
from .target_row import SUM_CHANNELS, plain_layers, row_warps, target_row
from .target_statistics import statistics
from .topk_target import topk_target

# with moments, a block's sums cost 16 bytes per channel
MAX_BLOCKS = 1024


@triton.jit(do_not_specialize=["num_preds", "rows_per_block", "num_samples", "num_positions", "num_rows"])
def _data2vec_loss_fwd_kernel(
    pred,  # [N, D]
    layers,  # tuple of K [B, T, D]
    rows,  # [N] int64
    slope,  # [N, D] like pred, or None
    partial,  # [num_blocks, 4, D] fp32: sums of pred, pred^2, target, target^2; or None
    partial_loss,  # [num_blocks] fp32
    layer_mean,
    layer_scale,
    average_mean,
    average_scale,
    num_preds,
    rows_per_block,
    num_samples,
    num_positions,
    num_rows,  # B * T
    stride_pred,
    stride_sample,
    stride_position,
    eps,
    beta,
    inverse_beta,
    slope_factor,
    K: tl.constexpr,
    D: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    FINAL_NORM: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute target, loss and slope of a group of rows, one after the other, in one warp up to 768 channels.

    74 us (62 % of a copy) with moments and 16 rows a program, 64 us (72 %) without and 4 to 8 rows, for 15,052 rows of
    6 x 768 bf16; 169 us with 30 rows for 4 warps. The trial kernel took mean and variance of a layer in one pass.
    """
    block = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    in_row = cols < D
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, num_preds)
    loss = 0.0
    b_pred_sum = tl.zeros((BLOCK_D,), tl.float32)
    b_pred_square = tl.zeros((BLOCK_D,), tl.float32)
    b_target_sum = tl.zeros((BLOCK_D,), tl.float32)
    b_target_square = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(first, last):
        b_pred = tl.load(pred + i * stride_pred + cols, mask=in_row, other=0.0).to(tl.float32)
        row = tl.load(rows + i)
        valid = (row >= 0) & (row < num_rows)
        # 32 bits, unless there are more rows: ptxas calls a function to divide 64
        row = row.to(num_rows.dtype)
        b_target = target_row(
            layers,
            (row // num_positions).to(tl.int64),
            (row % num_positions).to(tl.int64),
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
        b_target = tl.where(in_row, tl.where(valid, b_target, float("nan")), 0.0)
        b_one, b_slope = element_loss(b_pred - b_target, beta, inverse_beta, slope_factor, SQUARE)
        loss += tl.sum(b_one, 0)
        if partial is not None:
            b_pred_sum += b_pred
            b_pred_square += b_pred * b_pred
            b_target_sum += b_target
            b_target_square += b_target * b_target
        if slope is not None:
            tl.store(slope + i * D + cols, b_slope.to(slope.dtype.element_ty), mask=in_row)
    tl.store(partial_loss + block, loss)
    if partial is not None:
        partial += block * 4 * D + cols
        tl.store(partial, b_pred_sum, mask=in_row)
        tl.store(partial + D, b_pred_square, mask=in_row)
        tl.store(partial + 2 * D, b_target_sum, mask=in_row)
        tl.store(partial + 3 * D, b_target_square, mask=in_row)


def data2vec_loss(
    pred: Tensor,
    layers: Sequence[Tensor],
    layer_norm: int,
    final_norm: int,
    rows: Tensor,
    lengths: Tensor | None,
    eps: float,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the target and the loss, without host synchronization."""
    if target_rows is not None:
        target = topk_target(layers, layer_norm, final_norm, rows, lengths, eps)
        return masked_smooth_l1(pred, target, target_rows, beta, scale, mean, need_grad, need_moments)
    num_preds, width = pred.shape
    num_samples, num_positions, _ = layers[0].shape
    slope = pred.new_empty(pred.shape if need_grad else (0,))
    if pred.numel() == 0:
        return *no_rows(pred, need_moments), slope
    pred, layers = plain_rows(pred), plain_layers(layers)
    lengths = None if lengths is None else lengths.contiguous()
    stats = statistics(layers, layer_norm, final_norm, lengths, eps)
    rows_per_block = max(cdiv(num_preds, MAX_BLOCKS), 16) if need_moments else 8
    num_blocks = cdiv(num_preds, rows_per_block)
    partial = pred.new_empty((num_blocks, 4, width), dtype=torch.float32) if need_moments else None
    partial_loss = pred.new_empty((num_blocks,), dtype=torch.float32)
    factor = loss_factor(pred.numel(), scale, mean)
    _data2vec_loss_fwd_kernel[(num_blocks,)](
        pred,
        layers,
        rows.contiguous(),
        slope if need_grad else None,
        partial,
        partial_loss,
        *stats,
        num_preds,
        rows_per_block,
        num_samples,
        num_positions,
        num_samples * num_positions,
        pred.stride(0),
        *layers[0].stride()[:2],
        eps,
        *beta_and_inverse(beta),
        split_factor(factor, pred.dtype)[0],
        K=len(layers),
        D=width,
        LAYER_NORM=layer_norm,
        FINAL_NORM=final_norm,
        SQUARE=beta == 0.0,
        BLOCK_D=next_power_of_2(width),
        num_warps=row_warps(width, SUM_CHANNELS, stats.layer_mean is not None),
    )
    return *sum_blocks(partial, partial_loss, factor), slope
