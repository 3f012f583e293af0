"""Dense convolutions over sequences on a CPU, with two thirds of the arithmetic, for the text decoder of data2vec 2.0.

Shape letters: R rows (sequences), T places, C input and O output channels, k taps, S = k / 3 groups of taps, P pairs of
neighboring outputs.

Three taps of one input channel and two neighboring outputs need 4 products instead of 6 (Winograd's F(2, 3), arXiv
1509.09308, section 4.1). With the taps g0, g1, g2 and the inputs d0 to d3,

    m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d1 - d3) g2,

and the outputs are m0 + m1 + m2 and m1 - m2 - m3. Groups of taps, and channels, add up in the products. All steps are
sums of two or three numbers, and so about as exact as the plain convolution.

The sequences lie behind each other, with zeros between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.models.layers import linear, weight_gradient
from d2v_fast.ops.autograd import is_transformed

# below this width, sums and calls cost more than the products save
_SMALL_WIDTH = 256


def is_dense(x: Tensor, weight: Tensor) -> bool:
    """Return whether `convolve_dense` supports a convolution: fp32 on a CPU, many channels, no groups, k / 3 whole.

    Args:
        x: `[R, T, C]`.
        weight: `[O, C / groups, k]`.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or is_transformed(x, weight):
        return False
    plain = x.device.type in ("cpu", "meta") and x.dtype == weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu"):
        return False
    channels, taps = weight.shape[1:]
    return taps % 6 == 3 and x.shape[2] == channels and min(weight.shape[:2]) >= _SMALL_WIDTH


def convolve_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve sequences with stride 1 and k // 2 zeros on each side.

    Args:
        x: fp32 `[R, T, C]` on a CPU.
        weight: `[O, C, k]`, k an odd multiple of 3.
        bias: `[O]`.

    Returns:
        `[R, T, O]`, equal to `F.conv1d` up to rounding, with derivatives of any order.
    """
    y: Tensor = _DenseConvolution.apply(x, weight, bias)
    return y


class _DenseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_bias = grad.sum((0, 1)) if needs_bias else None
        if torch.is_grad_enabled():
            # torch's own operations, so that the gradient can be differentiated
            columns, half = (t.transpose(1, 2) for t in (x, grad)), weight.shape[2] // 2
            x, grad = columns
            wanted = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1], [half], [1], False, [0], 1, [needs_x, needs_weight, False]
            )
            return wanted[0].transpose(1, 2) if needs_x else None, wanted[1], grad_bias
        grad_weight = _weight_gradient(x, grad, weight.shape[2]) if needs_weight else None
        grad_x = _convolve(grad, weight.flip(2).transpose(0, 1), None) if needs_x else None
        return grad_x, grad_weight, grad_bias


class _Windows:
    """The sums of inputs that the products read, for all pairs of outputs.

    Args:
        x: `[R, T, C]`.
        taps: k.

    Attributes:
        places: places from the start of a sequence to that of the next one.
        num_pairs: pairs of outputs, including some between the sequences that nobody reads.
    """

    def __init__(self, x: Tensor, taps: int) -> None:
        R, T, C = x.shape
        self.places = 2 * ((T + 1) // 2) + taps - 1
        self.num_pairs = (R * self.places - taps + 1) // 2
        before = taps // 2
        padded = F.pad(x, (0, 0, before, self.places - T - before))
        shape, strides = (self.num_pairs, taps // 3, C), (2 * C, 3 * C, 1)
        # d0 to d3, of each pair and group of taps
        self._inputs = [padded.as_strided(shape, strides, i * C) for i in range(4)]

    def factor(self, product: int) -> Tensor:
        """Return what m0, m1, m2 or m3 multiplies by kernels, `[num_pairs, S * C]`."""
        d0, d1, d2, d3 = self._inputs
        sums = [lambda: d0 - d2, lambda: d1 + d2, lambda: d2 - d1, lambda: d1 - d3]
        return sums[product]().flatten(1)


def _kernels(weight: Tensor) -> list[Tensor]:
    """Return what m0 to m3 multiply by, `[O, S * C]` each, of `[O, C, k]`."""
    g0, g1, g2 = weight.transpose(1, 2).unflatten(1, (-1, 3)).contiguous().unbind(2)
    outer = g0 + g2
    return [g.flatten(1) for g in (g0, (outer + g1) / 2, (outer - g1) / 2, g2)]


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    R, T, _ = x.shape
    windows, kernels = _Windows(x, weight.shape[2]), _kernels(weight)
    y = x.new_empty(R * windows.places // 2, 2, len(weight))
    even, odd = y[: windows.num_pairs].unbind(1)
    middle = linear(windows.factor(1), kernels[1], bias)
    other = linear(windows.factor(2), kernels[2], None)
    torch.add(middle, other, out=even)
    torch.sub(middle, other, out=odd)
    del middle, other
    even += linear(windows.factor(0), kernels[0], None)
    odd -= linear(windows.factor(3), kernels[3], None)
    return y.view(R, windows.places, len(weight))[:, :T].contiguous()


def _weight_gradient(x: Tensor, grad: Tensor, taps: int) -> Tensor:
    windows = _Windows(x, taps)
    outputs = F.pad(grad, (0, 0, 0, windows.places - grad.shape[1])).view(-1, 2, grad.shape[2])
    even, odd = outputs[: windows.num_pairs].unbind(1)
    sums = (even, even + odd, even - odd, odd)
    first, total, difference, last = (weight_gradient(sums[i], windows.factor(i)) for i in range(4))
    outer = total.add(difference).div_(2)
    of_taps = torch.stack((first.add_(outer), total.sub_(difference).div_(2), outer.sub_(last)), dim=1)
    # from `[O, 3, S * C]`
    return of_taps.view(len(of_taps), 3, taps // 3, -1).permute(0, 3, 2, 1).reshape(len(of_taps), -1, taps)
