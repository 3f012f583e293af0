"""Scaled dot-product attention with a learned bias on the logits, or with ALiBi from positions.

Shape letters: B batch, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops._library import CHECKED_DTYPES, check_tensor, define
from d2v_fast.ops.attention_parts import Options, attend_in_parts
from d2v_fast.ops.autograd import (
    below_autograd,
    differentiable_gradients,
    is_transformed,
    register_autograd,
    register_backward,
)

_WORD = 0xFFFFFFFF


def attention_with_bias_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, H, T, D]` and log-sum-exp of the logits `[B, H, T]`; `bias` of shape `[H]` are slopes of ALiBi."""
    logits = _logits(q, k, bias, positions, lengths)
    # finite, so that a sample without keys gives zeros
    peak = logits.amax(-1, keepdim=True).detach().clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    total = total + (total == 0)
    weights = weights / total
    if seed is not None:
        weights = weights * _kept(weights, seed, dropout)
    out = _in_token_order((weights @ v.to(weights.dtype)).to(q.dtype))
    return out, (peak + total.log()).squeeze(-1).detach()


def attention_with_bias_backward_reference(
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
    """Gradients of `q`, `k`, `v` and `bias`, each in its dtype, the last empty unless needed."""
    weights = (_logits(q, k, bias, positions, lengths) - lse[..., None]).exp()
    wide, scale = weights.dtype, q.shape[-1] ** -0.5
    grad, wide_q, wide_k, wide_v, out = (x.to(wide) for x in (grad, q, k, v, out))
    grad_weights = grad @ wide_v.mT
    dropped = weights
    if seed is not None:
        kept = _kept(weights, seed, dropout)
        dropped, grad_weights = weights * kept, grad_weights * kept
    grad_logits = weights * (grad_weights - (grad * out).sum(-1, keepdim=True))
    products = grad_logits @ wide_k * scale, grad_logits.mT @ wide_q * scale, dropped.mT @ grad
    grad_q, grad_k, grad_v = (_in_token_order(x.to(q.dtype)) for x in products)
    if not needs_bias:
        return grad_q, grad_k, grad_v, bias.new_empty(0)
    if bias.dim() == 1:
        grad_bias = -(grad_logits * _distances(q, positions)).sum((0, 2, 3))
    else:
        grad_bias = grad_logits.sum_to_size(bias.shape)
    return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype).contiguous()


def _logits(q: Tensor, k: Tensor, bias: Tensor, positions: Tensor | None, lengths: Tensor | None) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    if bias.dim() == 1:
        logits = logits - bias.to(wide)[:, None, None] * _distances(q, positions)
    else:
        logits = logits + bias
    if lengths is not None:
        is_padding = torch.arange(q.shape[2], device=q.device) >= lengths[:, None]
        logits = logits.masked_fill(is_padding[:, None, None, :], float("-inf"))
    return logits


def _distances(q: Tensor, positions: Tensor | None) -> Tensor:
    """Return the distance of each pair of tokens, `[B or 1, 1, T, T]`."""
    if positions is None:
        positions = torch.arange(q.shape[2], device=q.device)[None]
    return (positions[:, None, :, None] - positions[:, None, None, :]).abs()


def _in_token_order(x: Tensor) -> Tensor:
    """Return `x` `[B, H, T, D]` in memory of the order `[B, T, H, D]`, which the output projection reads as rows."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _kept(weights: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Return the factor of each weight `[B, H, T, T]`: 0, or 1 / (1 - dropout).

    A weight is dropped if a hash of (seed, sample, head, query, key) is below the rate. Philox, as in PyTorch, takes
    several times as many instructions, in each of four kernels. Rows and columns have hashed keys, so that each weight
    costs one more finalizer of MurmurHash3.
    """
    B, H, T, _ = weights.shape
    of_head = torch.arange(B * H, device=weights.device).view(B, H, 1, 1)
    key = _mix(_mix((seed + of_head) & _WORD) + (seed >> 32 & _WORD) & _WORD)
    token = torch.arange(T, device=weights.device)
    rows, cols = _mix(key + token[:, None] & _WORD), _mix((key ^ 0x9E3779B9) + token & _WORD)
    is_kept = _mix(rows ^ cols) >> 1 >= int(dropout * 2**31)
    return is_kept.to(weights.dtype) / (1.0 - dropout)


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of MurmurHash3 to 32-bit words in int64."""
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return x ^ x >> 16


_OPTIONS = "Tensor? positions, Tensor? lengths, Tensor? seed, float dropout"
define(
    f"attention_with_bias(Tensor q, Tensor k, Tensor v, Tensor bias, {_OPTIONS}) -> (Tensor, Tensor)",
    attention_with_bias_reference,
    "attention.attention_with_bias",
)
define(
    "attention_with_bias_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    attention_with_bias_backward_reference,
    "attention_backward.attention_with_bias_backward",
)


def _empty_in_token_order(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@torch.library.register_fake("d2v::attention_with_bias")
def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _empty_in_token_order(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("d2v::attention_with_bias_backward")
def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_empty_in_token_order(q) for _ in range(3))
    return grad_q, grad_k, grad_v, bias.new_empty(bias.shape if options[-1] else 0)


class _AttentionWithBias(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operation: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, bias: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, lse = operation(q, k, v, bias, *others)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        *tensors, ctx.dropout = others
        ctx.save_for_backward(q, k, v, bias, out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _lse: Tensor) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_differentiable_backward(grad, inputs[:4], (*inputs[6:], ctx.dropout)), None
        needs_bias = ctx.needs_input_grad[4]
        with below_autograd():
            *grads, grad_bias = _BACKWARD(grad, *inputs, ctx.dropout, needs_bias)
        return None, *grads, grad_bias if needs_bias else None, None


def _differentiable_backward(
    grad: Tensor, inputs: tuple[Tensor, ...], others: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """Compute differentiable gradients with PyTorch's own operations."""
    return differentiable_gradients(lambda *leaves: attention_with_bias_reference(*leaves, *others)[0], inputs, grad)


