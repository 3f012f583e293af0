"""Dense convolutions of nine taps over sequences on a CPU, with four ninths of the arithmetic, for the text decoder of
data2vec 2.0.

Shape letters: R rows (sequences), T places, C input and O output channels, N tiles of six neighboring places.

Place `3 m + s` is place m of phase s, and tap `3 i + j` is tap i of kernel j. With the kernels H0, H1, H2 of three taps
each, the inputs X0 to X4 of the phases (X3 and X4 are X0 and X1 one place later), and products that stand for
convolutions over m, the outputs of the phases need 6 of them instead of 9 (Karatsuba's way, Fan and Hasan,
doi:10.1109/TC.2007.1003):

    a = X1 (H0 + H1),  b = X2 (H0 + H2),  c = X3 (H1 + H2),
    Y0 = (X0 - X1 - X2) H0 + a + b,  Y1 = (X2 - X1 - X3) H1 + a + c,  Y2 = (X4 - X2 - X3) H2 + b + c.

Two neighboring outputs of each such convolution need 4 products instead of 6 (Winograd's F(2, 3), arXiv 1509.09308,
section 4.1). With its taps g0, g1, g2 and inputs d0 to d3,

    m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d1 - d3) g2,

and the outputs are m0 + m1 + m2 and m1 - m2 - m3. Channels add up in the products. All steps are sums of two or three
numbers, and so about as exact as the plain convolution.

The sequences lie behind each other, with zeros between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from d2v_fast.models.layers import multiply, weight_gradient
from d2v_fast.ops.autograd import is_transformed

# below this width, sums and calls cost more than the products save
_SMALL_WIDTH = 256
_TAPS, _TILE = 9, 6
# phases of the outputs to which each of the six convolutions adds; the kernels that it sums are those of these phases
_PHASES = ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))


def is_dense(x: Tensor, weight: Tensor) -> bool:
    """Return whether `convolve_dense` supports a convolution: fp32 on a CPU, many channels, no groups, nine taps.

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
    return taps == _TAPS and x.shape[2] == channels and min(weight.shape[:2]) >= _SMALL_WIDTH


def convolve_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve sequences with stride 1 and 4 zeros on each side.

    Args:
        x: fp32 `[R, T, C]` on a CPU.
        weight: `[O, C, 9]`.
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
        return _convolve(x, _planes(weight), bias)

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
        grad_weight = _weight_gradient(x, grad) if needs_weight else None
        grad_x = _convolve(grad, _planes(weight.flip(2)), None, transposed=True) if needs_x else None
        return grad_x, grad_weight, grad_bias


def _num_places(num_places: int) -> int:
    """Return the places from the start of a sequence to that of the next one: tiles, with zeros at the end."""
    return -(-(num_places + _TAPS // 2) // _TILE) * _TILE


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """Return the sequences `[R, T, C]` behind each other, `[before + 6 N + after, C]`, with zeros between them."""
    R, T, C = x.shape
    places = _num_places(T)
    padded = x.new_empty(before + R * places + after, C)
    padded[:before] = 0
    padded[before + R * places :] = 0
    inner = padded[before : before + R * places].view(R, places, C)
    inner[:, :T] = x
    inner[:, T:] = 0
    return padded


def _factors(x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield what the products multiply by kernels, `[N, C]`: for each convolution, m0 to m3, with their numbers."""
    padded = _padded(x, _TAPS // 2, _TAPS // 2)
    C, num_places = padded.shape[1], (len(padded) - _TAPS + 1) // 3
    x0, x1, x2, x3, x4 = (padded.as_strided((num_places + 2, C), (3 * C, 1), j * C) for j in range(5))
    sums = (lambda: x0 - x1 - x2, lambda: x2 - x1 - x3, lambda: x4 - x2 - x3, lambda: x1, lambda: x2, lambda: x3)
    for convolution, make in enumerate(sums):
        values = make()
        d0, d1, d2, d3 = (values[i : i + num_places : 2] for i in range(4))
        yield convolution, 0, d0 - d2
        yield convolution, 1, d1 + d2
        yield convolution, 2, d2 - d1
        yield convolution, 3, d1 - d3


def _planes(weight: Tensor) -> Tensor:
    """Return the taps `[9, O, C]` of `[O, C, 9]`; products of oneDNN need contiguous ones."""
    return weight.permute(2, 0, 1).contiguous()


def _kernels(planes: Tensor) -> list[list[Tensor]]:
    """Return what m0 to m3 multiply by, `[O, C]` each, for the kernels H0, H1, H2 of taps `[9, O, C]`."""
    kernels = []
    for j in range(3):
        g0, g1, g2 = planes[j], planes[3 + j], planes[6 + j]
        outer = g0 + g2
        kernels.append([g0, (outer + g1).div_(2), outer.sub_(g1).div_(2), g2])
    return kernels


def _summed(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or two tensors."""
    return values[0] if len(values) == 1 else values[0] + values[1]


def _convolve(x: Tensor, planes: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """Return `[R, T, O]` of `[R, T, C]` and taps `[9, O, C]`, or `[9, C, O]` if `transposed`."""
    R, T, _ = x.shape
    singles, places = _kernels(planes), _num_places(T)
    num_outputs = planes.shape[2 if transposed else 1]
    y = x.new_empty(R * places // _TILE, 2, 3, num_outputs)
    parts: list[Tensor] = []
    for convolution, product, factor in _factors(x):
        phases = _PHASES[convolution]
        kernel = _summed([singles[j][product] for j in phases])
        # once per output: m1 is in both of a pair, and each phase is in one of the first three convolutions
        shift = bias if len(phases) == 1 and product == 1 else None
        parts.append(multiply(factor, kernel.t() if transposed else kernel, shift))
        if product < 3:
            continue
        m0, m1, m2, m3 = parts
        parts = []
        if len(phases) == 1:
            torch.add(m0.add_(m1), m2, out=y[:, 0, phases[0]])
            torch.sub(m1.sub_(m2), m3, out=y[:, 1, phases[0]])
            continue
        even, odd = m0.add_(m1).add_(m2), m1.sub_(m2).sub_(m3)
        for phase in phases:
            y[:, 0, phase] += even
            y[:, 1, phase] += odd
    return y.view(R, places, num_outputs)[:, :T].contiguous()


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return `[O, C, 9]` of `[R, T, C]` and `[R, T, O]`."""
    # by phase and place of a pair, `[3, 2, N, O]`
    outputs = _padded(grad, 0, 0).view(-1, 2, 3, grad.shape[2]).permute(2, 1, 0, 3).contiguous()
    sums: list[list[Tensor]] = [[], [], []]
    for convolution, product, factor in _factors(x):
        phases = _PHASES[convolution]
        if product == 0:
            even, odd = _summed([outputs[j] for j in phases])
            wanted = [even, even + odd, even - odd, odd]
        gradient = weight_gradient(wanted[product], factor)
        for j in phases:
            # the first three convolutions have one phase each
            if convolution < 3:
                sums[j].append(gradient)
            else:
                sums[j][product] += gradient
    taps = x.new_empty(3, 3, grad.shape[2], x.shape[2])
    for j, (first, total, difference, last) in enumerate(sums):
        outer = torch.add(total, difference).div_(2)
        torch.add(first, outer, out=taps[0, j])
        torch.sub(total, difference, out=taps[1, j]).div_(2)
        torch.sub(outer, last, out=taps[2, j])
    return taps.flatten(0, 1).permute(1, 2, 0).contiguous()
