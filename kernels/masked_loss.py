"""Smooth L1 over rows with slope and, if asked for, sums of both sides in one pass. Reference: ``ops/masked_loss.py``.

Traffic per element: 2 or 4 B read of the prediction and of the target, 2 or 4 B written of the slope: 8 B for bf16
predictions and fp32 targets. A program processes a fixed set of rows and 256 channels and writes its sums; a second
kernel adds them in a fixed order. Without atomics, and with a partition that depends on the shape only, results are
reproducible bit for bit. The loss without moments is summed in another order than that with them.

Figures in the kernels' docstrings were measured on one H200 on 2026-11-26 with trial kernels of the same form, as time
and as share of the speed of a copy. In their present form the kernels have not yet run on a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

TILE_CHANNELS = 256
SCALE_BLOCK = 4096


class Form(NamedTuple):
    """Division of the loss among programs."""

    tile: int
    """Elements of a tile: 8 per thread."""
    unroll: int
    """Tiles per step of a program's loop."""
    least_rows: int
    """Rows of a program, where there are many more."""
    max_blocks: int
    """Groups of rows, above which a program gets more of them."""
    num_warps: int


# one group of rows costs 4 bytes per 256 channels without moments, and 16 bytes per channel with them
WITHOUT_MOMENTS = Form(tile=2048, unroll=1, least_rows=32, max_blocks=2048, num_warps=8)
WITH_MOMENTS = Form(tile=256, unroll=8, least_rows=16, max_blocks=1024, num_warps=1)


@triton.jit
def element_loss(b_error, beta, inverse_beta, slope_factor, SQUARE: tl.constexpr):
    """Return the loss of each element and its derivative times `slope_factor`. Keeps NaN."""
    if SQUARE:
        b_loss = b_error * b_error
        b_slope = 2.0 * b_error
    else:
        # clamping the error at beta gives both the quadratic and the linear part
        b_near = tl.where(b_error > beta, beta, tl.where(b_error < -beta, -beta, b_error))
        b_slope = b_near * inverse_beta
        b_loss = b_slope * (b_error - 0.5 * b_near)
    return b_loss, b_slope * slope_factor


def beta_and_inverse(beta: float) -> tuple[float, float]:
    """Return beta, at least the smallest normal number, and its inverse. A subnormal beta has no finite inverse, and no
    relevant fp32 error lies between it and the smallest normal number."""
    beta = max(beta, torch.finfo(torch.float32).tiny)
    return beta, 1.0 / beta


