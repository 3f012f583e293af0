"""The convolutions over a waveform, channels last from end to end: no transposes, no im2col.

Shape letters: B batch, N samples, T frames of a layer, C channels, R rows: frames of a layer, of all utterances.

A layer is a convolution without bias, layer norm over the channels and GELU (wav2vec 2.0, arXiv 2006.11477, section
2, with layer norm in every layer). Channels last, a convolution of kernel k and stride s is k / s matrix products,
rounded up: s neighbouring frames are one contiguous row of s * C numbers, and rows follow each other without a gap.
The utterances follow each other without a gap, too: each layer has s times the rows of the next one. For that, the
waveforms are filled up by less than one frame of the last layer; what comes of it, or of a window that reaches into the
next utterance, is past the end of its utterance in every layer, and is cut off at last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.layers import linear
from d2v_fast.ops.norm_gelu import (
    layer_norm_gelu,
    layer_norm_gelu_,
    layer_norm_gelu_backward_,
    layer_norm_gelu_forward,
)

# of a window: below, the few numbers are copied out, or every product would be too narrow
_COPIED_WINDOW = 64


class ConvStack(nn.Module):
    """Waveform to frames.

    Args:
        width: C, of all layers.
        kernels, strides: in frames of the layer's input, one per layer.
        recompute: keep only the outputs of the convolutions for the backward pass, and compute norm and GELU again. The
            first one's output is computed again in any case: of one channel, it costs less than to keep it.

    Attributes:
        compute_dtype: of weights and frames in a forward pass; None: what autocast says, or that of the weights.
    """

    def __init__(
        self, width: int, kernels: Sequence[int], strides: Sequence[int], *, recompute: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.strides, self.recompute, self.eps = tuple(strides), recompute, eps
        self.compute_dtype: torch.dtype | None = None
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
        x, num_frames = self._fill_up(waveforms.to(self._dtype()))
        x = x.reshape(-1, 1)
        first = x, self._cast(self.weights[0]), self.strides[0]
        if len(self.strides) == 1:
            frames = _Convolution.apply(*first)
        else:
            second = self.norm_weights[0], self.norm_biases[0], self._cast(self.weights[1]), self.strides[1]
            frames = _FirstTwoConvolutions.apply(*first, *second, self.eps, self.recompute)
        for index in range(2, len(self.strides)):
            frames = _NormGeluConvolution.apply(
                frames,
                self.norm_weights[index - 1],
                self.norm_biases[index - 1],
                self._cast(self.weights[index]),
                self.strides[index],
                self.eps,
                self.recompute,
            )
        y = layer_norm_gelu(frames, self.norm_weights[-1], self.norm_biases[-1], eps=self.eps)
        return y.view(len(waveforms), -1, y.shape[-1])[:, :num_frames]

    def _fill_up(self, waveforms: Tensor) -> tuple[Tensor, int]:
        """Waveforms of as many samples as make whole rows in every layer, and the number of frames at the end."""
        layers = [(weight.shape[1], stride) for weight, stride in zip(self.weights, self.strides, strict=True)]
        num_frames = waveforms.shape[1]
        for kernel, stride in layers:
            num_frames = _num_frames(num_frames, kernel, stride)
        # what the last layer's frames read, from layer to layer
        num_read = num_rows = num_frames
        samples = 1
        for kernel, stride in reversed(layers):
            num_read, samples = (num_read - 1) * stride + kernel, samples * stride
            num_rows = max(num_rows, -(-num_read // samples))
        return F.pad(waveforms, (0, num_rows * samples - waveforms.shape[1])), num_frames

    def _dtype(self) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        device_type = self.weights[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.weights[0].dtype

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype())


class _Convolution(torch.autograd.Function):
    """`[R * stride, C]` and a weight `[O, k, C]` to `[R, O]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _convolve_backward(grad.contiguous(), x, weight, ctx.stride, ctx.needs_input_grad[0])
        return grad_x, grad_weight, None


class _FirstTwoConvolutions(torch.autograd.Function):
    """The first convolution, layer norm and GELU in its place, and the next convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: int,
        norm_weight: Tensor,
        norm_bias: Tensor,
        next_weight: Tensor,
        next_stride: int,
        eps: float,
        lean: bool,
    ) -> Tensor:
        activated = _convolve(x, weight, stride)
        mean, rstd = layer_norm_gelu_(activated, norm_weight, norm_bias, eps=eps)
        ctx.strides, ctx.eps = (stride, next_stride), eps
        saved = x, weight, norm_weight, norm_bias, next_weight, mean, rstd, None if lean else activated
        ctx.save_for_backward(*saved)
        return _convolve(activated, next_weight, next_stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, next_weight, mean, rstd, activated = ctx.saved_tensors
        stride, next_stride = ctx.strides
        if activated is None:
            activated = _convolve(x, weight, stride)
            layer_norm_gelu_(activated, norm_weight, norm_bias, eps=ctx.eps)
        grad_frames, grad_next = _convolve_backward(grad.contiguous(), activated, next_weight, next_stride, True)
        del activated
        assert grad_frames is not None
        grad_norms = []
        for rows in _parts(len(grad_frames)):
            # with the samples that the last windows reach over
            end = rows.stop + -(-weight.shape[1] // stride) - 1
            frames = _convolve(x[rows.start * stride : end * stride], weight, stride)[: rows.stop - rows.start]
            part = grad_frames[rows], frames, norm_weight, norm_bias, mean[rows], rstd[rows]
            grad_norms.append(layer_norm_gelu_backward_(*part))
        grad_norm_weight, grad_norm_bias = (
            torch.stack(parts).sum(0, dtype=torch.float32).to(norm_weight.dtype)
            for parts in zip(*grad_norms, strict=True)
        )
        grad_x, grad_weight = _convolve_backward(grad_frames, x, weight, stride, ctx.needs_input_grad[0])
        return grad_x, grad_weight, None, grad_norm_weight, grad_norm_bias, grad_next, None, None, None


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd, activated = ctx.saved_tensors
        if activated is None:
            activated, _, _ = layer_norm_gelu_forward(x, norm_weight, norm_bias, eps=ctx.eps)
        grad_activated, grad_weight = _convolve_backward(grad.contiguous(), activated, weight, ctx.stride, True)
        del activated
        assert grad_activated is not None
        grads = layer_norm_gelu_backward_(grad_activated, x, norm_weight, norm_bias, mean, rstd)
        return grad_activated, *grads, grad_weight, None, None, None


def _num_frames(num_inputs: int, kernel: int, stride: int) -> int:
    if num_inputs < kernel:
        raise ValueError(
            f"`waveforms` must be longer: a convolution has {num_inputs} inputs, fewer than its {kernel} taps."
        )
    return (num_inputs - kernel) // stride + 1


def _parts(num_rows: int) -> Iterator[slice]:
    """A few parts of all rows: enough that what is computed for one needs little memory."""
    size = -(-num_rows // 8)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _windows(x: Tensor, kernel: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """The taps of a convolution, as many at a time as the stride: their columns in a weight, and a view of `x`.

    The view is `[R', number of them * C]`, R' being R less the last rows, whose windows end past the end of `x`.
    """
    num_inputs, C = x.shape
    for first in range(0, kernel, stride):
        num = min(stride, kernel - first)
        size = (max(0, (num_inputs - first - num) // stride + 1), num * C)
        yield slice(first * C, (first + num) * C), x.as_strided(size, (stride * C, 1), x.storage_offset() + first * C)


def _copied_windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """`[R, kernel * C]`."""
    C = x.shape[1]
    return F.pad(x.reshape(-1), (0, max(0, kernel - stride) * C)).unfold(0, kernel * C, stride * C)


def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out_width, kernel, C = weight.shape
    flat = weight.view(out_width, kernel * C)
    if kernel * C <= _COPIED_WINDOW:
        return F.linear(_copied_windows(x, kernel, stride), flat)
    windows = _windows(x, kernel, stride)
    columns, window = next(windows)
    out = linear(window, flat[:, columns], None)
    for columns, window in windows:
        out[: len(window)].addmm_(window, flat[:, columns].t())
    return out


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    out_width, kernel, C = weight.shape
    flat = weight.view(out_width, kernel * C)
    grad_x = _input_gradient(grad, flat, x.shape, kernel, stride) if needs_x else None
    if kernel * C <= _COPIED_WINDOW:
        # this way round: a product with few columns is slower than one with few rows
        grad_weight = (_copied_windows(x, kernel, stride).t() @ grad).t()
    else:
        grad_weight = torch.empty_like(flat)
        for columns, window in _windows(x, kernel, stride):
            torch.mm(grad[: len(window)].t(), window, out=grad_weight[:, columns])
    return grad_x, grad_weight.reshape(weight.shape)


def _input_gradient(grad: Tensor, flat: Tensor, shape: torch.Size, kernel: int, stride: int) -> Tensor:
    C = shape[1]
    if kernel < stride:
        grad_x = grad.new_zeros(shape)
    else:
        # every input is in a window of the first taps
        grad_x = linear(grad, flat[:, : stride * C].t(), None).view(shape)
    for columns, window in _windows(grad_x, kernel, stride):
        if columns.start > 0 or kernel < stride:
            window.addmm_(grad[: len(window)], flat[:, columns])
    return grad_x
