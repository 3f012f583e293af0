"""The text encoder: token and position embeddings, a norm, post-norm blocks.

Shape letters: B batch, T tokens, D width, M unpadded tokens.

The published data2vec text model (arXiv 2202.03555, section 4.3), with the architecture of RoBERTa. The embeddings are
trained with the student, and the teacher uses them unchanged; the teacher averages the blocks. It reads the whole text,
as in the paper. The public code instead shows it the original masked tokens and padding everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.config import TextModelConfig
from d2v_fast.modalities.text.config import POSITION_OFFSET
from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.layers import INIT_STD, Linear, dropout
from d2v_fast.models.post_norm import Attendable, Segments, encode_packed, padding_of, post_norm_encoder
from d2v_fast.models.student import MaskedBatch, Student


class EmbeddingSizes(Protocol):
    """The fields of a model's configuration that describe the embeddings."""

    @property
    def width(self) -> int: ...
    @property
    def dropout(self) -> float: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def token_std(self) -> float: ...
    @property
    def position_rows(self) -> int: ...
    @property
    def token_rows(self) -> int: ...
    @property
    def padding_row(self) -> int: ...


class TextEmbedding(nn.Module):
    """Normalized sum of token and position embeddings.

    Args:
        config: sizes and the rate of dropout.
        norm_eps: added to the variance.
    """

    def __init__(self, config: EmbeddingSizes, norm_eps: float) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.max_positions, self.token_std = config.max_positions, config.token_std
        self.token = nn.Embedding(config.token_rows, config.width, padding_idx=config.padding_row)
        self.position = nn.Parameter(torch.empty(config.position_rows, config.width))
        self.norm = nn.LayerNorm(config.width, eps=norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw tokens from N(0, `token_std`) and positions from N(0, 0.02); padding's are zero."""
        nn.init.normal_(self.token.weight, std=self.token_std)
        nn.init.normal_(self.position, std=INIT_STD)
        with torch.no_grad():
            self.token.weight[self.token.padding_idx].zero_()
            self.position[POSITION_OFFSET - 1].zero_()

    def forward(self, tokens: Tensor, drops: bool = True) -> Tensor:
        """Embed tokens.

        Args:
            tokens: int64 `[B, T]`.
            drops: whether to apply dropout in training.

        Returns:
            `[B, T, D]`.

        Raises:
            ValueError: there are more tokens than positions.
        """
        T = tokens.shape[1]
        if self.max_positions < T:
            raise ValueError(f"`tokens` must be [B, T] with T <= {self.max_positions}, but T is {T} instead.")
        positions = self.position[POSITION_OFFSET : POSITION_OFFSET + T]
        return dropout(self.norm(self.token(tokens) + positions), self.dropout, self.training and drops)


class TextContext(nn.Module):
    """The stack of blocks, with attention within samples or documents."""

    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        self.packs = config.attention != "padded"
        self.by_xformers = config.attention == "xformers"
        self.encoder = post_norm_encoder(config)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        unpadded: Tensor | None = None,
        offsets: Tensor | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
        output_rows: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode embedded tokens.

        Args:
            x: `[B, T, D]`.
            lengths: int64 `[B]`, tokens of each sample before its padding. `None` means T.
            unpadded: int64 `[M]`, flat indices `b * T + t` of the tokens that are not padding, ascending. `None` means
                all.
            offsets: int32 `[S + 1]`, start of each document among the unpadded tokens, and the number of these tokens.
                Tokens attend to each other within a document, or within a sample if `offsets` is None.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' features to return.
            output_rows: int64 `[N]`, flat indices of the only tokens that the last block computes.

        Returns:
            `last_hidden` `[B, T, D]` and K features of that shape; with `output_rows`, `last_hidden` and the last
            feature are `[N, D]`. They are undefined at padding.
        """
        B, T, _ = x.shape
        # the student's embeddings may have another dtype than the teacher
        x = x.to(next(self.parameters()).dtype)
        if self.packs and (offsets is not None or unpadded is not None):
            if offsets is None:
                assert lengths is not None
                offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            return encode_packed(
                self.encoder, x, Segments.of(offsets, T, self.by_xformers), unpadded, top_k, output_rows, drop_keys
            )
        attendable: Attendable = None
        if offsets is not None:
            attendable = _same_document(offsets, unpadded, B, T)
        elif lengths is not None:
            attendable = ~padding_of(lengths, T)[:, None, None, :]
        output: EncoderOutput = self.encoder(x, attendable, top_k, output_rows, drop_keys)
        return output


@dataclass(frozen=True)
class EmbeddedTokens:
    """Input of `TextContext`.

    Attributes:
        tokens: `[B, T, D]`.
        lengths, unpadded, offsets, drop_keys: as for `TextContext`.
    """

    tokens: Tensor
    lengths: Tensor | None
    unpadded: Tensor | None
    offsets: Tensor | None
    drop_keys: Drops = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.tokens)

    @property
    def num_places(self) -> int:
        """T."""
        return self.tokens.shape[1]

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`."""
        structure = self.lengths, self.unpadded, self.offsets, self.drop_keys
        output: EncoderOutput = averaged(self.tokens, *structure, top_k=top_k, output_rows=output_rows)
        return output


class TextModel(Student):
    """The text encoder. The teacher shares the embeddings.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    averaged_name = "context"
    entrance_name = "embedding"

    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        self.width = config.width
        self.embedding = TextEmbedding(config, config.norm_eps)
        self.context = TextContext(config)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        unpadded: Tensor | None = None,
        offsets: Tensor | None = None,
        top_k: int = 0,
    ) -> EncoderOutput:
        """Encode tokens, masked or not.

        Args:
            tokens: int64 `[B, T]`.
            lengths, unpadded, offsets, top_k: see `TextContext`.
        """
        output: EncoderOutput = self.context(self.embedding(tokens), lengths, unpadded, offsets, top_k=top_k)
        return output

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`."""
        output: EncoderOutput = self(inputs, lengths, top_k=top_k)
        return output.features

    def embed(self, batch: MaskedBatch) -> tuple[EmbeddedTokens, EmbeddedTokens]:
        """See `Student`. The batch has the masked tokens; the teacher's input has no dropout."""
        assert batch.masked_inputs is not None
        structure = batch.lengths, batch.unpadded, batch.offsets
        with torch.no_grad():
            unmasked = self.embedding(batch.inputs, drops=False)
        masked = EmbeddedTokens(self.embedding(batch.masked_inputs), *structure, batch.drop_keys)
        return masked, EmbeddedTokens(unmasked, *structure)

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`."""
        places = batch.lengths, batch.unpadded, batch.offsets
        output: EncoderOutput = self.context(self.embedding(batch.inputs), *places, batch.drop_keys)
        return output.last_hidden

    def make_head(self) -> nn.Module:
        """See `Student`; two linear layers with a GELU."""
        wide, narrow = Linear(self.width, 2 * self.width), Linear(2 * self.width, self.width)
        for linear in (wide, narrow):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)
        return nn.Sequential(wide, nn.GELU(), narrow)


def _same_document(offsets: Tensor, unpadded: Tensor | None, num_samples: int, num_tokens: int) -> Tensor:
    """Return bool `[B, 1, T, T]`, True for tokens of the same document; each padding token is a document of its own."""
    total = num_samples * num_tokens
    document = -1 - torch.arange(total, device=offsets.device)
    places = torch.arange(total if unpadded is None else len(unpadded), device=offsets.device)
    ids = torch.searchsorted(offsets.to(torch.int64), places, right=True)
    document = ids if unpadded is None else document.index_copy(0, unpadded, ids)
    document = document.view(num_samples, num_tokens)
    return (document[:, :, None] == document[:, None, :])[:, None]
