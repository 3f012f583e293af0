"""Layer norm over channels and GELU in one pass, for the convolutional front end of wav2vec 2.0 and data2vec."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from d2v_fast.ops._library import CHECKED_DTYPES, FLOAT_DTYPES, check_tensor, define, wide
from d2v_fast.ops.autograd import (
    below_autograd,
    differentiable_gradients,
    direct_apply,
    is_plain,
    is_transformed,
    register_autograd,
    register_backward,
)


def layer_norm_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(layer_norm(x))`` in the dtype of `x` `[..., C]`, and the rows' mean and 1 / deviation, fp32 `[...]`."""
    shape = x.shape[-1:]
    scale, shift = (value.to(torch.float64) if x.dtype == torch.float64 else value.float() for value in (weight, bias))
    normal, mean, rstd = torch.native_layer_norm(wide(x), shape, scale, shift, eps)
    mean, rstd = mean.detach(), rstd.detach()
    y = torch.nn.functional.gelu(normal).to(x.dtype).contiguous()
    return y, mean.reshape(x.shape[:-1]), rstd.reshape(x.shape[:-1])


def layer_norm_gelu_inplace_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, the values in place of `x`."""
    y, mean, rstd = layer_norm_gelu_reference(x, weight, bias, eps)
    x.copy_(y)
    return mean, rstd


def layer_norm_gelu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight` and `bias`, each in its dtype."""
    values, w, b = x.float(), weight.float(), bias.float()
    mean, rstd = mean[..., None], rstd[..., None]
    slope = torch.ops.aten.gelu_backward(grad.float(), (values - mean) * rstd * w + b)
    grads = torch.ops.aten.native_layer_norm_backward(slope, values, x.shape[-1:], mean, rstd, w, b, [True] * 3)
    return grads[0].to(x.dtype).contiguous(), grads[1].to(weight.dtype), grads[2].to(bias.dtype)


