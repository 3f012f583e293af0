"""The decoder of data2vec 2.0: convolutions over the encoder's output and noise (arXiv 2212.07525, section 3.2).

Shape letters: R rows (masked copies of samples), T places, V visible places of a row, N masked places of all rows,
D width of the encoder, C width of the decoder.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from d2v_fast.models.dense_convolution import convolve_dense, is_dense
from d2v_fast.models.layers import INIT_STD, Linear, dropout
from d2v_fast.models.post_norm import padding_of
from d2v_fast.models.recomputed_sums import RecomputedSums
from d2v_fast.models.sequence_convolution import convolve_sequence
from d2v_fast.models.visible import NORM_EPS, Places
from d2v_fast.ops import layer_norm_gelu


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
        self.residual = config.residual
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
        inputs = RecomputedSums(x, partial(self._activate, is_padding=is_padding))
        del x
        for convolution in self.convolutions:
            with inputs.saving(convolution):
                result = self._convolve(convolution, inputs.x)
            inputs.step(result, is_added=self.residual and inputs.x.shape == result.shape)
            # the name would keep it alive during the next convolution
            del result
        rows = inputs.x.flatten(0, 1).index_select(0, places.rows)
        del inputs
        prediction: Tensor = self.projection(rows)
        return prediction

    def _activate(self, result: Tensor, is_padding: Tensor | None) -> Tensor:
        y = layer_norm_gelu(result, self.ones, self.zeros, eps=NORM_EPS)
        return y if is_padding is None else y.masked_fill(is_padding, 0)

    def _convolve(self, convolution: nn.Module, x: Tensor) -> Tensor:
        """Map `[R, T, C]` to `[R, T, C]`."""
        if self.grid_size is None:
            assert isinstance(convolution, nn.Conv1d)
            if is_dense(x, convolution.weight):
                return convolve_dense(x, convolution.weight, convolution.bias)
            return convolve_sequence(convolution, x)
        size = self.grid_size
        grid: Tensor = convolution(x.unflatten(1, (size, size)).permute(0, 3, 1, 2))
        # of an even kernel, the last row and column are left out, as in the published code
        return grid[..., :size, :size].permute(0, 2, 3, 1).flatten(1, 2)
