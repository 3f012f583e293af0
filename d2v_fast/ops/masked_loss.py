"""Smooth L1 (or squared error) over rows, with its gradient and per-channel sums of both sides in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.ops._library import CHECKED_DTYPES, check_tensor, define, is_observed, wide
from d2v_fast.ops.autograd import below_autograd, direct_apply, is_plain, register_autograd
from d2v_fast.ops.topk_target import check_indices, take_rows

REDUCTIONS = ("sum", "mean")
# a smaller beta has no finite inverse in fp32, and no fp32 error lies between it and 0
LEAST_BETA = torch.finfo(torch.float32).tiny


class MaskedLoss(NamedTuple):
    """Result of ``masked_smooth_l1`` and ``data2vec_loss``.

    Examples:
        >>> loss, moments = masked_smooth_l1(torch.ones(2, 3), torch.zeros(2, 3))
        >>> moments.shape
        torch.Size([4, 3])
    """

    loss: Tensor
    """0-d fp32; fp64 if an argument is."""
    moments: Tensor | None
    """`[4, D]` in the dtype of the loss, without gradient: per channel, the sums over rows of pred, pred^2, target and
    target^2. None if they were not asked for."""


def masked_smooth_l1_reference(
    pred: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the sums of ``MaskedLoss.moments``, or `[0]` without `need_moments`, and the slope.

    The slope is the derivative of each element's loss times the part of the loss's factor that ``split_factor`` saves,
    or empty without `need_grad`. Differentiable to any order with respect to `pred`, constant in `target`.
    """
    target = target.detach()
    if target_rows is not None:
        target = take_rows("target_rows", target, target_rows)
    p, t = wide(pred), wide(target)
    error = p - t
    if beta == 0.0:
        values, slope = error.square(), 2.0 * error
    else:
        beta = max(beta, LEAST_BETA)
        size = error.abs()
        near = size < beta
        # exclude large errors from the square, whose derivative could overflow
        inner = torch.where(near, error, 0.0)
        values = torch.where(near, inner.square() / (2.0 * beta), size - beta / 2.0)
        slope = torch.where(near, inner / beta, error.sign())
    factor = loss_factor(pred, scale, mean)
    # multiply by a tensor: a Python number would give an fp64 tangent under `torch.func.jvp`
    loss = values.sum() * torch.full((), factor, dtype=p.dtype, device=pred.device)
    saved, _ = split_factor(factor, pred.dtype)
    slope = (slope * saved).to(pred.dtype) if need_grad else pred.new_empty(0)
    if not need_moments:
        return loss, pred.new_empty(0, dtype=torch.float32), slope
    p = p.detach()
    return loss, torch.stack([p.sum(0), p.square().sum(0), t.sum(0), t.square().sum(0)]), slope


def loss_factor(pred: Tensor, scale: float, mean: bool) -> float:
    """Return the factor of the sum over rows and channels; finite if there are no rows."""
    return scale / max(pred.numel(), 1) if mean else scale


def split_factor(factor: float, dtype: torch.dtype) -> tuple[float, float]:
    """Divide the loss's factor between the saved slope and the backward pass.

    The slope holds all of it except in fp16, where it holds the mantissa only: the power of two could underflow before
    the loss scale is applied. The slope is rounded once either way.
    """
    if dtype != torch.float16:
        return factor, 1.0
    mantissa, exponent = math.frexp(factor)
    return mantissa, math.ldexp(1.0, exponent)


define(
    "masked_smooth_l1(Tensor pred, Tensor target, Tensor? target_rows, float beta, float scale, bool mean, "
    "bool need_grad, bool need_moments) -> (Tensor, Tensor, Tensor)",
    masked_smooth_l1_reference,
    "masked_loss.masked_smooth_l1",
)