def layer_norm_gelu_backward_inplace_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, the gradient of `x` in place of `grad`."""
    grad_x, grad_weight, grad_bias = layer_norm_gelu_backward_reference(grad, x, weight, bias, mean, rstd)
    grad.copy_(grad_x)
    return grad_weight, grad_bias


define(
    "layer_norm_gelu(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm_gelu_reference,
    "norm_gelu.layer_norm_gelu",
)
define(
    "layer_norm_gelu_(Tensor(a!) x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    layer_norm_gelu_inplace_reference,
    "norm_gelu.layer_norm_gelu_",
)
define(
    "layer_norm_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> "
    "(Tensor, Tensor, Tensor)",
    layer_norm_gelu_backward_reference,
    "norm_gelu.layer_norm_gelu_backward",
)
define(
    "layer_norm_gelu_backward_(Tensor(a!) grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> "
    "(Tensor, Tensor)",
    layer_norm_gelu_backward_inplace_reference,
    "norm_gelu.layer_norm_gelu_backward_",
)


@torch.library.register_fake("d2v::layer_norm_gelu")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@torch.library.register_fake("d2v::layer_norm_gelu_")
def _fake_inplace(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("d2v::layer_norm_gelu_backward")
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


@torch.library.register_fake("d2v::layer_norm_gelu_backward_")
def _fake_backward_inplace(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _Values(torch.autograd.Function):
    """``y`` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        with below_autograd():
            y, mean, rstd = _FORWARD(x, weight, bias, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            eps, inputs = ctx.eps, ctx.saved_tensors[:3]

            def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return layer_norm_gelu_reference(x, weight, bias, eps)[0]

            return *differentiable_gradients(run, inputs, grad), None
        with below_autograd():
            return *_BACKWARD(grad, *ctx.saved_tensors), None


class _ValuesAndStatistics(torch.autograd.Function):
    """The results of the operation."""

    @staticmethod
    def forward(
        ctx: Any, operation: Callable[..., Any], x: Tensor, weight: Tensor, bias: Tensor, others: tuple[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        (ctx.eps,) = others
        with below_autograd():
            y, mean, rstd = operation(x, weight, bias, ctx.eps)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _mean: Tensor, _rstd: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Values.backward(ctx, grad)


_FORWARD = torch.ops.d2v.layer_norm_gelu.default
_BACKWARD = torch.ops.d2v.layer_norm_gelu_backward.default
register_autograd("layer_norm_gelu", 3, _ValuesAndStatistics.apply, layer_norm_gelu_reference)
register_backward(
    "layer_norm_gelu_backward",
    4,
    "`layer_norm_gelu_backward` has no derivative; `layer_norm_gelu` has derivatives of any order.",
)
_apply = direct_apply(_Values)


def layer_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Compute GELU of the layer norm over the last dimension, in one pass over memory.

    It follows each convolution in the front end of wav2vec 2.0 and data2vec (arXiv 2006.11477, section 2):
    ``F.gelu(F.layer_norm(x.float(), (C,), weight.float(), bias.float(), eps)).to(x.dtype)``, with the exact GELU.
    Arithmetic is fp32, and the result does not depend on the number of threads.

    Args:
        x: `[..., C]`, fp32, bf16, fp16 or fp64, in which the reference runs. It is copied first if its channels are
            not contiguous.
        weight: `[C]`, fp32 or in the dtype of ``x``, on the same device.
        bias: Like ``weight``.
        eps: Added to the variance, >= 0.

    Returns:
        `[..., C]` in the dtype of ``x``, contiguous.

    Backward:
        Gradients to all three, each in its dtype. The forward pass saves ``x`` and two fp32 numbers per row; normalized
        values and GELU are recomputed. A gradient computed with ``create_graph``, forward mode and the transforms of
        ``torch.func`` run a slower composition of PyTorch operations, with derivatives of any order.

    Raises:
        ValueError, TypeError: An argument is not as described above.

    Examples:
        >>> layer_norm_gelu(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2))
        tensor([[-0.1587,  0.8413]])
    """
    _check_forward(x, weight, bias, eps, CHECKED_DTYPES)
    if x.dtype == torch.float64:
        return layer_norm_gelu_reference(x, weight, bias, eps)[0]
    if is_plain() and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        y: Tensor = _apply(x, weight, bias, float(eps))
        return y
    return _run(_FORWARD, (x, weight, bias), float(eps))[0]


def layer_norm_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``layer_norm_gelu`` and the statistics that ``layer_norm_gelu_backward`` needs.

    Returns:
        ``y``, and per row the mean and 1 / deviation, fp32 `[...]` without gradient. Another call with the same
        arguments returns the same bits.
    """
    _check_forward(x, weight, bias, eps, CHECKED_DTYPES)
    if x.dtype == torch.float64:
        return layer_norm_gelu_reference(x, weight, bias, eps)
    y, mean, rstd = _run(_FORWARD, (x, weight, bias), float(eps))
    return y, mean, rstd


def layer_norm_gelu_(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Run ``layer_norm_gelu_forward`` in place: ``y`` overwrites ``x``, without allocating a result.

    It has no gradient: use it if ``x`` can be recomputed for the backward pass.

    Args:
        x: See ``layer_norm_gelu``; contiguous, and not part of a graph.
        weight, bias, eps: See ``layer_norm_gelu``.

    Returns:
        Per row the mean and 1 / deviation, fp32 `[...]`.

    Raises:
        ValueError: See ``layer_norm_gelu``; or ``x`` is not contiguous, or a derivative would be required.
    """
    _check_forward(x, weight, bias, eps)
    _check_overwritten("x", x, weight, bias)
    with torch.no_grad():
        mean, rstd = torch.ops.d2v.layer_norm_gelu_(x, weight, bias, float(eps))
    return mean, rstd


def layer_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of ``x``, ``weight`` and ``bias`` in one pass, each in its dtype; deterministic.

    Args:
        grad: `[..., C]`, gradient of ``y``, in the shape and dtype of ``x``.
        x, weight, bias: The arguments of ``layer_norm_gelu_forward``.
        mean, rstd: fp32 `[...]`, results of ``layer_norm_gelu_forward``.

    Raises:
        ValueError: A gradient or a statistic has another shape or dtype.
        RuntimeError: The result is differentiated, or computed in forward mode or under ``torch.func``.
    """
    _check_backward(grad, x, weight, bias, mean, rstd)
    grad_x, grad_weight, grad_bias = _run(_BACKWARD, (grad, x, weight, bias), mean, rstd)
    return grad_x, grad_weight, grad_bias


def layer_norm_gelu_backward_(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Run ``layer_norm_gelu_backward`` in place: the gradient of ``x`` overwrites ``grad``.

    Args:
        grad: See ``layer_norm_gelu_backward``; contiguous.
        x, weight, bias, mean, rstd: See ``layer_norm_gelu_backward``.

    Returns:
        Gradients of ``weight`` and ``bias``.

    Raises:
        ValueError: See ``layer_norm_gelu_backward``; or ``grad`` is not contiguous, or a derivative would be required.
    """
    _check_backward(grad, x, weight, bias, mean, rstd)
    _check_overwritten("grad", grad, x, weight, bias)
    with torch.no_grad():
        grad_weight, grad_bias = torch.ops.d2v.layer_norm_gelu_backward_(grad, x, weight, bias, mean, rstd)
    return grad_weight, grad_bias


def _run(operation: Callable[..., Any], inputs: tuple[Tensor, ...], *others: Any) -> tuple[Tensor, ...]:
    """Run an operation, past the dispatcher's Python kernel if it has no graph."""
    if is_plain() and not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
        with below_autograd():
            results: tuple[Tensor, ...] = operation(*inputs, *others)
    else:
        results = operation(*inputs, *others)
    return results


def _check_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> None:
    check_tensor("x", x)
    if x.ndim == 0:
        raise ValueError("`x` must have shape [..., C], but has () instead.")
    if x.dtype not in dtypes:
        names = "fp32, bf16, fp16 or fp64" if torch.float64 in dtypes else "fp32, bf16 or fp16"
        raise ValueError(f"`x` must be {names}, but is {x.dtype} instead.")
    _check_affine(x, weight, bias)
    if not 0 <= eps < math.inf:
        raise ValueError(f"`eps` must be finite and >= 0, but is {eps} instead.")


def _check_affine(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    shape, dtype, device = x.shape[-1:], x.dtype, x.device
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(name, value)
        if value.shape != shape:
            raise ValueError(
                f"`{name}` must have shape [{shape[0]}] as the channels of `x`, but has {tuple(value.shape)} instead."
            )
        if value.dtype != torch.float32 and value.dtype != dtype:
            raise ValueError(f"`{name}` must be fp32 or {dtype} as `x` is, but is {value.dtype} instead.")
        if value.device != device:
            raise ValueError(f"`{name}` must be on {device} as `x` is, but is on {value.device} instead.")


def _check_overwritten(name: str, value: Tensor, *others: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous to be overwritten, but has strides {value.stride()} instead.")
    if value.requires_grad:
        raise ValueError(f"`{name}` must not require a gradient to be overwritten: `{name}.detach()` does not.")
    if is_transformed(value, *others) or (torch.is_grad_enabled() and any(x.requires_grad for x in others)):
        raise ValueError(
            f"what overwrites `{name}` has no derivative in any mode: call it under `torch.no_grad()`, and outside of "
            "`torch.func` and forward-mode differentiation."
        )


def _check_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> None:
    _check_affine(x, weight, bias)
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(
            f"`grad` must be {x.dtype} of shape {tuple(x.shape)} as `x` is, "
            f"but is {grad.dtype} of shape {tuple(grad.shape)} instead."
        )
    for name, value in (("mean", mean), ("rstd", rstd)):
        if value.shape != x.shape[:-1] or value.dtype != torch.float32:
            raise ValueError(
                f"`{name}` must be fp32 of shape {tuple(x.shape[:-1])}, one number for each row of `x`, "
                f"but is {value.dtype} of shape {tuple(value.shape)} instead."
            )
