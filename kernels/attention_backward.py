"""Attention with a learned bias, or with ALiBi from positions: backward pass. Reference: ``ops/attention.py``.

Three kernels, each with one owner for every element that it writes: no atomics, and sums in an order that depends on
the shape only, so a run repeats itself bit for bit. Scores are recomputed from the saved log-sum-exp.

1. `_grad_queries_kernel`: a program has a block of queries, as in the forward pass. It also gives each row's sum of
   gradient times output, the gradient of a bias that is not shared, and its part of the gradient of the slopes.
2. `_grad_keys_kernel`: a program has a block of keys and passes over the queries; scores are transposed, so that
   weights and their gradients enter the next product from registers.
3. `_grad_bias_kernel`: a program has a tile of a shared bias and passes over the samples of a part of the batch, with
   the sum in registers. It computes two of the five products again instead of writing and reading `[B, H, T, T]`.
Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    LOG2_E,
    aligned,
    bias_strides_of,
    biased,
    flags_of,
    grid_of,
    kept_weights,
    keys_of,
    like_tokens,
    load_bias,
    load_rows,
    numbers_of,
    optional,
    program,
    rows_together,
    store_rows,
    tile_of,
)
from .sizes import cdiv

# programs of the gradient of a shared bias, which decide into how many parts the batch is divided
BIAS_PROGRAMS = 1024


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "threshold", "keep_scale", "scale"])
def _grad_queries_kernel(
    grad,  # [B, H, T, D]
    q,
    k,
    v,
    bias,
    positions,
    lengths,
    seed,
    out,
    lse,
    delta,  # [B, H, T] fp32: sum over D of gradient times output
    grad_q,  # [B, H, T, D]
    grad_bias,  # [B, H, T, T] with STORES_BIAS; with slopes [B, H, blocks] fp32
    scale,
    keep_scale,
    threshold,
    num_heads,
    num_tokens,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    bias_strides,
    D: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    STORES_BIAS: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample_head, sample, head, first, num_keys = program(lengths, num_heads, num_tokens, HAS_LENGTHS, BLOCK)
    rows = first + tl.arange(0, BLOCK)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(bias + head)
    grad += sample * grad_strides[0] + head * grad_strides[1]
    q += sample * q_strides[0] + head * q_strides[1]
    k += sample * k_strides[0] + head * k_strides[1]
    v += sample * v_strides[0] + head * v_strides[1]
    bias += (sample * bias_strides[0] + head * bias_strides[1]) * BIAS_ALIGN
    positions += sample * num_tokens
    dims = tl.arange(0, BLOCK_D)
    b_q = load_rows(q, rows, dims, q_strides[2], num_tokens, D)
    b_grad = load_rows(grad, rows, dims, grad_strides[2], num_tokens, D)
    b_o = load_rows(out + sample * out_strides[0] + head * out_strides[1], rows, dims, out_strides[2], num_tokens, D)
    b_delta = tl.sum(b_o.to(tl.float32) * b_grad.to(tl.float32), 1)
    of_row = sample_head.to(tl.int64) * num_tokens + rows
    tl.store(delta + of_row, b_delta, mask=rows < num_tokens)
    b_lse = tl.load(lse + of_row, mask=rows < num_tokens, other=0.0) * LOG2_E
    b_gq = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    b_slope = tl.zeros((BLOCK,), tl.float32)
    # a bias that is stored needs all of its columns
    last = num_tokens if STORES_BIAS else num_keys
    for start in range(0, last, STEP):
        cols = start + tl.arange(0, STEP)
        b_k = load_rows(k, cols, dims, k_strides[2], num_tokens, D)
        b_v = load_rows(v, cols, dims, v_strides[2], num_tokens, D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
        b_s, b_distance = biased(
            b_s, bias, positions, slope, rows[:, None], cols[None, :], num_tokens, num_keys, bias_strides[2],
            HAS_SLOPES, HAS_POSITIONS, BIAS_ALIGN,
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_gp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
        if HAS_DROPOUT:
            kept = kept_weights(seed, sample_head, rows[:, None], cols[None, :], threshold)
            b_gp = tl.where(kept, b_gp * keep_scale, 0.0)
        b_gs = b_p * (b_gp - b_delta[:, None])
        b_gq = tl.dot(b_gs.to(b_k.dtype), b_k, b_gq, input_precision=PRECISION)
        if HAS_SLOPES:
            b_slope -= tl.sum(b_gs * b_distance, 1)
        if STORES_BIAS:
            inside = (rows < num_tokens)[:, None] & (cols < num_tokens)[None, :]
            place = grad_bias + of_row[:, None] * num_tokens + cols[None, :]
            tl.store(place, b_gs.to(grad_bias.dtype.element_ty), mask=inside)
    grad_q += sample * out_strides[0] + head * out_strides[1]
    store_rows(grad_q, b_gq * scale, rows, dims, out_strides[2], num_tokens, D)
    if HAS_SLOPES:
        tl.store(grad_bias + tl.program_id(0), tl.sum(tl.where(rows < num_tokens, b_slope, 0.0), 0))


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "threshold", "keep_scale", "scale"])
def _grad_keys_kernel(
    grad,  # [B, H, T, D]
    q,
    k,
    v,
    bias,
    positions,
    lengths,
    seed,
    lse,
    delta,
    grad_k,  # [B, H, T, D]
    grad_v,
    scale,
    keep_scale,
    threshold,
    num_heads,
    num_tokens,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    bias_strides,
    D: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample_head, sample, head, first, num_keys = program(lengths, num_heads, num_tokens, HAS_LENGTHS, BLOCK)
    cols = first + tl.arange(0, BLOCK)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(bias + head)
    grad += sample * grad_strides[0] + head * grad_strides[1]
    q += sample * q_strides[0] + head * q_strides[1]
    k += sample * k_strides[0] + head * k_strides[1]
    v += sample * v_strides[0] + head * v_strides[1]
    bias += (sample * bias_strides[0] + head * bias_strides[1]) * BIAS_ALIGN
    positions += sample * num_tokens
    lse += sample_head.to(tl.int64) * num_tokens
    delta += sample_head.to(tl.int64) * num_tokens
    dims = tl.arange(0, BLOCK_D)
    b_k = load_rows(k, cols, dims, k_strides[2], num_tokens, D)
    b_v = load_rows(v, cols, dims, v_strides[2], num_tokens, D)
    b_gk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    b_gv = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    # a block of padding alone has no gradient
    last = tl.where(first < num_keys, num_tokens, 0)
    for start in range(0, last, STEP):
        rows = start + tl.arange(0, STEP)
        b_q = load_rows(q, rows, dims, q_strides[2], num_tokens, D)
        b_grad = load_rows(grad, rows, dims, grad_strides[2], num_tokens, D)
        b_lse = tl.load(lse + rows, mask=rows < num_tokens, other=0.0) * LOG2_E
        b_delta = tl.load(delta + rows, mask=rows < num_tokens, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2_E)
        b_s, _ = biased(
            b_s, bias, positions, slope, rows[None, :], cols[:, None], num_tokens, num_keys, bias_strides[2],
            HAS_SLOPES, HAS_POSITIONS, BIAS_ALIGN,
        )  # fmt: skip
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_gp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
        b_dropped = b_p
        if HAS_DROPOUT:
            kept = kept_weights(seed, sample_head, rows[None, :], cols[:, None], threshold)
            b_dropped = tl.where(kept, b_p * keep_scale, 0.0)
            b_gp = tl.where(kept, b_gp * keep_scale, 0.0)
        b_gv = tl.dot(b_dropped.to(b_grad.dtype), b_grad, b_gv, input_precision=PRECISION)
        b_gs = b_p * (b_gp - b_delta[None, :])
        b_gk = tl.dot(b_gs.to(b_q.dtype), b_q, b_gk, input_precision=PRECISION)
    place = sample * out_strides[0] + head * out_strides[1]
    store_rows(grad_k + place, b_gk * scale, cols, dims, out_strides[2], num_tokens, D)
    store_rows(grad_v + place, b_gv, cols, dims, out_strides[2], num_tokens, D)


@triton.jit(
    do_not_specialize=["num_samples", "per_part", "num_heads", "num_tokens", "threshold", "keep_scale", "scale"]
)
def _grad_bias_kernel(
    grad,  # [B, H, T, D]
    q,
    k,
    v,
    bias,  # [1, H, T, T]
    lengths,
    seed,
    lse,
    delta,
    partial,  # [parts, H, T, row_stride] fp32: sums over the samples of a part
    scale,
    keep_scale,
    threshold,
    num_samples,
    per_part,
    num_heads,
    num_tokens,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    partial_row8,
    D: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    num_row_blocks, num_col_blocks = tl.cdiv(num_tokens, BLOCK), tl.cdiv(num_tokens, STEP)
    tile = tl.program_id(0) % (num_row_blocks * num_col_blocks)
    rows = (tile // num_col_blocks) * BLOCK + tl.arange(0, BLOCK)
    cols = (tile % num_col_blocks) * STEP + tl.arange(0, STEP)
    head_part = tl.program_id(0) // (num_row_blocks * num_col_blocks)
    head = (head_part % num_heads).to(tl.int64)
    part = head_part // num_heads
    grad += head * grad_strides[1]
    q += head * q_strides[1]
    k += head * k_strides[1]
    v += head * v_strides[1]
    dims = tl.arange(0, CHUNK)
    bias += head * bias_strides[1] * BIAS_ALIGN
    b_bias = load_bias(bias, rows[:, None], cols[None, :], num_tokens, bias_strides[2], BIAS_ALIGN)
    b_sum = tl.zeros((BLOCK, STEP), tl.float32)
    first = (part * per_part).to(tl.int64)
    for number in range(tl.minimum(per_part, num_samples - part * per_part)):
        sample = first + number
        num_keys = keys_of(lengths, sample, num_tokens, HAS_LENGTHS)
        b_s = tl.zeros((BLOCK, STEP), tl.float32)
        b_gp = tl.zeros((BLOCK, STEP), tl.float32)
        for start in range(0, BLOCK_D, CHUNK):
            b_q = load_rows(q + sample * q_strides[0], rows, start + dims, q_strides[2], num_tokens, D)
            b_k = load_rows(k + sample * k_strides[0], cols, start + dims, k_strides[2], num_tokens, D)
            b_v = load_rows(v + sample * v_strides[0], cols, start + dims, v_strides[2], num_tokens, D)
            b_grad = load_rows(grad + sample * grad_strides[0], rows, start + dims, grad_strides[2], num_tokens, D)
            b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
            b_gp = tl.dot(b_grad, tl.trans(b_v), b_gp, input_precision=PRECISION)
        of_row = (sample * num_heads + head) * num_tokens + rows
        b_lse = tl.load(lse + of_row, mask=rows < num_tokens, other=0.0) * LOG2_E
        b_delta = tl.load(delta + of_row, mask=rows < num_tokens, other=0.0)
        b_s = b_s * (scale * LOG2_E) + b_bias
        b_s = tl.where((cols < num_keys)[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        if HAS_DROPOUT:
            kept = kept_weights(seed, sample * num_heads + head, rows[:, None], cols[None, :], threshold)
            b_gp = tl.where(kept, b_gp * keep_scale, 0.0)
        b_sum += b_p * (b_gp - b_delta[:, None])
    place = (head_part.to(tl.int64) * num_tokens + rows)[:, None] * (partial_row8 * 8) + cols[None, :]
    # whole groups of 8, so that stores are wide
    tl.store(partial + place, b_sum, mask=(rows < num_tokens)[:, None] & (cols < partial_row8 * 8)[None, :])


def bias_tile_of(q: Tensor) -> dict[str, int]:
    """Return the tile of the gradient of a shared bias; in fp32 its products take a part of the width at a time."""
    tile = tile_of(q)
    if q.dtype != torch.float32:
        return {**tile, "CHUNK": tile["BLOCK_D"]}
    return {**tile, "BLOCK": 32, "CHUNK": min(32, tile["BLOCK_D"])}


def attention_with_bias_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    positions: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass; return the gradients of `q`, `k`, `v` and `bias`, the last empty if not needed."""
    grad_q, grad_k, grad_v = (like_tokens(q) for _ in range(3))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v, torch.zeros_like(bias) if needs_bias else bias.new_empty(0)
    grad, q, k, v, out = (rows_together(x) for x in (grad, q, k, v, out))
    num_samples, num_heads, num_tokens, _ = q.shape
    shape, dtype = bias.shape, bias.dtype
    bias, align = aligned(bias)
    has_slopes = bias.dim() == 1
    is_shared = not has_slopes and shape[0] == 1 < num_samples
    stores_bias = needs_bias and not has_slopes and not is_shared
    tile = tile_of(q)
    grid = grid_of(q, tile)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    grad_bias = bias.new_empty(shape if stores_bias else 0, dtype=dtype)
    if has_slopes:
        grad_bias = lse.new_empty(num_samples, num_heads, grid[0] // (num_samples * num_heads))
    tensors, numbers = optional(q, positions, lengths, seed), numbers_of(q, dropout)
    strides = [x.stride()[:3] for x in (grad, q, k, v)]
    flags = flags_of(q, bias, positions, lengths, seed) | {"BIAS_ALIGN": align}
    ends = grad_q.stride()[:3], bias_strides_of(bias, align)
    if out.stride() != grad_q.stride():
        out = like_tokens(out).copy_(out)
    _grad_queries_kernel[grid](
        grad, q, k, v, bias, *tensors, out, lse, delta, grad_q, grad_bias, *numbers, *strides, *ends,
        **flags, STORES_BIAS=stores_bias, **tile,
    )  # fmt: skip
    key_tile = tile_of(q, keeps_keys=True)
    _grad_keys_kernel[grid_of(q, key_tile)](
        grad, q, k, v, bias, *tensors, lse, delta, grad_k, grad_v, *numbers, *strides, *ends, **flags, **key_tile
    )  # fmt: skip
    if has_slopes:
        return grad_q, grad_k, grad_v, grad_bias.sum((0, 2)) if needs_bias else grad_bias.new_empty(0)
    if not (needs_bias and is_shared):
        return grad_q, grad_k, grad_v, grad_bias
    tile = bias_tile_of(q)
    tiles = cdiv(num_tokens, tile["BLOCK"]) * cdiv(num_tokens, tile["STEP"])
    per_part = cdiv(num_samples, max(BIAS_PROGRAMS // (tiles * num_heads), 1))
    parts = cdiv(num_samples, per_part)
    width = cdiv(num_tokens, 8)
    partial = lse.new_empty(parts, num_heads, num_tokens, width * 8)
    del flags["HAS_SLOPES"], flags["HAS_POSITIONS"]
    _grad_bias_kernel[(tiles * num_heads * parts,)](
        grad, q, k, v, bias, *tensors[1:], lse, delta, partial, *numbers[:-2], num_samples, per_part,
        *numbers[-2:], *strides, bias_strides_of(bias, align), width, **flags, **tile,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, partial.sum(0)[None, ..., :num_tokens].to(dtype).contiguous()
