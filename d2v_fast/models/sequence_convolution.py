"""Convolutions over sequences with channels last, for the decoders and the positions of data2vec 2.0.

Shape letters: R rows (sequences), T places, C input and O output channels, k taps, G groups of c input and o output
channels.

For wide kernels, oneDNN computes the gradient of the weight at less than half the rate of the convolution. Here it is
k products per group: place `k m + s` and the k - 1 places behind it are row m of the factor of phase s, a view of
memory in which the sequences lie behind each other, with zeros between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.ops.autograd import is_transformed

# the sizes above which the products were measured to be faster
_WIDE_KERNEL, _WIDE_GROUP = 15, 32


def convolve_sequence(convolution: nn.Module, x: Tensor) -> Tensor:
    """Apply an `nn.Conv1d` to sequences with channels last, without transposing them.

    Args:
        convolution: of any kernel k and groups, with stride 1 and padding k // 2. Of an even kernel, the last place is
            left out, as in the published code.
        x: `[R, T, C]`.

    Returns:
        `[R, T, O]`.
    """
    assert isinstance(convolution, nn.Conv1d)
    weight, bias, groups = convolution.weight, convolution.bias, convolution.groups
    if _is_wide(x, weight):
        y: Tensor = _WideConvolution.apply(x, weight, bias, groups)
        return y
    return _convolve(x, weight, bias, groups)


def _is_wide(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or is_transformed(x, weight):
        return False
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    _, channels, taps = weight.shape
    # a group of one output is no matrix; all channels together are
    return taps % 2 == 1 and taps >= _WIDE_KERNEL and channels >= _WIDE_GROUP and x.shape[2] > channels


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    # as images of one row, for which oneDNN has faster kernels
    y = F.conv2d(_image(x), weight[:, :, None], bias, padding=(0, weight.shape[2] // 2), groups=groups)
    return y.permute(0, 2, 3, 1)[:, 0, : x.shape[1]]


def _image(x: Tensor) -> Tensor:
    """Return `[R, C, 1, T]` of `[R, T, C]`."""
    return x[:, None].permute(0, 3, 1, 2)


class _WideConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        # torch's own operation where the gradient is differentiated
        by_torch = needs_weight and torch.is_grad_enabled()
        grad_x: Any = None
        grad_weight: Any = None
        if needs_x or by_torch:
            padding = [0, weight.shape[2] // 2]
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                _image(grad), _image(x), weight[:, :, None], None, [1, 1], padding, [1, 1], False, [0, 0], ctx.groups,
                [needs_x, by_torch, False],
            )  # fmt: skip
        if needs_weight:
            grad_weight = grad_weight[:, :, 0] if by_torch else _weight_gradient(x, grad, weight.shape[2], ctx.groups)
        if needs_x:
            grad_x = grad_x.permute(0, 2, 3, 1)[:, 0]
        return grad_x, grad_weight, grad.sum((0, 1)) if needs_bias else None, None


def _weight_gradient(x: Tensor, grad: Tensor, taps: int, groups: int) -> Tensor:
    """Return `[O, c, k]` of `[R, T, C]` and `[R, T, O]`."""
    inputs, outputs = _by_group(x, taps, groups, taps // 2), _by_group(grad, taps, groups, 0)
    (_, num_places, c), rows = inputs.shape, outputs.shape[1] // taps - 1
    of_taps = x.new_zeros(groups, outputs.shape[2], taps * c)
    for phase in range(taps):
        factor = inputs.as_strided((groups, rows, taps * c), (num_places * c, taps * c, 1), phase * c)
        of_taps.baddbmm_(outputs[:, phase : phase + rows * taps : taps].mT, factor)
    return of_taps.unflatten(2, (taps, c)).transpose(2, 3).reshape(-1, c, taps)


def _by_group(x: Tensor, taps: int, groups: int, before: int) -> Tensor:
    """Return `[G, k + n, c]` of `[R, T, C]`: the n places of all sequences, whole kernels each, from `before` on."""
    R, T, _ = x.shape
    places = -(-(T + taps // 2) // taps) * taps
    values = x.unflatten(2, (groups, -1)).permute(2, 0, 1, 3)
    found = x.new_zeros(groups, R * places + taps, values.shape[3])
    found[:, before : before + R * places].unflatten(1, (R, places))[:, :, :T] = values
    return found
