"""Differentiate operations and hand-written backward passes in every mode of PyTorch, or raise an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from d2v_fast.ops._library import library

_is_transforming = torch._C._are_functorch_transforms_active


def register_autograd(
    name: str, num_inputs: int, ordinary: Callable[..., Any], transformed: Callable[..., Any]
) -> Callable[..., Any]:
    """Register the derivative of the operation ``d2v::<name>`` for every mode of PyTorch.

    Args:
        name: The operation, already defined.
        num_inputs: Number of leading arguments that are tensors with a derivative.
        ordinary: Runs the operation if an input requires a gradient: ``apply`` of a ``torch.autograd.Function`` whose
            arguments are the operation, the inputs, and one tuple of the other arguments, which is faster.
        transformed: Runs it under the transforms of ``torch.func`` and for inputs with a forward-mode tangent, with
            differentiable PyTorch operations, or raises.

    Returns:
        A function with the operation's arguments. It replaces several Python calls of the dispatcher by one, and
        leaves compilers and transforms to the dispatcher.
    """
    operation = getattr(torch.ops.d2v, name).default

    def differentiate(*args: Any) -> Any:
        inputs = args[:num_inputs]
        if torch.is_grad_enabled() and [x for x in inputs if x.requires_grad]:
            return ordinary(operation, *inputs, args[num_inputs:])
        with below_autograd():
            return operation(*args)

    def on_autograd(*args: Any) -> Any:
        return transformed(*args) if is_transformed(*args[:num_inputs]) else differentiate(*args)

    def run(*args: Any) -> Any:
        return differentiate(*args) if is_plain() else operation(*args)

    library.impl(name, on_autograd, "Autograd")
    return run


def register_backward(name: str, num_inputs: int, message: str) -> None:
    """Register the operation ``d2v::<name>``, a hand-written backward pass, as one without a derivative.

    Args:
        name: The operation, already defined.
        num_inputs: Number of leading arguments that are tensors with a gradient.
        message: Of the RuntimeError that a derivative of its results raises, in any mode.
    """

    def ordinary(operation: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
        *inputs, others = args
        with below_autograd():
            grads = operation(*inputs, *others)
        return refuse_derivative(message, grads, inputs)

    def transformed(*args: Any) -> Any:
        raise RuntimeError(message)

    register_autograd(name, num_inputs, ordinary, transformed)


def differentiable_gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs that require one, with a graph, from an upstream gradient.

    Args:
        run: Computes the result from `inputs` by PyTorch's own operations.
        inputs: Tensors that a ``torch.autograd.Function`` saved.
        grad: Gradient of the result.
    """
    # views, since hooks on the tensors belong to the backward pass in progress
    inputs = [value.view_as(value) for value in inputs]
    wanted = [value for value in inputs if value.requires_grad]
    grads = iter(torch.autograd.grad(run(*inputs), wanted, grad, create_graph=True))
    return tuple(next(grads) if value.requires_grad else None for value in inputs)


def is_plain() -> bool:
    """Return whether neither a compiler nor ``torch.func`` nor forward mode is active.

    If so, a function may skip the dispatcher's Python kernel, the cost of which exceeds that of small operations, and
    call `direct_apply` of its ``torch.autograd.Function``, or the operation in the context `below_autograd`.
    """
    return not (is_compiling() or _is_transforming() or forward_ad._current_level >= 0)


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the ``apply`` of `function` without the handling of ``torch.func``. Call it only if `is_plain`."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # torch's is in C
    return apply


below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
"""Context in which operations neither record derivatives nor raise version counters; the caller does both."""


def is_transformed(*inputs: Tensor) -> bool:
    """Return whether a transform of ``torch.func`` is active or an input has a forward-mode tangent."""
    if _is_transforming():
        return True
    # tangents exist in a dual level only
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def once_differentiable(message: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``backward`` of a ``torch.autograd.Function`` without a second derivative.

    A second derivative raises ``RuntimeError(message)``. ``torch.autograd.function.once_differentiable`` raises only if
    the incoming gradient has a graph, and otherwise returns a gradient that is silently constant in the inputs.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            return refuse_derivative(message, results, (*grads, *ctx.saved_tensors))

        return wrapped

    return decorate


def refuse_derivative(message: str, results: Sequence[Any], inputs: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the results such that differentiating them by any input raises ``RuntimeError(message)``."""
    tensors = [x for x in inputs if x is not None and x.requires_grad]
    refused = iter(_Refusal.apply(message, tuple(x for x in results if x is not None), *tensors))
    return tuple(None if x is None else next(refused) for x in results)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, results: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)
