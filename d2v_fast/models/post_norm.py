"""Post-norm blocks, and attention within utterances or documents of unlike length: the speech and the text encoder's.

Shape letters: B batch, T tokens, D width, H heads, N rows, S segments.

    x = norm_1(x + dropout(attention(x)))
    f = mlp(x)
    x = norm_2(x + dropout(f))

The targets of data2vec are made of f, before dropout and residual (arXiv 2202.03555, section 3.3 and table 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.config import SpeechModelConfig, TextModelConfig
from d2v_fast.models.encoder import Encoder, EncoderOutput, random_keys
from d2v_fast.models.layers import INIT_STD, Linear, drop, dropout


class Segments(NamedTuple):
    """Which tokens attend to each other, where not all of a row do.

    Attributes:
        offsets: int32 `[S + 1]`, where the segments start in the row of all tokens, and its length.
        longest: no segment is longer; known without asking the device.
        samples: int64 `[N]`, the sample of every token of that row; None: unknown, and nothing is left out by sample.
    """

    offsets: Tensor
    longest: int
    samples: Tensor | None = None


# None: every token of a row attends to all of them. Tensor: bool `[B, 1, 1 or T, T]`, True where the key counts.
Attendable = Tensor | Segments | None


def attend(q: Tensor, k: Tensor, v: Tensor, attendable: Attendable, prob: float = 0.0) -> Tensor:
    """Scaled dot-product attention, `[B, H, T, D / H]` each.

    Args:
        attendable: see `Attendable`; with `Segments`, B is 1 and T the number of all tokens.
        prob: of dropping an attention weight.
    Returns:
        `[B, H, T, D / H]`. Where the mask lets a query see nothing, numbers without meaning.
    """
    if isinstance(attendable, Segments):
        return _attend_in_segments(q, k, v, attendable, prob)
    if q.device.type == "cpu" and prob > 0.0:
        # the kernel in tiles has no dropout on a CPU, and what torch falls back to draws 32 bits per weight
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1))
        if attendable is not None:
            logits.masked_fill_(~attendable, torch.finfo(logits.dtype).min)
        return torch.matmul(drop(logits.softmax(dim=-1), prob), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attendable, dropout_p=prob)


def _attend_in_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, prob: float) -> Tensor:
    on_packed = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and prob == 0.0
    if on_packed:
        from torch.nn.attention.varlen import varlen_attn

        # [1, H, N, D / H] to [N, H, D / H] and back
        queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        offsets, longest = segments.offsets, segments.longest
        attended = varlen_attn(queries, keys, values, offsets, offsets, longest, longest)
        assert isinstance(attended, Tensor)
        return attended.transpose(0, 1)[None]
    # without such a kernel: one after the other, and on a GPU the host waits for the lengths
    sizes = segments.offsets.diff().tolist()
    parts = zip(q.split(sizes, dim=2), k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True)
    return torch.cat([attend(*part, None, prob) for part in parts], dim=2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, queries, keys and values from one linear map with bias."""

    def __init__(self, width: int, heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.attention_dropout = attention_dropout
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, attendable: Attendable, rows: Tensor | None = None) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`, or to `[N, D]` with `rows`."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
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
        dropout, attention_dropout, activation_dropout: on the branches, the attention weights, inside the MLP.
        norm_eps: of both norms.
        layer_drop: probability with which a sample skips the block in training (arXiv 1909.11556).
    """

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
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Published initialization: N(0, 0.02), zero bias."""
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
        kept: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `encoder.Block`; with `rows`, nothing after the attention weights is computed for other tokens.

        A sample that skips the block keeps its residual stream, which is its feature, too. The block is computed and
        discarded with `rows`, of packed samples, whose tokens cannot be taken out without asking the device, and where
        no sample keeps it: fused attention may refuse a batch of nothing, and all parameters are to have a gradient.
        """
        if kept is None:
            return self._transform(x, attendable, rows)
        [samples] = kept
        # packed samples have a segment at least
        num_samples = len(attendable.offsets) - 1 if isinstance(attendable, Segments) else len(x)
        if len(samples) == num_samples:
            return self._transform(x, attendable, rows)
        if rows is None and not isinstance(attendable, Segments) and len(samples) > 0:
            if attendable is not None:
                attendable = attendable.index_select(0, samples)
            y, feature = self._transform(x.index_select(0, samples), attendable, None)
            return x.index_copy(0, samples, y.to(x.dtype)), x.index_copy(0, samples, feature.to(x.dtype))
        y, feature = self._transform(x, attendable, rows)
        skipped = x if rows is None else x.flatten(0, 1).index_select(0, rows)
        if len(samples) == 0:
            keeps = torch.zeros((), dtype=torch.bool, device=x.device)
        else:
            keeps = torch.zeros(num_samples, dtype=torch.bool, device=x.device).index_fill_(0, samples, True)
            keeps = keeps.index_select(0, _samples_of(x, attendable, rows))[:, None]
        return torch.where(keeps, y, skipped), torch.where(keeps, feature, skipped)

    def _transform(self, x: Tensor, attendable: Attendable, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        attended = self._drop(self.attention(x, attendable, rows))
        if rows is not None:
            x = x.flatten(0, 1).index_select(0, rows)
        x = self.norm1(x + attended)
        hidden = dropout(F.gelu(self.fc1(x)), self.activation_dropout, self.training)
        feature = self.fc2(hidden)
        return self.norm2(x + self._drop(feature)), feature

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


def _samples_of(x: Tensor, attendable: Attendable, rows: Tensor | None) -> Tensor:
    """The sample of each token, int64 `[N]`: of those at `rows`, or of all that are packed."""
    if isinstance(attendable, Segments):
        assert attendable.samples is not None
        return attendable.samples if rows is None else attendable.samples.index_select(0, rows)
    assert rows is not None
    return rows // x.shape[1]


def post_norm_encoder(config: SpeechModelConfig | TextModelConfig) -> Encoder:
    """The stack of post-norm blocks that a configuration describes."""
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
    """Bool `[B, T]`, True where a row of int64 `lengths` `[B]` has ended."""
    return torch.arange(num_tokens, device=lengths.device) >= lengths[:, None]


def encode_packed(
    encoder: Encoder,
    x: Tensor,
    segments: Segments,
    kept: Tensor | None,
    top_k: int,
    rows: Tensor | None,
    drop_keys: npt.NDArray[np.uint64] | None = None,
) -> EncoderOutput:
    """Run blocks on the tokens that are not padding, and lay their output out again.

    Args:
        encoder: of `PostNormBlock`.
        x: `[B, T, D]`.
        segments: of the kept tokens.
        kept: int64 `[M]`, flat indices `b * T + t` of the tokens that are not padding, ascending; None: all.
        top_k, rows, drop_keys: as for `Encoder`.
    Returns:
        As of `Encoder`, zero at padding.
    """
    B, T, D = x.shape
    if encoder.drops_samples:
        drop_keys = random_keys(B) if drop_keys is None else drop_keys
        places = torch.arange(B * T, device=x.device) if kept is None else kept
        segments = segments._replace(samples=places // T)
    if kept is None:
        output = encoder(x.reshape(1, B * T, D), segments, top_k, rows, drop_keys)
    else:
        if rows is not None:
            # where a token is among those that are kept
            places = kept.new_empty(B * T).index_copy_(0, kept, torch.arange(len(kept), device=kept.device))
            rows = places.index_select(0, rows)
        output = encoder(x.flatten(0, 1).index_select(0, kept)[None], segments, top_k, rows, drop_keys)

    def unpack(y: Tensor) -> Tensor:
        if y.dim() == 2:
            return y
        if kept is None:
            return y.view(B, T, D)
        return y.new_zeros(B * T, D).index_copy(0, kept, y[0]).view(B, T, D)

    return EncoderOutput(unpack(output.last_hidden), [unpack(feature) for feature in output.features])
