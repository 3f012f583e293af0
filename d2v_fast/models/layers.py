"""Layers and initializations shared by several networks."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops.attention import has_kernels
from d2v_fast.ops.autograd import is_transformed

INIT_STD = 0.02

# oneDNN's matrix product, which Inductor uses as well; `F.linear` calls MKL
_ONEDNN_LINEAR: Callable[..., Tensor] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    else None
)
# below this number of weights, oneDNN's set-up costs more than it gains
_LARGE = 2**18


@torch.no_grad()
def truncated_normal_(tensor: Tensor) -> Tensor:
    """Fill from a normal distribution of deviation 0.02, truncated at one deviation."""
    # by the inverse distribution function: `nn.init.trunc_normal_` rejects samples, at 40 times the cost
    inside = math.erf(math.sqrt(0.5))
    return tensor.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2) * INIT_STD)


def init_linear_(linear: nn.Linear) -> None:
    """Initialize with a truncated normal weight (`truncated_normal_`) and zero bias."""
    truncated_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def dropout(x: Tensor, prob: float, training: bool) -> Tensor:
    """Apply `F.dropout`, or `drop` on a CPU."""
    if not training or prob == 0.0:
        return x
    return drop(x, prob) if x.device.type == "cpu" else F.dropout(x, prob)


def drop(x: Tensor, prob: float) -> Tensor:
    """Apply dropout to a CPU tensor from 16 random bits per element, several times faster than `F.dropout`.

    Args:
        x: any shape.
        prob: in [0, 1), rounded down to a multiple of `2 ** -16`.

    Returns:
        `x` with elements zeroed at probability `prob` and the others divided by `1 - prob`.
    """
    if torch.compiler.is_compiling():
        # a compiler breaks its graph at `random_` without an upper bound
        return F.dropout(x, prob)
    num_dropped = int(prob * 2**16)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    is_kept = bits[: x.numel()].view(x.shape) >= num_dropped - 2**15
    return x * is_kept.to(x.dtype).mul_(2**16 / (2**16 - num_dropped))


class Linear(nn.Linear):
    """`nn.Linear` computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GeluLinear(Linear):
    """A linear map of the GELU of its input, which the backward pass recomputes instead of saving it."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_traced(x, self.weight) or not _is_plain(x, self.weight):
            return super().forward(F.gelu(x))
        # autocast would cast them in the product
        weight, bias = (None if value is None else value.to(x.dtype) for value in (self.weight, self.bias))
        y: Tensor = _GeluLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], self.out_features)


class Norm(nn.LayerNorm):
    """`nn.LayerNorm`, whose output the linear map behind it recomputes in the backward pass instead of saving it."""

    def forward(self, x: Tensor) -> Tensor:
        if not can_recompute(x, self.weight):
            return super().forward(x)
        y: Tensor = _RecomputedNorm.apply(x, self.weight, self.bias, self.eps)
        return y


class _RecomputedNorm(torch.autograd.Function):
    """A layer norm that can be computed again until its backward pass ends."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        # copies: parameters may be elsewhere when the linear map asks; the saved tensors are unpacked only once
        ctx.eps, ctx.scale, ctx.found = eps, (weight.detach().clone(), bias.detach().clone()), None
        return y

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """Return `y`, in the backward pass of what reads it."""
        ctx.found = ctx.saved_tensors if ctx.found is None else ctx.found
        x, weight, bias, *_ = ctx.found
        scale, shift = (weight, bias) if torch.is_grad_enabled() else ctx.scale
        return F.layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors if ctx.found is None else ctx.found
        ctx.found, wanted = None, list(ctx.needs_input_grad[:3])
        backward = torch.ops.aten.native_layer_norm_backward
        return *backward(grad.contiguous(), x, x.shape[-1:], mean, rstd, weight, bias, wanted), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear`, by oneDNN where it is faster: in fp32 on an x86 CPU, with a weight that is not small.

    Args:
        x: `[..., I]`.
        weight: `[O, I]`.
        bias: `[O]`.

    Returns:
        `[..., O]`, equal to `F.linear` up to the order of the sums, with derivatives of any order.
    """
    norm = None
    if not torch.compiler.is_compiling() and isinstance(x.grad_fn, _RecomputedNorm._backward_cls):
        norm = x.grad_fn
    if not _fits_onednn(x, weight, bias, on_meta=norm is not None):
        return F.linear(x, weight, bias)
    y: Tensor = _OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight.contiguous(), bias, norm)
    return y.view(*x.shape[:-1], len(weight))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `linear` without derivatives; `weight` may be a transposed matrix, which is not copied."""
    return _multiply(x, weight, bias) if _fits_onednn(x, weight, bias) else F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Compute `grad.t() @ x`, `[O, I]` of `[M, O]` and `[M, I]`, by oneDNN where it is faster; no derivative."""
    return _weight_gradient(grad, x) if _fits_onednn(x, x, None) else grad.t() @ x


def _is_traced(x: Tensor, weight: Tensor) -> bool:
    """Return whether compilers, tracers or transforms need PyTorch's own operations."""
    return torch.compiler.is_compiling() or bool(torch._C._get_tracing_state()) or is_transformed(x, weight)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Return whether neither is a distributed or a fake tensor."""
    return type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)


def can_recompute(x: Tensor, weight: Tensor) -> bool:
    """Return whether a backward pass may compute `x` again: in fp32, on a CPU or on `meta` in its place."""
    if _is_traced(x, weight) or not _is_plain(x, weight) or torch.is_autocast_enabled("cpu") or has_kernels(x):
        return False
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return trained and x.device.type in ("cpu", "meta") and x.dtype == weight.dtype == torch.float32


def _fits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *, on_meta: bool = False) -> bool:
    if _is_traced(x, weight):
        return False
    if not _is_plain(x, weight) or _ONEDNN_LINEAR is None or not torch._C._get_mkldnn_enabled():
        return False
    if x.device.type != "cpu" and not (on_meta and x.device.type == "meta"):
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if weight.numel() < _LARGE or x.numel() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    # oneDNN assumes this shape and contiguous memory of a bias without checking
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous()):
        return False
    return not torch.is_autocast_enabled("cpu")


class _OneDNNLinear(torch.autograd.Function):
    """`[M, I]` to `[M, O]`; with the node of the `_RecomputedNorm` that made the input, which is not saved then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Any) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x if norm is None else None, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if needs_weight and ctx.norm is not None:
            x = _RecomputedNorm.recompute(ctx.norm).flatten(0, -2)
        if torch.is_grad_enabled():
            # torch's own products, so that the gradient can be differentiated
            grad_x = grad @ weight if needs_x else None
            grad_weight = grad.t() @ x if needs_weight else None
        else:
            grad_x = _multiply(grad, weight.t(), None) if needs_x else None
            grad_weight = _weight_gradient(grad, x) if needs_weight else None
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None, None


class _GeluLinear(torch.autograd.Function):
    """`[M, I]` to `[M, O]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        hidden = F.gelu(x)
        ctx.by_onednn = _fits_onednn(hidden, weight, bias)
        return _multiply(hidden, weight.contiguous(), bias) if ctx.by_onednn else F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # torch's own products can be differentiated
        by_onednn = ctx.by_onednn and not torch.is_grad_enabled()
        grad_x = grad_weight = None
        if needs_weight:
            hidden = F.gelu(x)
            grad_weight = _weight_gradient(grad, hidden) if by_onednn else grad.t() @ hidden
            del hidden
        if needs_x:
            grad_hidden = _multiply(grad, weight.t(), None) if by_onednn else grad @ weight
            if torch.is_grad_enabled():
                grad_x = torch.ops.aten.gelu_backward(grad_hidden, x)
            else:
                # in place
                grad_x = torch.ops.aten.gelu_backward.grad_input(grad_hidden, x, grad_input=grad_hidden)
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    # oneDNN needs `grad` transposed in memory, which pays if the output is much narrower than the input
    if 2 * grad.shape[1] <= x.shape[1]:
        return _multiply(grad.t(), x.contiguous().t(), None)
    return grad.t() @ x


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.device.type == "meta":
        return F.linear(x, weight, bias)
    # for rows with gaps, oneDNN falls back to a loop that is a thousand times slower
    assert _ONEDNN_LINEAR is not None
    return _ONEDNN_LINEAR(x.contiguous(), weight, bias, "none", [], "")
