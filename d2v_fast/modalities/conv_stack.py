"""The convolutions over a waveform, channels last from end to end: no transposes, no im2col.

Shape letters: B batch, N samples, T frames of a layer, C channels.

A layer is a convolution without bias, layer norm over the channels and GELU (wav2vec 2.0, arXiv 2006.11477, section
2, with layer norm in every layer). Channels last, a convolution of kernel k and stride s is k / s matrix products,
rounded up: s neighbouring frames are one contiguous row of s * C numbers, and rows follow each other without a gap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.ops.norm_gelu import layer_norm_gelu, layer_norm_gelu_backward, layer_norm_gelu_forward

# of a window: below, the few numbers are copied out, or every product would be too narrow
_COPIED_WINDOW = 64


class ConvStack(nn.Module):
    """Waveform to frames.

    Args:
        width: C, of all layers.
        kernels, strides: in frames of the layer's input, one per layer.
        recompute: keep only the outputs of the convolutions for the backward pass, and compute norm and GELU again.
    """

    def __init__(
        self, width: int, kernels: Sequence[int], strides: Sequence[int], *, recompute: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.strides, self.recompute, self.eps = tuple(strides), recompute, eps
        in_widths = [1] + [width] * (len(kernels) - 1)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(width, kernel, in_width))
            for kernel, in_width in zip(kernels, in_widths, strict=True)
        )
        self.norm_weights = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in kernels)
        self.norm_biases = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in kernels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialisation: Kaiming normal over the inputs of a window."""
        for weight, norm_weight, norm_bias in zip(self.weights, self.norm_weights, self.norm_biases, strict=True):
            fan_in = weight.shape[1] * weight.shape[2]
            nn.init.normal_(weight, std=(2.0 / fan_in) ** 0.5)
            nn.init.ones_(norm_weight)
            nn.init.zeros_(norm_bias)

    def forward(self, waveforms: Tensor) -> Tensor:
        """`[B, N]` to `[B, T, C]`.

        Raises:
            ValueError: the waveforms are too short for one frame.
        """
        x = waveforms[:, :, None].to(self._dtype())
        frames = _Convolution.apply(x, self._cast(self.weights[0]), self.strides[0])
        for index in range(1, len(self.strides)):
            frames = _NormGeluConvolution.apply(
                frames,
                self.norm_weights[index - 1],
                self.norm_biases[index - 1],
                self._cast(self.weights[index]),
                self.strides[index],
                self.eps,
                self.recompute,
            )
        return layer_norm_gelu(frames, self.norm_weights[-1], self.norm_biases[-1], eps=self.eps)

    def _dtype(self) -> torch.dtype:
        device_type = self.weights[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.weights[0].dtype

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype())


class _Convolution(torch.autograd.Function):
    """`[B, T, C]` and a weight `[O, k, C]` to `[B, T', O]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _convolve_backward(grad.contiguous(), x, weight, ctx.stride, ctx.needs_input_grad[0])
        return grad_x, grad_weight, None


class _NormGeluConvolution(torch.autograd.Function):
    """Layer norm, GELU and the next convolution. Between the two, nothing needs to be kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, stride: int, eps: float, lean: bool
    ) -> Tensor:
        activated, mean, rstd = layer_norm_gelu_forward(x, norm_weight, norm_bias, eps=eps)
        ctx.stride, ctx.eps = stride, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd, None if lean else activated)
        return _convolve(activated, weight, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd, activated = ctx.saved_tensors
        if activated is None:
            activated, _, _ = layer_norm_gelu_forward(x, norm_weight, norm_bias, eps=ctx.eps)
        grad_activated, grad_weight = _convolve_backward(grad.contiguous(), activated, weight, ctx.stride, True)
        del activated
        assert grad_activated is not None
        grads = layer_norm_gelu_backward(grad_activated, x, norm_weight, norm_bias, mean, rstd)
        return *grads, grad_weight, None, None, None


def _num_frames(num_inputs: int, kernel: int, stride: int) -> int:
    if num_inputs < kernel:
        raise ValueError(
            f"`waveforms` must be longer: a convolution has {num_inputs} inputs, fewer than its {kernel} taps."
        )
    return (num_inputs - kernel) // stride + 1


def _windows(x: Tensor, kernel: int, stride: int, num_frames: int) -> Iterator[tuple[int, int, Tensor]]:
    """The taps of a convolution, a few at a time: first, number, and `[B, T', number * C]`, a view of `x`."""
    B, T, C = x.shape
    for first in range(0, kernel, stride):
        num = min(stride, kernel - first)
        offset = x.storage_offset() + first * C
        yield first, num, x.as_strided((B, num_frames, num * C), (T * C, stride * C, 1), offset)


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out_width, kernel, C = weight.shape
    num_frames = _num_frames(x.shape[1], kernel, stride)
    x = x.contiguous()
    flat = weight.view(out_width, kernel * C)
    if kernel * C <= _COPIED_WINDOW:
        return x.view(len(x), -1).unfold(1, kernel * C, stride * C) @ flat.t()
    out = x.new_empty(len(x), num_frames, out_width)
    for first, num, window in _windows(x, kernel, stride, num_frames):
        _multiply(out, window, flat[:, first * C : (first + num) * C].t(), add=first > 0)
    return out


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    out_width, kernel, C = weight.shape
    num_frames = grad.shape[1]
    x = x.contiguous()
    flat = weight.view(out_width, kernel * C)
    grad_x = None
    if needs_x:
        grad_x = torch.empty_like(x)
        # every input is in a window of the first taps, but for these
        grad_x[:, num_frames * stride :] = 0
        if kernel < stride:
            grad_x.zero_()
        for first, num, window in _windows(grad_x, kernel, stride, num_frames):
            _multiply(window, grad, flat[:, first * C : (first + num) * C], add=first > 0)
    if kernel * C <= _COPIED_WINDOW:
        copied = x.view(len(x), -1).unfold(1, kernel * C, stride * C).reshape(-1, kernel * C)
        return grad_x, (grad.reshape(-1, out_width).t() @ copied).view_as(weight)
    grad_weight = torch.empty_like(flat)
    for first, num, window in _windows(x, kernel, stride, num_frames):
        part = grad_weight[:, first * C : (first + num) * C]
        for sample in range(len(x)):
            part.addmm_(grad[sample].t(), window[sample], beta=0 if sample == 0 else 1)
    return grad_x, grad_weight.view_as(weight)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`out[i] = a[i] @ b`, or added to it. `out` may be a view with gaps between its rows."""
    beta = 1 if add else 0
    if out.device.type == "cpu":
        # a batch of products with gaps would be computed by a slow loop
        for sample in range(len(out)):
            out[sample].addmm_(a[sample], b, beta=beta)
    else:
        torch.baddbmm(out, a, b.expand(len(a), -1, -1), beta=beta, out=out)
