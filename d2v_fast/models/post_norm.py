"""Post-norm blocks and attention within segments of different lengths, for the speech and the text encoder.

Shape letters: B batch, T tokens, D width, H heads, N rows, S segments.

    x = norm_1(x + dropout(attention(x)))
    f = mlp(x)
    x = norm_2(x + dropout(f))

The targets of data2vec are computed from f, before dropout and residual (arXiv 2202.03555, section 3.3 and table 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models import xformers_attention
from d2v_fast.models.encoder import Drops, Encoder, EncoderOutput, Kept, random_keys
from d2v_fast.models.layers import INIT_STD, GeluLinear, Linear, drop, dropout
from d2v_fast.ops import attention_with_alibi


class PostNormSizes(Protocol):
    """The fields of a model's configuration that describe a stack of post-norm blocks."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layer_drop: float
    norm_eps: float
    gradient_checkpointing: bool


class Segments(NamedTuple):
    """Segments of packed tokens; tokens attend to each other within a segment.

    Attributes:
        offsets: int32 `[S + 1]`, start of each segment among the packed tokens, and the number of tokens.
        longest: upper bound of a segment's length, known on the host.
        samples: int64 `[N]`, the sample of every packed token, required if samples skip blocks.
        mask: that of `xformers_attention.block_diagonal`, made once for all blocks. `None` uses PyTorch's attention.
    """

    offsets: Tensor
    longest: int
    samples: Tensor | None = None
    mask: Any = None

    @classmethod
    def of(cls, offsets: Tensor, longest: int, by_xformers: bool) -> Segments:
        """Return segments for PyTorch's attention, or for that of xformers where it can run."""
        by_xformers = by_xformers and xformers_attention.is_usable(offsets)
        return cls(offsets, longest, mask=xformers_attention.block_diagonal(offsets) if by_xformers else None)


class AlibiPlaces(NamedTuple):
    """Places of tokens, from which attention computes the bias of ALiBi.

    Attributes:
        slopes: fp32 `[H]`, with the learned scale.
        places: int64 `[B, T]`. `None` means 0 to T - 1.
        lengths: int64 `[B]`, tokens of each sample before its padding. `None` means T.
    """

    slopes: Tensor
    places: Tensor | None
    lengths: Tensor | None

    def index_select(self, dim: int, samples: Tensor) -> AlibiPlaces:
        """Return the places of some samples, int64 `[S]`."""
        places, lengths = (None if x is None else x.index_select(dim, samples) for x in self[1:])
        return AlibiPlaces(self.slopes, places, lengths)


# None: tokens attend to all tokens of their sample. Tensor: bool `[B, 1, 1 or T, T]`, True for keys to attend to, or a
# bias that is added to the logits, `[B, H, T, T]`.
Attendable = Tensor | Segments | AlibiPlaces | None


def attend(q: Tensor, k: Tensor, v: Tensor, attendable: Attendable, prob: float = 0.0) -> Tensor:
    """Compute scaled dot-product attention.

    Args:
        q, k, v: `[B, H, T, D / H]`.
        attendable: see `Attendable`. With `Segments`, B is 1 and T the number of packed tokens.
        prob: probability of dropping an attention weight.

    Returns:
        `[B, H, T, D / H]`, undefined for queries without a key to attend to.
    """
    if isinstance(attendable, Segments):
        return _attend_in_segments(q, k, v, attendable, prob)
    if isinstance(attendable, AlibiPlaces):
        slopes, places, lengths = attendable
        return attention_with_alibi(q, k, v, slopes, positions=places, lengths=lengths, dropout=prob)
    is_mask = attendable is None or attendable.dtype == torch.bool
    if q.device.type == "cpu" and prob > 0.0 and is_mask:
        # torch's CPU kernel has no dropout, and its fallback is slow
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        if attendable is not None:
            logits.masked_fill_(~attendable, torch.finfo(logits.dtype).min)
        return torch.matmul(drop(logits.softmax(dim=-1), prob), v)
    mask = attendable if attendable is None or is_mask else attendable.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=prob)


