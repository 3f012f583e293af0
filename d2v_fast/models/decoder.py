"""The decoder of data2vec 2.0: convolutions over the encoder's output and noise (arXiv 2212.07525, section 3.2).

Shape letters: R rows (masked copies of samples), T places, V visible places of a row, N masked places of all rows,
D width of the encoder, C width of the decoder.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models.dense_convolution import convolve_dense, is_dense
from d2v_fast.models.layers import INIT_STD, Linear, dropout
from d2v_fast.models.post_norm import padding_of
from d2v_fast.models.sequence_convolution import convolve_sequence
from d2v_fast.models.visible import NORM_EPS, Places
from d2v_fast.ops import layer_norm_gelu
from d2v_fast.ops.attention import has_kernels
from d2v_fast.ops.autograd import is_transformed
from d2v_fast.ops.norm_gelu import layer_norm_gelu_backward, layer_norm_gelu_forward


class DecoderSizes(Protocol):
    """The fields of the section `decoder` that the decoder reads."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def kernel(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def residual(self) -> bool: ...
    @property
    def projection(self) -> int: ...
    @property
    def projection_ratio(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def noise_std(self) -> float: ...


class ConvDecoder(nn.Module):
    """Convolutions over all places, and a linear map at the masked ones.

    Args:
        width: D.
        config: sizes and rates.
        grid_size: places along each side of a square grid, whose convolutions are 2-D. None: a sequence, 1-D.

    Attributes:
        noise_std: standard deviation of the noise at masked places.
        convolutions: the convolutions, each followed by a norm without parameters and GELU.
        projection: the map to the encoder's width: a linear map, or two with a GELU between them.
    """

    ones: Tensor
    zeros: Tensor

    def __init__(self, width: int, config: DecoderSizes, grid_size: int | None = None) -> None:
        super().__init__()
        self.grid_size, self.dropout, self.noise_std = grid_size, config.dropout, config.noise_std
        self.residual, self.groups = config.residual, config.groups
        make = nn.Conv1d if grid_size is None else nn.Conv2d
        widths = [width] + [config.width] * config.depth
        self.convolutions = nn.ModuleList(
            make(before, after, config.kernel, padding=config.kernel // 2, groups=config.groups)
            for before, after in pairwise(widths)
        )
        self.projection: nn.Module = Linear(config.width, width)
        if config.projection == 2:
            hidden = int(config.width * config.projection_ratio)
            self.projection = nn.Sequential(Linear(config.width, hidden), nn.GELU(), Linear(hidden, width))
        # the operation wants a scale and a shift
        self.register_buffer("ones", torch.ones(config.width), persistent=False)
        self.register_buffer("zeros", torch.zeros(config.width), persistent=False)

    def init_normal_(self) -> ConvDecoder:
        """Initialize the linear maps as the published text decoder does: N(0, 0.02), zero bias. Return the decoder."""
        for layer in self.projection.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)
        return self

    def forward(self, encoded: Tensor, places: Places, noise: Tensor) -> Tensor:
        """Predict the masked places.

        Args:
            encoded: `[R, V, D]`, the encoder's output without class token.
            places: the visible and the masked places.
            noise: `[N, D]`, what stands at the masked places.

        Returns:
            `[N, D]`.
        """
        x = places.scatter(dropout(encoded, self.dropout, self.training), noise)
        is_padding = None if places.lengths is None else padding_of(places.lengths, places.num_places)[:, :, None]
        if self.grid_size is not None and self._recomputes(x):
            grid = _Grid(self.grid_size, self.groups)
            # by attribute, which ZeRO gathers
            parameters = [value for each in self.convolutions for value in (each.weight, each.bias)]
            x = _ResidualGrid.apply(x, grid, self.ones, self.zeros, *parameters)
            return self._project(x, places)
        for convolution in self.convolutions:
            y = layer_norm_gelu(self._convolve(convolution, x), self.ones, self.zeros, eps=NORM_EPS)
            x = x + y if self.residual and x.shape == y.shape else y
            if is_padding is not None:
                x = x.masked_fill(is_padding, 0)
        return self._project(x, places)

    def _project(self, x: Tensor, places: Places) -> Tensor:
        prediction: Tensor = self.projection(x.flatten(0, 1).index_select(0, places.rows))
        return prediction

    def _recomputes(self, x: Tensor) -> bool:
        """Return whether `_ResidualGrid` computes the convolutions: in training in fp32 on a CPU."""
        weights: list[Any] = [each.weight for each in self.convolutions]
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or is_transformed(x, *weights):
            return False
        if not self.residual or any(w.shape[0] != x.shape[2] or w.shape[2] % 2 == 0 for w in weights):
            return False
        on_cpu = x.device.type in ("cpu", "meta") and not has_kernels(x) and not torch.is_autocast_enabled("cpu")
        return on_cpu and torch.is_grad_enabled() and x.dtype == weights[0].dtype == torch.float32

    def _convolve(self, convolution: nn.Module, x: Tensor) -> Tensor:
        """Map `[R, T, C]` to `[R, T, C]`."""
        if self.grid_size is None:
            assert isinstance(convolution, nn.Conv1d)
            if is_dense(x, convolution.weight):
                return convolve_dense(x, convolution.weight, convolution.bias)
            return convolve_sequence(convolution, x)
        assert isinstance(convolution, nn.Conv2d)
        return _convolve_grid(x, convolution.weight, convolution.bias, _Grid(self.grid_size, self.groups))


class _Grid(NamedTuple):
    """Places along each side of the grid, and the groups of its convolutions."""

    size: int
    groups: int

    def image(self, x: Tensor) -> Tensor:
        """Return `[R, C, size, size]` of `[R, T, C]`."""
        return x.unflatten(1, (self.size, self.size)).permute(0, 3, 1, 2)


def _convolve_grid(x: Tensor, weight: Tensor, bias: Tensor | None, grid: _Grid) -> Tensor:
    y = F.conv2d(grid.image(x), weight, bias, padding=weight.shape[2] // 2, groups=grid.groups)
    # of an even kernel, the last row and column are left out, as in the published code
    return y[..., : grid.size, : grid.size].permute(0, 2, 3, 1).flatten(1, 2)


class _ResidualGrid(torch.autograd.Function):
    """Convolutions with residual connections, of which only the results of the convolutions are saved.

    The backward pass adds them up to the input of each convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: _Grid, ones: Tensor, zeros: Tensor, *parameters: Tensor) -> Tensor:
        ctx.grid, saved = grid, [x]
        for weight, bias in zip(parameters[0::2], parameters[1::2], strict=True):
            convolved = _convolve_grid(x, weight, bias, grid)
            y, mean, rstd = layer_norm_gelu_forward(convolved, ones, zeros, eps=NORM_EPS)
            x = y.add_(x)
            saved += [convolved, mean, rstd]
        ctx.num_saved = len(saved)
        ctx.save_for_backward(*saved, ones, zeros, *parameters)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, *saved = ctx.saved_tensors[: ctx.num_saved]
        ones, zeros, *parameters = ctx.saved_tensors[ctx.num_saved :]
        if torch.is_grad_enabled():
            return _differentiable(grad, first, ctx.grid, ones, zeros, parameters)
        convolved, means, rstds = saved[0::3], saved[1::3], saved[2::3]
        grads: list[Tensor | None] = []
        half = parameters[0].shape[2] // 2
        for i in reversed(range(len(convolved))):
            x = first.clone()
            for before in convolved[:i]:
                x += layer_norm_gelu(before, ones, zeros, eps=NORM_EPS)
            above, _, _ = layer_norm_gelu_backward(grad, convolved[i], ones, zeros, means[i], rstds[i])
            below, *of_parameters = torch.ops.aten.convolution_backward(
                ctx.grid.image(above), ctx.grid.image(x), parameters[2 * i], [above.shape[2]], [1, 1], [half, half],
                [1, 1], False, [0, 0], ctx.grid.groups, [True, True, True],
            )  # fmt: skip
            grad = below.permute(0, 2, 3, 1).flatten(1, 2) + grad
            grads = [*of_parameters, *grads]
        return grad, None, None, None, *grads


def _differentiable(
    grad: Tensor, x: Tensor, grid: _Grid, ones: Tensor, zeros: Tensor, parameters: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Compute gradients of `_ResidualGrid` that can be differentiated."""
    inputs = [x, *parameters]
    # views, since hooks on the tensors belong to the backward pass in progress
    views = [value.view_as(value) for value in inputs]
    y, *rest = views
    for weight, bias in zip(rest[0::2], rest[1::2], strict=True):
        y = y + layer_norm_gelu(_convolve_grid(y, weight, bias, grid), ones, zeros, eps=NORM_EPS)
    wanted = [value for value in views if value.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    of_x, *of_parameters = [next(found) if value.requires_grad else None for value in views]
    return of_x, None, None, None, *of_parameters