@triton.jit(do_not_specialize=["num_rows", "num_targets", "rows_per_block"])
def _masked_loss_fwd_kernel(
    pred,  # [N, D]
    target,  # [M, D]
    target_rows,  # [N] int64 or None
    slope,  # [N, D] like pred, or None
    partial,  # [num_blocks, 4, D] fp32: sums of pred, pred^2, target, target^2; or None
    partial_loss,  # [num_blocks, num_tiles] fp32
    num_rows,
    num_targets,
    rows_per_block,
    stride_pred,
    stride_target,
    beta,
    inverse_beta,
    slope_factor,
    D: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Compute loss and slope of a group of rows and 256 channels.

    Without moments: tiles of 8 rows, 8 warps, 32 rows a program: 12.4, 26.9 and 39.2 us (87, 100 and 83 % of a copy)
    for 5,800, 15,053 and, with a row map, 40,192 rows of 768 bf16 channels and fp32 targets. With moments: tiles of
    one row, one warp, 8 tiles unrolled, so that a thread holds the four sums of its 8 channels once: 18.0, 36.2 and
    53.2 us (60, 74 and 61 %) with 16 to 24 rows a program.
    """
    block = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, num_rows)
    b_loss = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_pred_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_pred_square = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_target_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_target_square = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N * UNROLL):
        for i in tl.static_range(UNROLL):
            # int64: N * D may exceed 2^31
            row = start + i * BLOCK_N + tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
            inside = (row < last) & (cols < D)
            b_pred = tl.load(pred + row * stride_pred + cols, mask=inside, other=0.0).to(tl.float32)
            if target_rows is not None:
                target_row = tl.load(target_rows + row, mask=row < last, other=0)
                valid = (target_row >= 0) & (target_row < num_targets)
                b_target = tl.load(target + target_row * stride_target + cols, mask=inside & valid, other=0.0)
                b_target = tl.where(valid, b_target.to(tl.float32), float("nan"))
            else:
                b_target = tl.load(target + row * stride_target + cols, mask=inside, other=0.0).to(tl.float32)
            b_one, b_slope = element_loss(b_pred - b_target, beta, inverse_beta, slope_factor, SQUARE)
            b_loss += b_one
            if partial is not None:
                b_pred_sum += b_pred
                b_pred_square += b_pred * b_pred
                b_target_sum += b_target
                b_target_square += b_target * b_target
            if slope is not None:
                tl.store(slope + row * D + cols, b_slope.to(slope.dtype.element_ty), mask=inside)
    tl.store(partial_loss + block * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(b_loss, 1), 0))
    if partial is not None:
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        partial += block * 4 * D + cols
        tl.store(partial, tl.sum(b_pred_sum, 0), mask=cols < D)
        tl.store(partial + D, tl.sum(b_pred_square, 0), mask=cols < D)
        tl.store(partial + 2 * D, tl.sum(b_target_sum, 0), mask=cols < D)
        tl.store(partial + 3 * D, tl.sum(b_target_square, 0), mask=cols < D)


@triton.jit(do_not_specialize=["num_blocks", "num_losses"])
def _sum_blocks_kernel(
    partial,  # [num_blocks, 4 * D] fp32, or None
    partial_loss,  # [num_losses] fp32
    moments,  # [4 * D] fp32, or None
    loss,  # [] fp32
    num_blocks,
    num_losses,
    factor,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LOSS: tl.constexpr,
):
    """Add the blocks' losses, in the first program, and 16 channels of their sums: one wide program each, 8 warps.

    256 blocks x 16 channels at a time take 4.2 us for 256 blocks, 512 x 16 take 5.7 us for 512.
    """
    if partial is not None:
        cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        blocks = tl.arange(0, BLOCK_N)[:, None]
        b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, num_blocks, BLOCK_N):
            inside = (start + blocks < num_blocks) & (cols < 4 * D)[None, :]
            b_sum += tl.load(partial + (start + blocks).to(tl.int64) * 4 * D + cols[None, :], mask=inside, other=0.0)
        tl.store(moments + cols, tl.sum(b_sum, 0), mask=cols < 4 * D)
    if tl.program_id(0) == 0:
        b_loss = tl.zeros((BLOCK_LOSS,), tl.float32)
        offset = tl.arange(0, BLOCK_LOSS)
        for start in range(0, num_losses, BLOCK_LOSS):
            b_loss += tl.load(partial_loss + start + offset, mask=start + offset < num_losses, other=0.0)
        tl.store(loss, tl.sum(b_loss, 0) * factor)


@triton.jit
def _scale_gradient_kernel(
    slope,  # [n]
    grad_output,  # [] fp32
    out,  # [n], may be `slope`
    n,
    left,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(grad_output) * left
    if (factor != 1.0) | (not IN_PLACE):
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_slope = tl.load(slope + offset, mask=offset < n, other=0.0).to(tl.float32)
        tl.store(out + offset, (b_slope * factor).to(out.dtype.element_ty), mask=offset < n)


def loss_factor(num_elements: int, scale: float, mean: bool) -> float:
    """Return the factor of the sum over rows and channels; finite if there are no rows."""
    return scale / max(num_elements, 1) if mean else scale


def split_factor(factor: float, dtype: torch.dtype) -> tuple[float, float]:
    """Divide the loss's factor between the slope and the backward pass; see the reference."""
    if dtype != torch.float16:
        return factor, 1.0
    mantissa, exponent = math.frexp(factor)
    return mantissa, math.ldexp(1.0, exponent)


def plain_rows(x: Tensor) -> Tensor:
    """Return the rows with a contiguous last dimension; copy only if necessary."""
    return x if x.stride(1) == 1 else x.contiguous()


def sum_blocks(partial: Tensor | None, partial_loss: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Launch the sum over the blocks' losses and sums `[num_blocks, 4, D]`, if any; return ``(loss, moments)``."""
    num_blocks, _, width = (1, 4, 1) if partial is None else partial.shape
    loss = partial_loss.new_empty(())
    moments = None if partial is None else partial.new_empty((4, width))
    block = min(next_power_of_2(4 * width), 16)
    num_losses = partial_loss.numel()
    _sum_blocks_kernel[(1 if partial is None else cdiv(4 * width, block),)](
        partial,
        partial_loss,
        moments,
        loss,
        num_blocks,
        num_losses,
        factor,
        D=width,
        BLOCK_N=min(next_power_of_2(num_blocks), 512),
        BLOCK_D=block,
        BLOCK_LOSS=min(next_power_of_2(num_losses), 4096),
        num_warps=8,
    )
    return loss, partial_loss.new_empty(0) if moments is None else moments


def no_rows(pred: Tensor, need_moments: bool) -> tuple[Tensor, Tensor]:
    """Return loss and sums without rows: zeros."""
    moments = pred.new_zeros((4, pred.shape[1]) if need_moments else (0,), dtype=torch.float32)
    return pred.new_zeros((), dtype=torch.float32), moments


def masked_smooth_l1(
    pred: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the loss and the sum over its blocks, without host synchronization."""
    num_rows, width = pred.shape
    slope = pred.new_empty(pred.shape if need_grad else (0,))
    if pred.numel() == 0:
        return *no_rows(pred, need_moments), slope
    pred, target = plain_rows(pred), plain_rows(target)
    form = WITH_MOMENTS if need_moments else WITHOUT_MOMENTS
    block_d = min(next_power_of_2(width), TILE_CHANNELS)
    num_tiles = cdiv(width, block_d)
    block_n = form.tile // block_d
    rows_per_block = max(cdiv(num_rows, form.max_blocks), form.least_rows)
    rows_per_block = cdiv(rows_per_block, block_n * form.unroll) * block_n * form.unroll
    num_blocks = cdiv(num_rows, rows_per_block)
    partial = pred.new_empty((num_blocks, 4, width), dtype=torch.float32) if need_moments else None
    partial_loss = pred.new_empty((num_blocks, num_tiles), dtype=torch.float32)
    factor = loss_factor(pred.numel(), scale, mean)
    _masked_loss_fwd_kernel[(num_blocks, num_tiles)](
        pred,
        target,
        None if target_rows is None else target_rows.contiguous(),
        slope if need_grad else None,
        partial,
        partial_loss,
        num_rows,
        target.shape[0],
        rows_per_block,
        pred.stride(0),
        target.stride(0),
        *beta_and_inverse(beta),
        split_factor(factor, pred.dtype)[0],
        D=width,
        SQUARE=beta == 0.0,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        UNROLL=form.unroll,
        num_warps=form.num_warps,
    )
    return *sum_blocks(partial, partial_loss, factor), slope


def scale_gradient(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> Tensor:
    """Launch the product of the saved slope and the incoming gradient, which is read on the device."""
    slope = slope.contiguous()
    out = torch.empty_like(slope)
    _launch_scale(slope, grad_output, out, scale, mean)
    return out


def scale_gradient_(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> None:
    """Run `scale_gradient` in place; for a factor of 1 the kernel returns before reading the slope."""
    _launch_scale(slope, grad_output, slope, scale, mean)


def _launch_scale(slope: Tensor, grad_output: Tensor, out: Tensor, scale: float, mean: bool) -> None:
    if slope.numel() == 0:
        return
    _scale_gradient_kernel[(cdiv(slope.numel(), SCALE_BLOCK),)](
        slope,
        grad_output,
        out,
        slope.numel(),
        split_factor(loss_factor(slope.numel(), scale, mean), slope.dtype)[1],
        IN_PLACE=out is slope,
        BLOCK=SCALE_BLOCK,
        num_warps=8,
    )