_BACKWARD = torch.ops.d2v.attention_with_bias_backward.default
_run = register_autograd("attention_with_bias", 4, _AttentionWithBias.apply, attention_with_bias_reference)
register_backward(
    "attention_with_bias_backward",
    7,
    "`attention_with_bias_backward` has no derivative; `attention_with_bias` has derivatives of any order.",
)


def attention_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute attention with an additive bias on the logits, such as one of relative positions, which gets a gradient.

    ``softmax(q @ k.mT / sqrt(D) + bias) @ v`` within each sample (arXiv 1706.03762, equation 1). On a GPU, Triton
    kernels recompute the weights in the backward pass, and sum the gradient of a bias that samples share in a fixed
    order, so that a run repeats itself bit for bit. Without ``lengths`` and dropout, PyTorch's own operations run on
    other devices, and where the bias needs no gradient.

    Args:
        q: Queries `[B, H, T, D]`, fp32, bf16, fp16 or fp64, in which PyTorch's operations run, with T and D >= 1.
        k: Keys, like ``q``, on the same device as all tensors.
        v: Values, like ``q``.
        bias: `[1, H, T, T]`, or `[B, H, T, T]`, fp32 or in the dtype of ``q``. Rows that start at multiples of 8
            elements are read faster.
        lengths: Integers `[B]`, tokens of each sample before its padding: later keys have weight 0. None means T. A
            sample of length 0 gives zeros.
        dropout: Probability of dropping an attention weight, in [0, 1).
        seed: int64 `[1]` on the device of ``q``, decides what is dropped: the same seed drops the same weights on every
            device. None draws one from PyTorch's generator, if ``dropout`` is above 0.

    Returns:
        `[B, H, T, D]` in the dtype of ``q``.

    Backward:
        Gradients to all four, each in its dtype. A gradient computed with ``create_graph``, forward mode and the
        transforms of ``torch.func`` run a slower composition of PyTorch operations, with derivatives of any order.

    Raises:
        ValueError, TypeError: An argument is not as described above.

    Examples:
        >>> x = torch.eye(2)[None, None]
        >>> attention_with_bias(x, x, x, torch.zeros(1, 1, 2, 2))[0, 0]
        tensor([[0.6698, 0.3302],
                [0.3302, 0.6698]])
    """
    _check_tokens(q, k, v, lengths, dropout, seed)
    check_tensor("bias", bias)
    B, H, T, _ = q.shape
    if bias.shape not in ((1, H, T, T), (B, H, T, T)):
        raise ValueError(
            f"`bias` must have shape [1, {H}, {T}, {T}] or [{B}, {H}, {T}, {T}], but has {list(bias.shape)} instead."
        )
    if bias.dtype not in (torch.float32, q.dtype):
        raise ValueError(f"`bias` must be fp32 or {q.dtype} as `q` is, but is {bias.dtype} instead.")
    _check_device(q, bias=bias)
    is_plain = _is_plain(q, k, v, bias, lengths, dropout)
    if is_plain and not (bias.requires_grad and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.detach().to(q.dtype))
    if is_plain and not has_kernels(q):
        # faster than the recomputation; in place: the product's backward pass does not read it
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).add_(bias)
        return torch.matmul(logits.softmax(dim=-1), v)
    out: Tensor = _run(q, k, v, bias, None, lengths, _seed(q, dropout, seed), float(dropout))[0]
    return out


def attention_with_alibi(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    scale: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute attention with the bias of ALiBi (arXiv 2108.12409), with a learned scale as in data2vec 2.0.

    The bias of query i and key j in head h is ``-scale[h] * slopes[h] * |positions[i] - positions[j]|``. On a GPU, the
    kernels compute it from the positions, without a tensor `[B, H, T, T]`, and sum the gradient of the scale in a fixed
    order. On a CPU, a few heads of a sample are computed at a time, without such a tensor either.

    Args:
        q: See ``attention_with_bias``.
        k: See ``attention_with_bias``.
        v: See ``attention_with_bias``.
        slopes: `[H]`, fp32 or in the dtype of ``q``.
        scale: Like ``slopes``; None means 1.
        positions: Integers `[B, T]` within 2^24 of each other, for places that are part of a longer sequence, as the
            visible ones of a masked sample. None means 0 to T - 1.
        lengths: See ``attention_with_bias``.
        dropout: See ``attention_with_bias``.
        seed: See ``attention_with_bias``.

    Returns:
        `[B, H, T, D]` in the dtype of ``q``.

    Backward:
        Gradients to ``q``, ``k``, ``v``, ``slopes`` and ``scale``.

    Raises:
        ValueError, TypeError: An argument is not as described above.

    Examples:
        >>> x = torch.eye(2)[None, None]
        >>> attention_with_alibi(x, x, x, torch.tensor([1.0]))[0, 0]
        tensor([[0.8465, 0.1535],
                [0.1535, 0.8465]])
    """
    _check_tokens(q, k, v, lengths, dropout, seed)
    check_tensor("slopes", slopes)
    _check_device(q, slopes=slopes, scale=scale, positions=positions)
    B, H, T, _ = q.shape
    for name, value in (("slopes", slopes), ("scale", scale)):
        if value is None:
            continue
        if value.shape != (H,):
            raise ValueError(f"`{name}` must have shape [{H}], one for each head, but has {list(value.shape)} instead.")
        if value.dtype not in (torch.float32, q.dtype):
            raise ValueError(f"`{name}` must be fp32 or {q.dtype} as `q` is, but is {value.dtype} instead.")
    if positions is not None and (positions.shape != (B, T) or positions.is_floating_point()):
        raise ValueError(
            f"`positions` must be integers of shape [{B}, {T}], "
            f"but is {positions.dtype} of shape {list(positions.shape)} instead."
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = slopes.to(wide) if scale is None else slopes.to(wide) * scale.to(wide)
    traced = torch.compiler.is_compiling() or is_transformed(q, k, v, scaled)
    if q.device.type == "cpu" and (seed is None or dropout == 0.0) and not traced:
        options = Options(positions, lengths, float(dropout), _seed(q, dropout, None))
        return attend_in_parts(q, k, v, scaled, options, _differentiable_backward)
    if _is_plain(q, k, v, scaled, lengths, dropout) and q.device.type not in ("cuda", "meta"):
        return attention_with_bias(q, k, v, -scaled[:, None, None] * _distances(q, positions))
    positions = None if positions is None else positions.to(torch.int32)
    out: Tensor = _run(q, k, v, scaled, positions, lengths, _seed(q, dropout, seed), float(dropout))[0]
    return out


_WITH_KERNELS = {"cuda"}


def has_kernels(x: Tensor) -> bool:
    """Return whether attention with a gradient of the bias has kernels for the device of a tensor."""
    return x.device.type in _WITH_KERNELS


@contextmanager
def kernels_on_meta(device_type: str) -> Iterator[None]:
    """Let attention on `meta` take the path of another device, to count what that keeps in memory.

    Args:
        device_type: "cpu" or "cuda".
    """
    if device_type in _WITH_KERNELS:
        _WITH_KERNELS.add("meta")
    try:
        yield
    finally:
        _WITH_KERNELS.discard("meta")


def _is_plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, lengths: Tensor | None, dropout: float) -> bool:
    """Return whether PyTorch's attention can replace the operation, which alone has every derivative."""
    plain = lengths is None and dropout == 0.0
    return plain and (torch.compiler.is_compiling() or not is_transformed(q, k, v, bias))


