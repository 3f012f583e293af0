"""Attention with ALiBi on a CPU, a few heads of a sample at a time, so that the weights stay in the cache.

Shape letters: B batch, H heads, T tokens, L keys of a sample before its padding, D width of a head, n heads of a part.

Neither the bias nor the weights of all heads are ever in memory. The backward pass recomputes the weights of each part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# logits of a part: 4 MiB in fp32
_PART = 2**20


class Options(NamedTuple):
    """What the heads share.

    Attributes:
        positions: integers `[B, T]`. None means 0 to T - 1.
        lengths: integers `[B]`, tokens before the padding. None means T.
        dropout: probability of dropping a weight.
        seed: int64 `[1]`, decides what is dropped; None without dropout.
    """

    positions: Tensor | None
    lengths: Tensor | None
    dropout: float
    seed: Tensor | None


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, options: Options, differentiable: Callable[..., Any]
) -> Tensor:
    """Compute attention with the logits ``q @ k.mT / sqrt(D) - slopes * |distance|``.

    Args:
        q, k, v: `[B, H, T, D]`.
        slopes: `[H]`, fp32, or fp64 with ``q`` in fp64.
        options: See `Options`.
        differentiable: Computes the gradients of ``q``, ``k``, ``v`` and ``slopes`` without dropout, with a graph.

    Returns:
        `[B, H, T, D]` in the dtype of ``q``.
    """
    out: Tensor = _AttentionInParts.apply(q, k, v, slopes, options, differentiable)
    return out


class _AttentionInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, options: Options, differentiable: Callable[..., Any]
    ) -> Tensor:
        out = _results(q, options)
        for part in _parts(q, k, v, slopes, options):
            part.take(out).copy_(torch.bmm(part.drop_(part.weights()), part.v))
        ctx.options, ctx.differentiable = options._replace(positions=None, lengths=None, seed=None), differentiable
        ctx.save_for_backward(q, k, v, slopes, options.positions, options.lengths, options.seed)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, positions, lengths, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            if seed is not None:
                raise RuntimeError("the gradient of attention with dropout has no derivative on a CPU; give a `seed`.")
            return *ctx.differentiable(grad, (q, k, v, slopes), (positions, lengths, None, 0.0)), None, None
        options = ctx.options._replace(positions=positions, lengths=lengths, seed=seed)
        grads = [_results(x, options) for x in (q, k, v)]
        grad_slopes, scale = torch.zeros_like(slopes), q.shape[-1] ** -0.5
        for part in _parts(q, k, v, slopes, options):
            weights, upstream = part.weights(), part.take(grad).to(slopes.dtype)
            change = torch.bmm(upstream, part.v.mT)
            dropped = weights
            if seed is not None:
                dropped = part.drop_(torch.ones_like(weights))
                change.mul_(dropped)
                dropped.mul_(weights)
            part.take(grads[2], keys=True).copy_(torch.bmm(dropped.mT, upstream))
            # that of the logits, from that of the weights
            change = torch._softmax_backward_data(change, weights, -1, weights.dtype)
            part.take(grads[0]).copy_(torch.bmm(change, part.k).mul_(scale))
            part.take(grads[1], keys=True).copy_(torch.bmm(change.mT, part.q).mul_(scale))
            grad_slopes[part.heads] -= change.flatten(1) @ part.distances.flatten()
        return *grads, grad_slopes, None, None


class _Part:
    """Some heads of a sample.

    Attributes:
        heads: which ones.
        q: `[n, T, D]`, in the dtype of the slopes.
        k, v: `[n, L, D]`.
        distances: `[T, L]`.
    """

    def __init__(
        self,
        sample: int,
        heads: slice,
        tensors: tuple[Tensor, Tensor, Tensor],
        slopes: Tensor,
        distances: Tensor,
        options: Options,
    ) -> None:
        self._sample, self.heads, self.distances, self._options = sample, heads, distances, options
        self.q, self.k, self.v = (self.take(x, keys=i > 0).to(slopes.dtype) for i, x in enumerate(tensors))
        self._slopes = slopes[heads]

    def take(self, x: Tensor, *, keys: bool = False) -> Tensor:
        """Return the view of this part, of the queries or of the keys, of `[B, H, T, ...]`."""
        return x[self._sample, self.heads, : self.distances.shape[1] if keys else None]

    def weights(self) -> Tensor:
        """Return `[n, T, L]`."""
        bias = self.distances * -self._slopes[:, None, None]
        # torch's softmax is fused, and gives 0 where `exp` computes denormal numbers, at many times the cost
        return bias.baddbmm_(self.q, self.k.mT, alpha=self.q.shape[-1] ** -0.5).softmax(-1)

    def drop_(self, weights: Tensor) -> Tensor:
        """Drop weights in place, always the same ones."""
        prob, seed = self._options.dropout, self._options.seed
        if seed is None:
            return weights
        key = (int(seed) ^ (self._sample << 20 | self.heads.start)) % 2**63
        bits = torch.empty(math.ceil(weights.numel() / 4), dtype=torch.int64)
        bits.random_(-(2**63), None, generator=torch.Generator().manual_seed(key))
        kept = bits.view(torch.int16)[: weights.numel()].view_as(weights) >= int(prob * 2**16) - 2**15
        return weights.mul_(kept).mul_(2**16 / (2**16 - int(prob * 2**16)))


def _results(like: Tensor, options: Options) -> Tensor:
    """Return memory for results `[B, H, T, D]` in the order `[B, T, H, D]`; zeros if some tokens are padding."""
    make = torch.empty_like if options.lengths is None else torch.zeros_like
    return make(like.transpose(1, 2)).transpose(1, 2)


def _parts(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, options: Options) -> Iterator[_Part]:
    B, H, T, _ = q.shape
    number = min(H, max(1, _PART // T**2))
    lengths = [T] * B if options.lengths is None else options.lengths.tolist()
    apart = torch.arange(T) if options.positions is None else None
    for sample, length in enumerate(lengths):
        if length <= 0:
            continue
        places = options.positions[sample] if apart is None else apart  # type: ignore[index]
        distances = (places[:, None] - places[:length]).abs().to(slopes.dtype)
        for start in range(0, H, number):
            yield _Part(sample, slice(start, min(start + number, H)), (q, k, v), slopes, distances, options)