@torch.library.register_fake("d2v::masked_smooth_l1")
def _fake(
    pred: Tensor,
    target: Tensor,
    target_rows: Tensor | None,
    beta: float,
    scale: float,
    mean: bool,
    need_grad: bool,
    need_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_loss(pred, need_grad, need_moments)


def fake_loss(pred: Tensor, need_grad: bool, need_moments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty results of either loss operation."""
    loss = pred.new_empty((), dtype=torch.float32)
    moments = pred.new_empty((4, pred.shape[1]) if need_moments else (0,), dtype=torch.float32)
    return loss, moments, pred.new_empty(pred.shape if need_grad else (0,))


def scale_gradient_reference(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> Tensor:
    """Multiply `slope` by the 0-d fp32 `grad_output` and the factor that ``split_factor`` left; keep its dtype."""
    _, left = split_factor(loss_factor(slope, scale, mean), slope.dtype)
    return (slope.float() * (grad_output * left)).to(slope.dtype)


define(
    "scale_gradient(Tensor slope, Tensor grad_output, float scale, bool mean) -> Tensor",
    scale_gradient_reference,
    "masked_loss.scale_gradient",
)


@torch.library.register_fake("d2v::scale_gradient")
def _fake_scale(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> Tensor:
    return slope.new_empty(slope.shape)


def scale_gradient_inplace_reference(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> None:
    """Run ``scale_gradient`` in place."""
    slope.copy_(scale_gradient_reference(slope, grad_output, scale, mean))


define(
    "scale_gradient_(Tensor(a!) slope, Tensor grad_output, float scale, bool mean) -> ()",
    scale_gradient_inplace_reference,
    "masked_loss.scale_gradient_",
)


@torch.library.register_fake("d2v::scale_gradient_")
def _fake_scale_inplace(slope: Tensor, grad_output: Tensor, scale: float, mean: bool) -> None:
    return None


# whether the backward pass retains the graph; assume so if torch lacks the query
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _second_derivative(slope: Tensor, grad_slope: Tensor, beta: float, scale: float, mean: bool) -> Tensor:
    """Return the gradient of the predictions from the gradient of the saved `slope`.

    The slope shows on which side of beta an error lies: beyond, it equals the factor, up to rounding.
    """
    saved, _ = split_factor(loss_factor(slope, scale, mean), slope.dtype)
    if beta == 0.0:
        return (grad_slope.float() * (2.0 * saved)).to(slope.dtype)
    far = abs(saved) * (1.0 - torch.finfo(slope.dtype).eps)
    curved = grad_slope.float() * (saved / max(beta, LEAST_BETA))
    return torch.where(slope.detach().float().abs() < far, curved, 0.0).to(slope.dtype)


class LossFunction(torch.autograd.Function):
    """Autograd of both losses.

    Their arguments begin with `pred` and end with `beta, scale, mean, need_grad, need_moments`.

    Only the slope that the operation returns is saved. It is an output with a derivative, so that a backward pass with
    ``create_graph`` reaches the predictions.
    """

    @staticmethod
    def forward(
        ctx: Any, operation: Callable[..., Any], pred: Tensor, others: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            loss, moments, slope = operation(pred, *others)
        ctx.settings = others[-5:-1]
        ctx.mark_non_differentiable(moments)
        # do not allocate zeros for the slope's gradient, which only a second backward pass has
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope)
        return loss, moments, slope

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _moments: Tensor | None, grad_slope: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        beta, scale, mean, need_grad = ctx.settings
        if not need_grad:
            raise RuntimeError("the loss was computed with `need_grad=False`, so it has no gradient.")
        (slope,) = ctx.saved_tensors
        if grad_slope is None:
            return None, None if grad_loss is None else _first_derivative(slope, grad_loss, scale, mean), None
        second = _second_derivative(slope, grad_slope, beta, scale, mean)
        return None, second if grad_loss is None else _first_derivative(slope, grad_loss, scale, mean) + second, None


def _first_derivative(slope: Tensor, grad_loss: Tensor, scale: float, mean: bool) -> Tensor:
    if torch.is_grad_enabled():
        return scale_gradient_reference(slope, grad_loss, scale, mean)
    # nothing can read the slope afterwards unless the graph is retained or traced (tensors are of subclasses then), or
    # under vmap
    if type(slope) is Tensor and not (_graph_is_kept() or _is_batched(grad_loss) or _is_legacy_batched(grad_loss)):
        # reuse the slope's memory for the gradient; a factor of 1 costs nothing
        slope = slope.detach()
        # a loss that is differentiated itself has the gradient 1, for which a GPU would have to wait
        if grad_loss.is_cpu and slope.dtype != torch.float16 and not is_observed() and grad_loss.item() == 1.0:
            return slope
        torch.autograd.graph.increment_version(slope)
        with below_autograd():
            _scale_in_place(slope, grad_loss, scale, mean)
        return slope
    scaled: Tensor = torch.ops.d2v.scale_gradient.default(slope, grad_loss, scale, mean)
    return scaled


_scale_in_place = torch.ops.d2v.scale_gradient_.default
_apply = direct_apply(LossFunction)


def run_loss(operation: Callable[..., Any], pred: Tensor, others: tuple[Any, ...]) -> MaskedLoss:
    """Run either loss operation with the arguments `pred, *others`, the last of which is `need_moments`."""
    if not is_plain():
        loss, moments, _ = operation(pred, *others)
    elif others[-2]:
        loss, moments, _ = _apply(operation, pred, others)
    else:
        with below_autograd():
            loss, moments, _ = operation(pred, *others)
    return MaskedLoss(loss, moments if others[-1] else None)


def run_reference(reference: Callable[..., Any], pred: Tensor, others: tuple[Any, ...]) -> MaskedLoss:
    """Run the reference of either loss operation, for fp64; see `run_loss`."""
    loss, moments, _ = reference(pred, *others)
    return MaskedLoss(loss, moments if others[-1] else None)


_masked_smooth_l1 = torch.ops.d2v.masked_smooth_l1.default
register_autograd("masked_smooth_l1", 1, LossFunction.apply, masked_smooth_l1_reference)
register_autograd(
    "scale_gradient", 2, lambda _, x, y, others: scale_gradient_reference(x, y, *others), scale_gradient_reference
)


def masked_smooth_l1(
    pred: Tensor,
    target: Tensor,
    *,
    beta: float = 0.0,
    scale: float = 1.0,
    reduction: str = "mean",
    target_rows: Tensor | None = None,
    moments: bool = True,
) -> MaskedLoss:
    """Compute Smooth L1 between predictions and targets, and the sums that a collapse monitor needs.

    The loss of data2vec (arXiv 2202.03555, section 3.4). For an error ``e`` it is ``e^2 / (2 beta)`` if
    ``|e| < beta``, else ``|e| - beta / 2``. ``beta`` 0 selects the squared error ``e^2`` (without 1/2), as in the
    published code. Arithmetic is fp32, and the result does not depend on the number of threads. If an argument is fp64,
    the reference runs in it.

    Args:
        pred: `[N, D]`, fp32, bf16, fp16 or fp64.
        target: `[M, D]`, of one of these dtypes, on the same device; `M = N` without ``target_rows``. A constant.
        beta: Error at which the loss turns from quadratic to linear, in units of the target, >= 0.
        scale: Factor on the loss.
        reduction: ``sum`` over rows and channels, or ``mean``: the sum divided by `N * D`.
        target_rows: int64 `[N]`: row i of ``pred`` is compared with row ``target_rows[i]`` of ``target``, so that
            several predictions share one target without a copy of it.
        moments: Whether to compute the moments. The gradient and, on a CPU, the loss are the same bit for bit without
            them; a GPU adds the loss in another order.

    Returns:
        ``loss``, 0-d (0 if there are no rows), and ``moments``, `[4, D]`, or None if not asked for; see ``MaskedLoss``.

    Backward:
        Gradient to ``pred`` only, in its dtype. The forward pass computes and saves it, in fp16 up to a power of two.
        The backward pass multiplies it by the incoming gradient, in place unless the graph is retained: another holder
        of the saved tensor sees it change.

        A gradient computed with ``create_graph`` has derivatives of any order, which decide from the rounded gradient
        whether an error is within ``beta``. Forward mode and the transforms of ``torch.func`` run a slower composition
        of PyTorch operations. ``target`` and ``moments`` are constants in all of these.

    Raises:
        ValueError, TypeError: An argument is not as described above.
        IndexError: On a CPU, an entry of ``target_rows`` is outside [0, M). On a GPU, which would have to wait for the
            values, and under ``torch.vmap``, it gives NaN.

    Examples:
        >>> masked_smooth_l1(torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 0.0]]), beta=2.0, reduction="sum").loss
        tensor(4.2500)
    """
    check_pred(pred, beta, scale, reduction)
    check_tensor("target", target)
    shape, target_shape = pred.shape, target.shape
    if len(target_shape) != 2 or target_shape[1] != shape[1]:
        raise ValueError(
            f"`target` must have shape [M, {pred.shape[1]}] as `pred` has, but is {tuple(target.shape)} instead."
        )
    if target.dtype not in CHECKED_DTYPES:
        raise ValueError(f"`target` must be fp32, bf16, fp16 or fp64, but is {target.dtype} instead.")
    if target.device != pred.device:
        raise ValueError(f"`target` must be on {pred.device} as `pred` is, but is on {target.device} instead.")
    if target_rows is None and target_shape[0] != shape[0]:
        raise ValueError(
            f"`target` must have as many rows as `pred` ({pred.shape[0]}), but has {target.shape[0]} instead; "
            "`target_rows` maps one to the other."
        )
    check_target_rows(pred, target_rows)
    need_grad = pred.requires_grad and torch.is_grad_enabled()
    others = (target, target_rows, float(beta), float(scale), reduction == "mean", need_grad, moments)
    if torch.float64 in (pred.dtype, target.dtype):
        return run_reference(masked_smooth_l1_reference, pred, others)
    return run_loss(_masked_smooth_l1, pred, others)


def check_pred(pred: Tensor, beta: float, scale: float, reduction: str) -> None:
    """Raise for predictions that are no tensor or of a wrong shape or dtype, and for invalid settings of the loss."""
    check_tensor("pred", pred)
    if pred.ndim != 2:
        raise ValueError(f"`pred` must have shape [N, D], but has {tuple(pred.shape)} instead.")
    if pred.dtype not in CHECKED_DTYPES:
        raise ValueError(f"`pred` must be fp32, bf16, fp16 or fp64, but is {pred.dtype} instead.")
    if not 0 <= beta < math.inf:
        raise ValueError(f"`beta` must be finite and >= 0, but is {beta} instead.")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"`scale` must be finite, but is {scale} instead.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {', '.join(REDUCTIONS)}, but is {reduction!r} instead.")


def check_target_rows(pred: Tensor, target_rows: Tensor | None) -> None:
    """Raise for a row map of a wrong shape, dtype or device. The kernels check its values."""
    if target_rows is None:
        return
    check_indices("target_rows", target_rows, pred.device)
    if target_rows.shape[0] != pred.shape[0]:
        raise ValueError(
            f"`target_rows` must have one entry per row of `pred` ({pred.shape[0]}), "
            f"but has {target_rows.shape[0]} instead."
        )
