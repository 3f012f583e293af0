"""Attention with a learned bias, or with ALiBi from positions: forward pass. Reference: ``ops/attention.py``.

A program has a block of queries of one head and passes over the keys with an online softmax, in base 2. The bias of a
tile comes from memory, which all samples share and the second-level cache holds, or from the tokens' positions, so that
ALiBi needs no `[B, H, T, T]`. The last step of 64 keys can be nearly empty, as with 197 tokens: steps of 32 then.
Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _mix(x):
    """Return the finalizer of MurmurHash3, uint32; see ``ops/attention.py``."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def kept_weights(seed, sample_head, rows, cols, threshold):
    """Return which weights dropout keeps, for `rows` and `cols` that broadcast to a tile."""
    seed = tl.load(seed)
    key = _mix(_mix(seed.to(tl.uint32) + sample_head.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    bits = _mix(_mix(key + rows.to(tl.uint32)) ^ _mix((key ^ 0x9E3779B9) + cols.to(tl.uint32)))
    return (bits >> 1).to(tl.int32) >= threshold


@triton.jit
def load_bias(bias, rows, cols, num_tokens, row_stride, BIAS_ALIGN: tl.constexpr):
    """Load a tile of the bias in base 2. Columns from T to the next multiple of BIAS_ALIGN are read, to be wide, but
    undefined."""
    inside = (rows < num_tokens) & (cols < tl.cdiv(num_tokens, BIAS_ALIGN) * BIAS_ALIGN)
    return tl.load(bias + rows * (row_stride * BIAS_ALIGN) + cols, mask=inside, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def biased(
    b_s,
    bias,
    positions,
    slope,
    rows,
    cols,
    num_tokens,
    num_keys,
    row_stride,
    HAS_SLOPES: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
):
    """Add bias or ALiBi to scores in base 2, -inf at padding; return the scores and the tokens' distances."""
    b_distance = b_s
    if HAS_SLOPES:
        if HAS_POSITIONS:
            b_row = tl.load(positions + rows, mask=rows < num_tokens, other=0)
            b_col = tl.load(positions + cols, mask=cols < num_tokens, other=0)
            b_distance = tl.abs(b_row - b_col).to(tl.float32)
        else:
            b_distance = tl.abs(rows - cols).to(tl.float32)
        b_s -= b_distance * (slope * LOG2_E)
    else:
        b_s += load_bias(bias, rows, cols, num_tokens, row_stride, BIAS_ALIGN)
    return tl.where(cols < num_keys, b_s, float("-inf")), b_distance


@triton.jit
def keys_of(lengths, sample, num_tokens, HAS_LENGTHS: tl.constexpr):
    """Return the keys of a sample, at most T: past its tokens there would be keys of zeros."""
    num_keys = num_tokens
    if HAS_LENGTHS:
        num_keys = tl.minimum(tl.load(lengths + sample), num_tokens).to(tl.int32)
    return num_keys


@triton.jit
def program(lengths, num_heads, num_tokens, HAS_LENGTHS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sample's head, the sample and the head of this program, its first token, and the sample's keys."""
    num_blocks = tl.cdiv(num_tokens, BLOCK)
    sample_head = tl.program_id(0) // num_blocks
    # int64: a tensor may have more than 2^31 elements
    sample = (sample_head // num_heads).to(tl.int64)
    head = (sample_head % num_heads).to(tl.int64)
    num_keys = keys_of(lengths, sample, num_tokens, HAS_LENGTHS)
    return sample_head, sample, head, (tl.program_id(0) % num_blocks) * BLOCK, num_keys


@triton.jit
def load_rows(x, rows, cols, stride, num_tokens, D: tl.constexpr):
    """Load rows `[M, BLOCK_D]` of a sample's head, zero outside."""
    inside = (rows < num_tokens)[:, None] & (cols < D)[None, :]
    return tl.load(x + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(x, value, rows, cols, stride, num_tokens, D: tl.constexpr):
    inside = (rows < num_tokens)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "threshold", "keep_scale", "scale"])
def _forward_kernel(
    q,  # [B, H, T, D]
    k,
    v,
    bias,  # [1 or B, H, T, T], or the slopes [H] fp32
    positions,  # [B, T] int32
    lengths,  # [B]
    seed,  # [1] int64
    out,  # [B, H, T, D]
    lse,  # [B, H, T] fp32, natural logarithm
    scale,
    keep_scale,
    threshold,
    num_heads,
    num_tokens,
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
    rows = first + tl.arange(0, BLOCK)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(bias + head)
    q += sample * q_strides[0] + head * q_strides[1]
    k += sample * k_strides[0] + head * k_strides[1]
    v += sample * v_strides[0] + head * v_strides[1]
    bias += (sample * bias_strides[0] + head * bias_strides[1]) * BIAS_ALIGN
    positions += sample * num_tokens
    dims = tl.arange(0, BLOCK_D)
    b_q = load_rows(q, rows, dims, q_strides[2], num_tokens, D)
    b_out = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    # finite, so that a row without keys has no -inf - -inf
    b_peak = tl.full((BLOCK,), -1e30, tl.float32)
    b_total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_keys, STEP):
        cols = start + tl.arange(0, STEP)
        b_k = load_rows(k, cols, dims, k_strides[2], num_tokens, D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
        b_s, _ = biased(
            b_s, bias, positions, slope, rows[:, None], cols[None, :], num_tokens, num_keys, bias_strides[2],
            HAS_SLOPES, HAS_POSITIONS, BIAS_ALIGN,
        )  # fmt: skip
        b_new = tl.maximum(b_peak, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_shrink = tl.exp2(b_peak - b_new)
        b_total = b_total * b_shrink + tl.sum(b_p, 1)
        b_peak = b_new
        if HAS_DROPOUT:
            b_p = tl.where(kept_weights(seed, sample_head, rows[:, None], cols[None, :], threshold), b_p, 0.0)
        b_v = load_rows(v, cols, dims, v_strides[2], num_tokens, D)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)
    b_total = tl.where(b_total == 0.0, 1.0, b_total)
    b_out = b_out * (keep_scale / b_total)[:, None]
    store_rows(out + sample * out_strides[0] + head * out_strides[1], b_out, rows, dims, out_strides[2], num_tokens, D)
    b_lse = (b_peak + tl.log2(b_total)) / LOG2_E
    tl.store(lse + sample_head.to(tl.int64) * num_tokens + rows, b_lse, mask=rows < num_tokens)


def attention_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass without host synchronization; return output and log-sum-exp."""
    out = like_tokens(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    q, k, v = (rows_together(x) for x in (q, k, v))
    bias, align = aligned(bias)
    tile = tile_of(q)
    _forward_kernel[grid_of(q, tile)](
        q,
        k,
        v,
        bias,
        *optional(q, positions, lengths, seed),
        out,
        lse,
        *numbers_of(q, dropout),
        *(x.stride()[:3] for x in (q, k, v, out)),
        bias_strides_of(bias, align),
        **flags_of(q, bias, positions, lengths, seed),
        BIAS_ALIGN=align,
        **tile,
    )
    return out, lse


def like_tokens(x: Tensor) -> Tensor:
    """Return new memory `[B, H, T, D]` in the order `[B, T, H, D]`, which the output projection reads as rows."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def rows_together(x: Tensor) -> Tensor:
    """Return `x` if the last dimension is contiguous, otherwise a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(bias: Tensor) -> tuple[Tensor, int]:
    """Return a bias with contiguous rows that start at multiples of the second result, in elements, and have memory
    until the next multiple."""
    if bias.dim() == 1:
        return bias.contiguous(), 1
    bias = rows_together(bias)
    strides = bias.stride()[:3]
    end = sum((size - 1) * stride for size, stride in zip(bias.shape, strides, strict=False)) + bias.shape[3]
    room = bias.untyped_storage().nbytes() // bias.element_size() - bias.storage_offset() - end
    is_aligned = all(stride % 8 == 0 for stride in strides) and bias.data_ptr() % 16 == 0
    return bias, 8 if is_aligned and room >= -end % 8 else 1


def tile_of(q: Tensor, keeps_keys: bool = False) -> dict[str, int]:
    """Return block, step, width of a head, warps and stages of a kernel, so that none spills up to a width of 128.

    `keeps_keys` is for the kernel with a block of keys, which has two results. In fp32 a block is small, since each of
    its operands is in registers as two tf32 numbers."""
    num_tokens, width = q.shape[2:]
    block_d = max(next_power_of_2(width), 16)
    block, step = 64, 32
    if q.dtype == torch.float32:
        block, step = 16, 16
    elif num_tokens > 64 and block_d <= 64 and not keeps_keys:
        block = 128
    num_warps = 8 if block == 128 or block_d > 64 else 4
    if q.dtype == torch.float32 and not keeps_keys:
        num_warps = 4
    return {"BLOCK": block, "STEP": step, "BLOCK_D": block_d, "num_warps": num_warps, "num_stages": 2}


def grid_of(q: Tensor, tile: dict[str, int]) -> tuple[int]:
    return (cdiv(q.shape[2], tile["BLOCK"]) * q.shape[0] * q.shape[1],)


def optional(q: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Replace None by a tensor that the kernel does not read."""
    return [q if x is None else x.contiguous() for x in tensors]


def numbers_of(q: Tensor, dropout: float) -> tuple[float, float, int, int, int]:
    """Return the factors of scores and of kept weights, the threshold of dropout, H and T."""
    return q.shape[-1] ** -0.5, 1.0 / (1.0 - dropout), int(dropout * 2**31), q.shape[1], q.shape[2]


def bias_strides_of(bias: Tensor, align: int) -> tuple[int, int, int]:
    if bias.dim() == 1:
        return 0, 0, 0
    batch, head, row, _ = bias.stride()
    return batch // align if bias.shape[0] > 1 else 0, head // align, row // align


def flags_of(
    q: Tensor, bias: Tensor, positions: Tensor | None, lengths: Tensor | None, seed: Tensor | None
) -> dict[str, object]:
    return {
        "D": q.shape[-1],
        "HAS_SLOPES": bias.dim() == 1,
        "HAS_POSITIONS": positions is not None,
        "HAS_LENGTHS": lengths is not None,
        "HAS_DROPOUT": seed is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
