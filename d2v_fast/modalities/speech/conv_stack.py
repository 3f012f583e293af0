"""Convolutions over a waveform in channels-last layout, without transposes, and without im2col after the first.

Shape letters: B batch, N samples, T frames of a layer, C channels, R rows of an utterance.

A layer is a convolution without bias, layer norm over the channels and GELU (wav2vec 2.0, arXiv 2006.11477, section
2, with layer norm in every layer). Channels last, a convolution of kernel k and stride s is k / s matrix products,
rounded up: s neighboring frames are one contiguous row of s * C numbers, and rows follow each other without a gap.
The utterances follow each other without a gap, too: each layer has s times the rows of the next one. For that, the
waveforms are filled up by little more than a frame of the last layer. What comes of it, or of a window that reaches
into the next utterance, is past what the next layers read, is set to zero, and is cut off at last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models.layers import linear
from d2v_fast.ops.autograd import is_transformed, once_differentiable
from d2v_fast.ops.norm_gelu import layer_norm_gelu, layer_norm_gelu_, layer_norm_gelu_backward_, layer_norm_gelu_forward

P = ParamSpec("P")
T = TypeVar("T")

_NO_SECOND_DERIVATIVE = (
    "the gradient of `ConvStack` has no derivative; under `torch.func`, as in `torch.func.hessian`, it has derivatives "
    "of any order."
)
# windows with fewer numbers are copied, since the products would be too narrow
_SMALL_WINDOW = 64


class ConvStack(nn.Module):
    """Map a waveform to frames.

    Args:
        width: C, of all layers.
        kernels, strides: in frames of the layer's input, one per layer.
        recompute: save only the outputs of the convolutions, and recompute norm and GELU in the backward pass. The
            first of several convolutions is always recomputed: with one input channel, that costs less than saving.

    Attributes:
        compute_dtype: Dtype of the forward pass on a device without autocast, such as `meta`. None: autocast's dtype,
            or that of the weights.
    """

    compute_dtype: torch.dtype | None = None

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
        """Apply the published initialization: Kaiming normal over the inputs of a window."""
        for weight, norm_weight, norm_bias in zip(self.weights, self.norm_weights, self.norm_biases, strict=True):
            fan_in = weight.shape[1] * weight.shape[2]
            nn.init.normal_(weight, std=(2.0 / fan_in) ** 0.5)
            nn.init.ones_(norm_weight)
            nn.init.zeros_(norm_bias)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Map `[B, N]` to `[B, T, C]`.

        Raises:
            ValueError: the waveforms are too short for one frame, or have another shape.
        """
        if waveforms.dim() != 2:
            raise ValueError(f"`waveforms` must have shape [B, N], but has {tuple(waveforms.shape)} instead.")
        if not torch.compiler.is_compiling() and is_transformed(waveforms, *self.parameters()):
            return self._composed(waveforms)
        if self._dtype() == torch.float64:
            return self._composed(waveforms)
        filled, rows = self._fill_up(waveforms.to(self._dtype()))
        first = filled.reshape(-1, 1), self._cast(self.weights[0]), self.strides[0], rows[0]
        if len(rows) == 1:
            frames = _Convolution.apply(*first)
        else:
            second = self.norm_weights[0], self.norm_biases[0], self._cast(self.weights[1]), self.strides[1], rows[1]
            frames = _FirstTwoConvolutions.apply(*first, *second, self.eps, self.recompute)
        for index in range(2, len(rows)):
            frames = _NormGeluConvolution.apply(
                frames,
                self.norm_weights[index - 1],
                self.norm_biases[index - 1],
                self._cast(self.weights[index]),
                self.strides[index],
                rows[index],
                self.eps,
                self.recompute,
            )
        y = layer_norm_gelu(frames, self.norm_weights[-1], self.norm_biases[-1], eps=self.eps)
        return y.view(filled.shape[0], rows[-1].num, y.shape[-1])[:, : rows[-1].num_read]

    def _composed(self, waveforms: Tensor) -> Tensor:
        """Run ``forward`` with PyTorch's own convolutions, for forward mode, ``torch.func`` and fp64."""
        x = waveforms.to(self._dtype())[..., None]
        for weight, norm_weight, norm_bias, stride in zip(
            self.weights, self.norm_weights, self.norm_biases, self.strides, strict=True
        ):
            _num_frames(x.shape[1], weight.shape[1], stride)
            frames = F.conv1d(x.transpose(1, 2), self._cast(weight).transpose(1, 2), stride=stride).transpose(1, 2)
            x = layer_norm_gelu(frames, norm_weight, norm_bias, eps=self.eps)
        return x

    def _fill_up(self, waveforms: Tensor) -> tuple[Tensor, list[_Rows]]:
        """Pad waveforms so that every layer has whole rows; return them and the rows of every layer's output."""
        layers = [(weight.shape[1], stride) for weight, stride in zip(self.weights, self.strides, strict=True)]
        num_frames = waveforms.shape[1]
        for kernel, stride in layers:
            num_frames = _num_frames(num_frames, kernel, stride)
        # from the last layer's output backward
        num_read, ratios = [num_frames], [1]
        for kernel, stride in reversed(layers):
            num_read.append((num_read[-1] - 1) * stride + kernel)
            ratios.append(ratios[-1] * stride)
        num_rows = max(-(-num // ratio) for num, ratio in zip(num_read, ratios, strict=True))
        *rows, (num_samples, _) = (_Rows(num_rows * ratio, num) for num, ratio in zip(num_read, ratios, strict=True))
        return F.pad(waveforms, (0, num_samples - waveforms.shape[1])), rows[::-1]

    def _dtype(self) -> torch.dtype:
        if self.compute_dtype is not None:
            return self.compute_dtype
        device_type = self.weights[0].device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.weights[0].dtype

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype())


class _Rows(NamedTuple):
    """Rows of an utterance in a layer's output, and how many of them the next layers read."""

    num: int
    num_read: int

    def clear(self, frames: Tensor) -> Tensor:
        """Set the unread rows to zero: a NaN in them, even times zero, would reach gradients of read rows."""
        frames.view(frames.shape[0] // self.num, self.num, frames.shape[1])[:, self.num_read :] = 0
        return frames


class _Convolution(torch.autograd.Function):
    """Map `[B * R * stride, C]` to `[B * R, O]` by a weight `[O, k, C]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, rows: _Rows) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return rows.clear(_convolve(x, weight, stride))

    @staticmethod
    @once_differentiable(_NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = _convolve_backward(grad.contiguous(), x, weight, ctx.stride, ctx.needs_input_grad[0])
        return grad_x, grad_weight, None, None


class _FirstTwoConvolutions(torch.autograd.Function):
    """The first convolution, layer norm and GELU in place, and the next convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: int,
        rows: _Rows,
        norm_weight: Tensor,
        norm_bias: Tensor,
        next_weight: Tensor,
        next_stride: int,
        next_rows: _Rows,
        eps: float,
        lean: bool,
    ) -> Tensor:
        activated = rows.clear(_convolve(x, weight, stride))
        mean, rstd = layer_norm_gelu_(activated, norm_weight, norm_bias, eps=eps)
        ctx.strides, ctx.rows, ctx.eps = (stride, next_stride), rows, eps
        saved = x, weight, norm_weight, norm_bias, next_weight, mean, rstd, None if lean else activated
        ctx.save_for_backward(*saved)
        return next_rows.clear(_convolve(activated, next_weight, next_stride))

    @staticmethod
    @once_differentiable(_NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, next_weight, mean, rstd, activated = ctx.saved_tensors
        stride, next_stride = ctx.strides
        if activated is None:
            activated = ctx.rows.clear(_convolve(x, weight, stride))
            layer_norm_gelu_(activated, norm_weight, norm_bias, eps=ctx.eps)
        grad_frames, grad_next = _convolve_backward(grad.contiguous(), activated, next_weight, next_stride, True)
        del activated
        assert grad_frames is not None
        norm = norm_weight.float(), norm_bias.float()
        grad_norms = []
        # a few utterances at a time, since their frames are recomputed into new memory
        size = max(1, len(grad_frames) // ctx.rows.num // 8) * ctx.rows.num
        parts = zip(*(whole.split(size) for whole in (grad_frames, mean, rstd)), x.split(size * stride), strict=True)
        for grad_part, *statistics, samples in parts:
            frames = ctx.rows.clear(_convolve(samples, weight, stride))
            grad_norms.append(layer_norm_gelu_backward_(grad_part, frames, *norm, *statistics))
        grad_norm_weight, grad_norm_bias = (
            torch.stack(grads).sum(0).to(norm_weight.dtype) for grads in zip(*grad_norms, strict=True)
        )
        grad_x, grad_weight = _convolve_backward(grad_frames, x, weight, stride, ctx.needs_input_grad[0])
        return grad_x, grad_weight, None, None, grad_norm_weight, grad_norm_bias, grad_next, *[None] * 4


class _NormGeluConvolution(torch.autograd.Function):
    """Layer norm, GELU and the next convolution, without saving tensors in between if `lean`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        stride: int,
        rows: _Rows,
        eps: float,
        lean: bool,
    ) -> Tensor:
        activated, mean, rstd = layer_norm_gelu_forward(x, norm_weight, norm_bias, eps=eps)
        ctx.stride, ctx.eps = stride, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd, None if lean else activated)
        return rows.clear(_convolve(activated, weight, stride))

    @staticmethod
    @once_differentiable(_NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd, activated = ctx.saved_tensors
        if activated is None:
            activated, _, _ = layer_norm_gelu_forward(x, norm_weight, norm_bias, eps=ctx.eps)
        grad_activated, grad_weight = _convolve_backward(grad.contiguous(), activated, weight, ctx.stride, True)
        del activated
        assert grad_activated is not None
        grads = layer_norm_gelu_backward_(grad_activated, x, norm_weight, norm_bias, mean, rstd)
        return grad_activated, *grads, grad_weight, None, None, None, None


def _num_frames(num_inputs: int, kernel: int, stride: int) -> int:
    if num_inputs < kernel:
        raise ValueError(
            f"`waveforms` must be longer: a convolution has {num_inputs} inputs, fewer than its {kernel} taps."
        )
    return (num_inputs - kernel) // stride + 1


def _windows(x: Tensor, kernel: int, stride: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the taps of a convolution in groups of `stride`: their columns in a weight, and a view of `x`.

    The view is `[M, number of them * C]`, without the last rows, whose windows end past the end of `x`.
    """
    num_inputs, C = x.shape
    for first in range(0, kernel, stride):
        num = min(stride, kernel - first)
        size = (max(0, (num_inputs - first - num) // stride + 1), num * C)
        yield slice(first * C, (first + num) * C), x.as_strided(size, (stride * C, 1), x.storage_offset() + first * C)


def _copied_windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Return the windows as a copy `[B * R, kernel * C]`."""
    C = x.shape[1]
    overlap = max(0, kernel - stride) * C
    if len(x) == 0:
        return x.new_empty(0, kernel * C)
    return F.pad(x.reshape(-1), (0, overlap)).unfold(0, kernel * C, stride * C)


def _without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Disable autocast, which may be active in the backward pass even if it was not in the forward pass."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        x = args[0]
        assert isinstance(x, Tensor)
        if not torch.amp.is_autocast_available(x.device.type):
            return function(*args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_without_autocast
def _convolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    out_width, kernel, C = weight.shape
    flat = weight.view(out_width, kernel * C)
    if kernel * C <= _SMALL_WINDOW:
        return F.linear(_copied_windows(x, kernel, stride), flat)
    windows = _windows(x, kernel, stride)
    columns, window = next(windows)
    out = linear(window, flat[:, columns], None)
    for columns, window in windows:
        out[: len(window)].addmm_(window, flat[:, columns].t())
    return out


@_without_autocast
def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    out_width, kernel, C = weight.shape
    flat = weight.view(out_width, kernel * C)
    grad_x = _input_gradient(grad, flat, x.shape, kernel, stride) if needs_x else None
    if kernel * C <= _SMALL_WINDOW:
        # transposed, because a product with few columns is slower than one with few rows
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
        # the windows of the first taps cover every input
        grad_x = linear(grad, flat[:, : stride * C].t(), None).view(shape)
    for columns, window in _windows(grad_x, kernel, stride):
        if columns.start > 0 or kernel < stride:
            window.addmm_(grad[: len(window)], flat[:, columns])
    return grad_x