def _seed(q: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    if dropout == 0.0 or seed is not None:
        return seed if dropout > 0.0 else None
    # on the device, so that a CUDA graph draws a new one at every replay
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def _check_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, value)
    if q.dim() != 4 or 0 in q.shape[1:]:
        raise ValueError(f"`q` must have shape [B, H, T, D] with H, T, D >= 1, but has {list(q.shape)} instead.")
    if q.dtype not in CHECKED_DTYPES:
        raise ValueError(f"`q` must be fp32, bf16, fp16 or fp64, but is {q.dtype} instead.")
    for name, value in (("k", k), ("v", v)):
        if value.shape != q.shape or value.dtype != q.dtype:
            raise ValueError(
                f"`{name}` must be {q.dtype} of shape {list(q.shape)} as `q` is, "
                f"but is {value.dtype} of shape {list(value.shape)} instead."
            )
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.is_floating_point()):
        raise ValueError(
            f"`lengths` must be integers of shape [{len(q)}], one for each sample, "
            f"but is {lengths.dtype} of shape {list(lengths.shape)} instead."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"`dropout` must be in [0, 1), but is {dropout} instead.")
    if seed is not None and (seed.shape != (1,) or seed.dtype != torch.int64):
        raise ValueError(f"`seed` must be int64 of shape [1], but is {seed.dtype} of shape {list(seed.shape)} instead.")
    _check_device(q, k=k, v=v, lengths=lengths, seed=seed)


def _check_device(q: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != q.device:
            raise ValueError(f"`{name}` must be on {q.device} as `q` is, but is on {value.device} instead.")