def _attend_in_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, prob: float) -> Tensor:
    if segments.mask is not None:
        return xformers_attention.attend_packed(q, k, v, segments.mask, prob)
    on_packed = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and prob == 0.0
    if on_packed:
        from torch.nn.attention.varlen import varlen_attn

        # [1, H, N, D / H] to [N, H, D / H] and back
        queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        offsets, longest = segments.offsets, segments.longest
        attended = varlen_attn(queries, keys, values, offsets, offsets, longest, longest)
        assert isinstance(attended, Tensor)
        return attended.transpose(0, 1)[None]
    # without that kernel: segment by segment; on a GPU the host waits for the lengths
    sizes = segments.offsets.diff().tolist()
    parts = zip(q.split(sizes, dim=2), k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    return torch.cat([attend(*part, None, prob) for part in parts], dim=2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one linear map, with bias, for queries, keys and values."""

    def __init__(self, width: int, heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, attendable: Attendable, rows: Tensor | None = None) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`, or to `[N, D]` at `rows`."""
        B, T, D = x.shape
        # the gradient of `unbind` is in the layout of the product, without another copy
        parts = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        attended = attend(q, k, v, attendable, self.attention_dropout if self.training else 0.0)
        attended = attended.transpose(1, 2).reshape(B, T, D)
        if rows is not None:
            attended = attended.flatten(0, 1).index_select(0, rows)
        projected: Tensor = self.proj(attended)
        return projected


class PostNormBlock(nn.Module):
    """One post-norm block.

    Args:
        width, heads: D and H.
        hidden_width: of the MLP.
        dropout, attention_dropout, activation_dropout: rates on the branches, on the attention weights, in the MLP.
        norm_eps: of both norms.
        layer_drop: probability that a sample skips the block in training (arXiv 1909.11556).
    """

    # few samples skip a block, so that a fixed number of them would often be none
    keeps_fixed_counts = False
    norm_class: type[nn.LayerNorm] = nn.LayerNorm

    def __init__(
        self,
        width: int,
        heads: int,
        hidden_width: int,
        *,
        dropout: float,
        attention_dropout: float,
        activation_dropout: float,
        norm_eps: float,
        layer_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_rates = (layer_drop,)
        self.dropout, self.activation_dropout = dropout, activation_dropout
        self.attention = SelfAttention(width, heads, attention_dropout)
        self.norm1 = self.norm_class(width, eps=norm_eps)
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = GeluLinear(hidden_width, width) if activation_dropout == 0.0 else Linear(hidden_width, width)
        self.norm2 = self.norm_class(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the published initialization: N(0, 0.02), zero bias."""
        for linear in (self.attention.qkv, self.attention.proj, self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)
        for norm in (self.norm1, self.norm2):
            norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        attendable: Attendable,
        rows: Tensor | None = None,
        active: Sequence[Tensor | Kept | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `encoder.Block`. With `rows`, only these tokens are computed after the attention weights.

        The residual stream of a sample that skips the block is its output and its feature. Skipping saves computation
        unless `rows` are given, samples are packed (their tokens cannot be removed without waiting for the device) or
        all samples skip (attention kernels may refuse an empty batch, and all parameters need a gradient).
        """
        [part] = [None] if active is None else active
        if part is None:
            return self._transform(x, attendable, rows)
        samples = part.samples if isinstance(part, Kept) else part
        if samples.dtype == torch.bool:
            return self._selected(x, attendable, rows, samples)
        # a packed sample has at least one segment
        num_samples = len(attendable.offsets) - 1 if isinstance(attendable, Segments) else len(x)
        if len(samples) == num_samples:
            return self._transform(x, attendable, rows)
        if rows is None and not isinstance(attendable, Segments) and len(samples) > 0:
            if attendable is not None:
                attendable = attendable.index_select(0, samples)
            y, feature = self._transform(x.index_select(0, samples), attendable, None)
            return x.index_copy(0, samples, y.to(x.dtype)), x.index_copy(0, samples, feature.to(x.dtype))
        keeps = torch.zeros(num_samples, dtype=torch.bool, device=x.device)
        return self._selected(x, attendable, rows, keeps.index_fill_(0, samples, True))

    def _selected(self, x: Tensor, attendable: Attendable, rows: Tensor | None, keeps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the block for all samples, and select the result of those that `keeps`, bool `[B]`, names."""
        y, feature = self._transform(x, attendable, rows)
        if rows is None and not isinstance(attendable, Segments):
            keeps, skipped = keeps[:, None, None], x
        else:
            keeps = keeps.index_select(0, _samples_of(x, attendable, rows))[:, None]
            skipped = x if rows is None else x.flatten(0, 1).index_select(0, rows)
        return torch.where(keeps, y, skipped), torch.where(keeps, feature, skipped)

    def _transform(self, x: Tensor, attendable: Attendable, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        attended = self._drop(self.attention(x, attendable, rows))
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        x = self.norm1(x + attended)
        hidden = self.fc1(x)
        if not isinstance(self.fc2, GeluLinear):
            hidden = dropout(F.gelu(hidden), self.activation_dropout, self.training)
        feature = self.fc2(hidden)
        return self.norm2(x + self._drop(feature)), feature

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


def _samples_of(x: Tensor, attendable: Attendable, rows: Tensor | None) -> Tensor:
    """Return the sample of each token at `rows`, or of each packed token, int64 `[N]`."""
    if isinstance(attendable, Segments):
        assert attendable.samples is not None
        return attendable.samples if rows is None else attendable.samples.index_select(0, rows)
    assert rows is not None
    return rows // x.shape[1]


def post_norm_encoder(config: PostNormSizes) -> Encoder:
    """Build the stack of post-norm blocks of a configuration."""
    blocks = (
        PostNormBlock(
            config.width,
            config.heads,
            int(config.width * config.mlp_ratio),
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
            norm_eps=config.norm_eps,
            layer_drop=config.layer_drop,
        )
        for _ in range(config.depth)
    )
    return Encoder(blocks, gradient_checkpointing=config.gradient_checkpointing)


def padding_of(lengths: Tensor, num_tokens: int) -> Tensor:
    """Return bool `[B, T]`, True for padding: positions from `lengths`, int64 `[B]`, on."""
    return torch.arange(num_tokens, device=lengths.device) >= lengths[:, None]


def clear_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return `x` with 0 at padding.

    Args:
        x: `[B, T, D]`; padding may hold any value.
        lengths: int64 `[B]`, places of each sample before its padding; None means T.
    """
    return x if lengths is None else x.masked_fill(padding_of(lengths, x.shape[1])[:, :, None], 0.0)


def mean_of_places(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the mean of each sample over its places before the padding, `[B, D]`.

    Args:
        x, lengths: See `clear_padding`.
    """
    return x.mean(1) if lengths is None else clear_padding(x, lengths).sum(1) / lengths[:, None].to(x.dtype)


def encode_packed(
    encoder: Encoder,
    x: Tensor,
    segments: Segments,
    unpadded: Tensor | None,
    top_k: int,
    rows: Tensor | None,
    drop_keys: Drops = None,
) -> EncoderOutput:
    """Pack the tokens that are not padding, run the blocks, and unpack the output.

    Args:
        encoder: a stack of `PostNormBlock`.
        x: `[B, T, D]`.
        segments: segments of the packed tokens.
        unpadded: int64 `[M]`, flat indices `b * T + t` of the tokens that are not padding, ascending. `None` means all.
        top_k, rows, drop_keys: see `Encoder`.

    Returns:
        The output of `Encoder`, zero at padding.
    """
    B, T, D = x.shape
    if encoder.drops_samples:
        drop_keys = random_keys(B) if drop_keys is None else drop_keys
        places = torch.arange(B * T, device=x.device) if unpadded is None else unpadded
        segments = segments._replace(samples=places // T)
    if unpadded is None:
        output = encoder(x.reshape(1, B * T, D), segments, top_k, rows, drop_keys)
    else:
        if rows is not None:
            # position of each token among the packed ones
            places = unpadded.new_empty(B * T).index_copy_(
                0, unpadded, torch.arange(len(unpadded), device=unpadded.device)
            )
            rows = places.index_select(0, rows)
        output = encoder(x.flatten(0, 1).index_select(0, unpadded)[None], segments, top_k, rows, drop_keys)

    def unpack(y: Tensor) -> Tensor:
        if y.dim() == 2:
            return y
        if unpadded is None:
            return y.view(B, T, D)
        return y.new_zeros(B * T, D).index_copy(0, unpadded, y[0]).view(B, T, D)

    return EncoderOutput(unpack(output.last_hidden), [unpack(feature) for feature in output.features])
