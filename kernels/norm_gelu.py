"""Layer norm over channels and GELU in one pass. Reference: ``ops/norm_gelu.py``.

Traffic per element: forward, 2 or 4 B read and as many written; backward, twice as many read (input and incoming
gradient) and as many written. A program keeps whole rows in registers and goes through a fixed set of them, so weight
and bias are read once for all of these. The backward pass writes the sums of each program; a second kernel adds them
up in a fixed order. No atomics, and a partition that depends on the shape and the card only: a run repeats itself bit
for bit.

Figures in the kernels' docstrings were measured on one H200 on 2026-11-26 with these kernels at these tiles, for
8 x 49,999 rows of 512 bf16 channels, as time and as share of the speed of a copy. In their present form the kernels
have not yet run on a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2
from .target_row import mean_of

# elements per tile, 16 per thread: one row of 512 channels for one warp, and two rows for two warps
FORWARD_TILE = 512
BACKWARD_TILE = 1024
# tiles per program of the forward pass
TILES_PER_PROGRAM = 8
# programs of the backward pass per SM; the sums of each cost 8 bytes per channel
PROGRAMS_PER_SM = 16
# CUDA's limit on the second dimension of a grid
MAX_GROUPS = 65535


@triton.jit
def _normal_tail(z):
    """Return |z|, exp(-z^2 / 2), and the ratio of Phi(-|z|) to it; see ``csrc/norm_gelu.cpp``."""
    size = tl.abs(z)
    # this form keeps NaN
    size = tl.where(size > 13.0, 13.0, size)
    bell = tl.exp2(size * size * -0.72134752)
    t = 1.0 / (size * 0.3 + 1.0)
    ratio = t * 3.3477828e-2 - 1.4626683e-1
    ratio = ratio * t + 1.8386865e-1
    ratio = ratio * t - 2.9031936e-2
    ratio = ratio * t + 1.1307819e-1
    ratio = ratio * t + 1.0544711e-1
    ratio = ratio * t + 1.1972055e-1
    ratio = ratio * t + 1.1970644e-1
    return size, bell, ratio * t


@triton.jit
def _gelu(z):
    size, bell, ratio = _normal_tail(z)
    return tl.where(z > 0.0, z, 0.0) - size * (bell * ratio)


@triton.jit
def _gelu_slope(z):
    size, bell, ratio = _normal_tail(z)
    low = bell * (ratio - size * 0.39894228)
    return tl.where(z > 0.0, 1.0 - low, low)


@triton.jit(do_not_specialize=["rows_per_group", "rows_per_program", "eps"])
def _norm_gelu_fwd_kernel(
    x,  # [num_groups, rows_per_group, C]
    weight,  # [C]
    bias,  # [C]
    y,  # [num_groups * rows_per_group, C] like x
    mean,  # [num_groups * rows_per_group] fp32
    rstd,  # [num_groups * rows_per_group] fp32
    rows_per_group,
    rows_per_program,
    stride_group,
    stride_row,
    eps,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute 8 tiles of rows: one warp per row of 512 channels, so that reductions are shuffles (280 us, 70 %)."""
    # int64: the number of elements may exceed 2^31
    group = tl.program_id(1).to(tl.int64)
    x += group * stride_group
    y += group * rows_per_group * C
    mean += group * rows_per_group
    rstd += group * rows_per_group
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_per_group)
    cols = tl.arange(0, BLOCK_C)
    b_weight = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    in_row = (cols < C)[None, :]
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row = rows[:, None].to(tl.int64)
        inside = (row < last) & in_row
        b_x = tl.load(x + row * stride_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        b_mean = mean_of(tl.sum(b_x, 1), C)
        b_x = tl.where(in_row, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)
        b_y = _gelu(b_x * b_rstd[:, None] * b_weight + b_bias)
        tl.store(y + row * C + cols[None, :], b_y.to(y.dtype.element_ty), mask=inside)
        tl.store(mean + rows, b_mean, mask=rows < last)
        tl.store(rstd + rows, b_rstd, mask=rows < last)


@triton.jit(do_not_specialize=["rows_per_group", "rows_per_program"])
def _norm_gelu_bwd_kernel(
    grad,  # [num_groups, rows_per_group, C]
    x,  # [num_groups, rows_per_group, C]
    weight,  # [C]
    bias,  # [C]
    mean,  # [num_groups * rows_per_group] fp32
    rstd,  # [num_groups * rows_per_group] fp32
    grad_x,  # [num_groups * rows_per_group, C] like x
    partial,  # [num_programs, 2, C] fp32: gradients of weight and bias
    rows_per_group,
    rows_per_program,
    stride_grad_group,
    stride_grad_row,
    stride_group,
    stride_row,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute gradients of a fixed set of rows: two rows of 512 channels at a time by two warps, 16 programs per SM.

    496 us, 58 %, with 2,106 programs on 132 SMs. The programs stay small, so that the sums of both gradients, which
    every thread holds for its channels, leave room for many of them.
    """
    group = tl.program_id(1).to(tl.int64)
    grad += group * stride_grad_group
    x += group * stride_group
    grad_x += group * rows_per_group * C
    mean += group * rows_per_group
    rstd += group * rows_per_group
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows_per_group)
    cols = tl.arange(0, BLOCK_C)
    b_weight = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    in_row = (cols < C)[None, :]
    b_weight_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_bias_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        row = rows[:, None].to(tl.int64)
        inside = (row < last) & in_row
        b_x = tl.load(x + row * stride_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        b_grad = tl.load(grad + row * stride_grad_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        b_mean = tl.load(mean + rows, mask=rows < last, other=0.0)[:, None]
        b_rstd = tl.load(rstd + rows, mask=rows < last, other=0.0)[:, None]
        b_normal = (b_x - b_mean) * b_rstd
        b_grad *= _gelu_slope(b_normal * b_weight + b_bias)
        b_weight_sum += b_grad * b_normal
        b_bias_sum += b_grad
        b_grad *= b_weight
        b_shift = tl.sum(b_grad, 1)[:, None] / C
        b_tilt = tl.sum(b_grad * b_normal, 1)[:, None] / C
        b_grad = (b_grad - b_shift - b_normal * b_tilt) * b_rstd
        tl.store(grad_x + row * C + cols[None, :], b_grad.to(grad_x.dtype.element_ty), mask=inside)
    partial += (group * tl.num_programs(0) + tl.program_id(0)) * 2 * C + cols
    tl.store(partial, tl.sum(b_weight_sum, 0), mask=cols < C)
    tl.store(partial + C, tl.sum(b_bias_sum, 0), mask=cols < C)


@triton.jit(do_not_specialize=["num_programs"])
def _sum_programs_kernel(
    partial,  # [num_programs, 2, C] fp32
    grad_weight,  # [C]
    grad_bias,  # [C]
    num_programs,
    C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the programs' sums of 16 channels: 256 programs x 16 channels at a time, 8 warps."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    programs = tl.arange(0, BLOCK_N)[:, None]
    partial += tl.program_id(1) * C
    b_sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, num_programs, BLOCK_N):
        inside = (start + programs < num_programs) & (cols < C)[None, :]
        b_sum += tl.load(partial + (start + programs).to(tl.int64) * 2 * C + cols[None, :], mask=inside, other=0.0)
    b_sum = tl.sum(b_sum, 0)
    if tl.program_id(1) == 0:
        tl.store(grad_weight + cols, b_sum.to(grad_weight.dtype.element_ty), mask=cols < C)
    else:
        tl.store(grad_bias + cols, b_sum.to(grad_bias.dtype.element_ty), mask=cols < C)


def as_groups(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Reshape tensors `[..., C]` to `[num_groups, rows_per_group, C]` with contiguous channels. Returns views if one
    division into groups fits all of them, as for `x[:, :T]`, and copies otherwise."""
    shape = tensors[0].shape
    divisions = [(1, shape[:-1].numel(), shape[-1])]
    if len(shape) > 2 and shape[:-2].numel() <= MAX_GROUPS:
        divisions.append((shape[:-2].numel(), shape[-2], shape[-1]))
    for division in divisions:
        try:
            views = tuple(x.view(division) for x in tensors)
        except RuntimeError:
            continue
        if all(view.stride(-1) == 1 or shape[-1] == 1 for view in views):
            return views
    return tuple(x.contiguous().view(divisions[0]) for x in tensors)


def tile_of(width: int, elements: int) -> dict[str, int]:
    """Return rows, channels and warps of a tile; a row longer than a tile gets more warps."""
    block_c = next_power_of_2(width)
    block_n = max(elements // block_c, 1)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": min(block_n * block_c // 512, 16)}


@cache
def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass without host synchronization; return ``(y, mean, rstd)``."""
    y = x.new_empty(x.shape)
    return y, *_forward_into(y, x, weight, bias, eps)


def layer_norm_gelu_(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the forward pass in place: each program reads a tile before writing it."""
    return _forward_into(x, x, weight, bias, eps)


def _forward_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    width = x.shape[-1]
    if x.numel() == 0:
        return mean, rstd
    (rows,) = as_groups(x)
    num_groups, rows_per_group, _ = rows.shape
    tile = tile_of(width, FORWARD_TILE)
    rows_per_program = tile["BLOCK_N"] * TILES_PER_PROGRAM
    _norm_gelu_fwd_kernel[(cdiv(rows_per_group, rows_per_program), num_groups)](
        rows,
        weight.contiguous(),
        bias.contiguous(),
        y,
        mean,
        rstd,
        rows_per_group,
        rows_per_program,
        rows.stride(0),
        rows.stride(1),
        eps,
        C=width,
        **tile,
    )
    return mean, rstd


def layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass and the sum over its programs; return gradients of `x`, `weight` and `bias`."""
    grad_x = x.new_empty(x.shape)
    return grad_x, *_backward_into(grad_x, grad, x, weight, bias, mean, rstd)


def layer_norm_gelu_backward_(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass in place of `grad`: each program reads a tile before writing it."""
    return _backward_into(grad, grad, x, weight, bias, mean, rstd)


def _backward_into(
    grad_x: Tensor, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if x.numel() == 0:
        return torch.zeros_like(weight), torch.zeros_like(bias)
    grad_weight, grad_bias = weight.new_empty(width), bias.new_empty(width)
    grads, rows = as_groups(grad, x)
    num_groups, rows_per_group, _ = rows.shape
    tile = tile_of(width, BACKWARD_TILE)
    programs = max(PROGRAMS_PER_SM * num_sms(x.device) // num_groups, 1)
    rows_per_program = cdiv(cdiv(rows_per_group, programs), tile["BLOCK_N"]) * tile["BLOCK_N"]
    grid = (cdiv(rows_per_group, rows_per_program), num_groups)
    num_programs = grid[0] * grid[1]
    partial = x.new_empty((num_programs, 2, width), dtype=torch.float32)
    _norm_gelu_bwd_kernel[grid](
        grads,
        rows,
        weight.contiguous(),
        bias.contiguous(),
        mean.contiguous(),
        rstd.contiguous(),
        grad_x,
        partial,
        rows_per_group,
        rows_per_program,
        grads.stride(0),
        grads.stride(1),
        rows.stride(0),
        rows.stride(1),
        C=width,
        **tile,
    )
    block_c = min(next_power_of_2(width), 16)
    _sum_programs_kernel[(cdiv(width, block_c), 2)](
        partial,
        grad_weight,
        grad_bias,
        num_programs,
        C=width,
        BLOCK_N=min(next_power_of_2(num_programs), 256),
        BLOCK_C=block_c,
        num_warps=8,
    )
    return grad_weight, grad_bias
