"""Pre-norm blocks with LayerScale, stochastic depth and an attention bias (shared or per block), for images.

Shape letters: B batch, T tokens, D width, H heads, N rows.

Architecture and initialization follow the BEiT-style code behind data2vec's published vision results
(arXiv 2202.03555, section 4.1):

    x = x + drop_path(gamma_1 * attention(norm_1(x)))
    x = x + drop_path(gamma_2 * mlp(norm_2(x)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models import xformers_attention
from d2v_fast.models.encoder import Kept
from d2v_fast.models.layers import Linear, drop, init_linear_, linear, truncated_normal_
from d2v_fast.ops import attention_with_bias
from d2v_fast.ops.attention import has_kernels


class PreNormSizes(Protocol):
    """The fields of a model's configuration that describe a stack of pre-norm blocks."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    drop_path: float
    attention_dropout: float
    dropout: float
    layer_scale: float
    norm_eps: float
    position_bias: Literal["shared", "per_block"]
    attention: Literal["stock", "fused", "xformers"]

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        ...


class RelativePositionBias(nn.Module):
    """Learned attention bias for every offset between two patches of a square grid.

    The table has one row per offset and three rows for the class token (to a patch, from a patch, to itself).

    Args:
        grid_size: G, patches along one side. The bias covers `T = 1 + G * G` tokens, class token first.
        num_heads: H.
    """

    index: Tensor

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_tokens = 1 + grid_size * grid_size
        self.table = nn.Parameter(torch.empty((2 * grid_size - 1) ** 2 + 3, num_heads))
        # memory-efficient attention requires mask rows aligned to 8 elements: pad once here and cut by a view,
        # instead of a padded copy in every block
        padding = -self.num_tokens % 8
        index = F.pad(relative_position_index(grid_size), (0, padding))
        self.register_buffer("index", index.flatten(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set to zero: attention starts without position information."""
        nn.init.zeros_(self.table)

    def forward(self) -> Tensor:
        """Return the bias `[1, H, T, T]` in the dtype of attention, with rows aligned to 8 elements."""
        num_heads = self.table.shape[1]
        # gather by head, which gives the result's layout
        bias = self.table.t().index_select(1, self.index).view(1, num_heads, self.num_tokens, -1)
        device_type = self.table.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            # otherwise autocast casts the mask, and loses its alignment, in every block
            bias = bias.to(torch.get_autocast_dtype(device_type))
        return bias[..., : self.num_tokens]


def relative_position_index(grid_size: int) -> Tensor:
    """Return the row of the bias table for every (query, key) pair: int64 `[T, T]`, `T = 1 + grid_size ** 2`.

    The table is row-major over the offset `query - key` in rows and columns of the grid, each from
    `1 - grid_size` to `grid_size - 1`; its last three rows are class token to patch, patch to class token,
    class token to itself.
    """
    side = 2 * grid_size - 1
    position = torch.arange(grid_size * grid_size)
    row, column = position // grid_size, position % grid_size
    row_offset = row[:, None] - row[None, :] + grid_size - 1
    column_offset = column[:, None] - column[None, :] + grid_size - 1

    index = torch.empty(1 + len(position), 1 + len(position), dtype=torch.int64)
    index[1:, 1:] = row_offset * side + column_offset
    index[0, 1:] = side * side
    index[1:, 0] = side * side + 1
    index[0, 0] = side * side + 2
    return index


class QKVProjection(nn.Module):
    """Linear map to queries, keys and values, with a bias for queries and values only.

    A bias on the keys would shift all logits of a query by the same amount, which softmax ignores.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        truncated_normal_(self.weight)
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, 3 * D]`: queries, keys, values."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return linear(x, self.weight, bias)


def attention_with_bias_gradient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """Compute attention if `scaled_dot_product_attention` has no kernel with a gradient for the bias, as on a CPU.

    Its own fallback is slower, because it also looks for rows that are masked entirely.

    Args:
        q, k, v: `[B, H, T, D / H]`.
        bias: `[1, H, T, T]`, added to the scaled logits.
        dropout: probability of dropping an attention weight.

    Returns:
        `[B, H, T, D / H]`.
    """
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
    # in place: the product's backward pass does not read it
    weights = logits.add_(bias).softmax(dim=-1)
    return torch.matmul(drop(weights, dropout) if dropout > 0.0 else weights, v)


class Attention(nn.Module):
    """Multi-head self-attention with an additive bias on the logits."""

    def __init__(self, config: PreNormSizes) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.attention_dropout = config.attention_dropout
        self.kind = config.attention
        self.qkv = QKVProjection(config.width)
        self.proj = Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attention_bias: Tensor) -> Tensor:
        """Attend within each sample.

        Args:
            x: `[B, T, D]`.
            attention_bias: `[1, H, T, T]`, added to the scaled logits, in the dtype of the queries.
        """
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        dropout = self.attention_dropout if self.training else 0.0
        if self.kind == "fused" and has_kernels(x):
            attended = attention_with_bias(q, k, v, attention_bias, dropout=dropout)
        elif self.kind == "xformers" and xformers_attention.is_usable(x):
            attended = xformers_attention.attend_with_bias(q, k, v, attention_bias, dropout)
        elif x.device.type == "cpu" and attention_bias.requires_grad:
            attended = attention_with_bias_gradient(q, k, v, attention_bias, dropout)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias, dropout_p=dropout)
        return self.dropout(self.proj(attended.transpose(1, 2).reshape(B, T, D)))


class MLP(nn.Module):
    """Two linear maps with an exact (erf) GELU between them, and dropout after the second."""

    def __init__(self, config: PreNormSizes) -> None:
        super().__init__()
        hidden_width = int(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden_width)
        self.fc2 = Linear(hidden_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return self.dropout(self.fc2(F.gelu(self.fc1(x))))


class PreNormBlock(nn.Module):
    """One pre-norm block.

    Args:
        config: sizes and rates of the encoder.
        index: position in the stack, from 0, which sets the drop-path rate and the scale of the output weights.
    """

    keeps_fixed_counts = True

    def __init__(self, config: PreNormSizes, index: int) -> None:
        super().__init__()
        self.index = index
        self.layer_scale = config.layer_scale
        self.drop_path = config.drop_path * index / max(1, config.depth - 1)
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        own = config.position_bias == "per_block"
        self.position_bias = RelativePositionBias(config.grid_size, config.heads) if own else None
        self.attention = Attention(config)
        self.gamma1 = nn.Parameter(torch.empty(config.width))
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.gamma2 = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the published initialization: deeper blocks add less to the residual stream."""
        self.attention.qkv.reset_parameters()
        for layer in (self.attention.proj, self.mlp.fc1, self.mlp.fc2):
            init_linear_(layer)
        with torch.no_grad():
            for layer in (self.attention.proj, self.mlp.fc2):
                layer.weight /= math.sqrt(2 * (self.index + 1))
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()
        for gamma in (self.gamma1, self.gamma2):
            nn.init.constant_(gamma, self.layer_scale)

    @property
    def drop_rates(self) -> tuple[float, float]:
        """See `encoder.Block`: the rates of the two branches."""
        return self.drop_path, self.drop_path

    def forward(
        self,
        x: Tensor,
        attention_bias: Tensor | None,
        rows: Tensor | None = None,
        active: Sequence[Tensor | Kept | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `encoder.Block`: attend, then apply the MLP. The feature is the residual stream.

        Args:
            x: `[B, T, D]`.
            attention_bias: `[1, H, T, T]`, or None if the block has its own.
            rows: int64 `[N]`, the only tokens on which the MLP runs.
            active: the samples that compute the attention, and those that compute the MLP.
        """
        B, T, D = x.shape
        bias = self.position_bias() if self.position_bias is not None else attention_bias
        attending, transformed = (None, None) if active is None else active
        x = self._add_branch(x, lambda part: self.attention(self.norm1(part), bias), self.gamma1, attending)
        if rows is None:
            x = self._add_branch(x, lambda part: self.mlp(self.norm2(part)), self.gamma2, transformed)
            return x, x
        x = x.reshape(B * T, D).index_select(0, rows)
        scale: Tensor = self.gamma2
        if transformed is not None:
            samples, share = self._kept(transformed)
            is_kept = samples.to(x.dtype)
            if samples.dtype != torch.bool:
                is_kept = x.new_zeros(B).index_fill_(0, samples, 1.0)
            of_sample = is_kept * (1.0 / share)
            scale = scale * of_sample.index_select(0, rows // T)[:, None]
        x = torch.addcmul(x, self.mlp(self.norm2(x)), scale)
        return x, x

    def _add_branch(
        self, x: Tensor, branch: Callable[[Tensor], Tensor], gamma: Tensor, active: Tensor | Kept | None
    ) -> Tensor:
        """Return `x + drop_path(gamma * branch(x))`, with the branch computed for the `active` samples only."""
        if active is None:
            return torch.addcmul(x, branch(x), gamma)
        samples, share = self._kept(active)
        scale = gamma / share
        if samples.dtype == torch.bool:
            return torch.addcmul(x, branch(x), scale * samples[:, None, None])
        if len(samples) == 0:
            # fused attention may refuse an empty batch: compute one sample, scaled by zero
            samples, scale = samples.new_zeros(1), scale * 0.0
        return x.index_add(0, samples, branch(x.index_select(0, samples)) * scale)

    def _kept(self, active: Tensor | Kept) -> tuple[Tensor, float | Tensor]:
        return active if isinstance(active, Kept) else (active, 1.0 - self.drop_path)
