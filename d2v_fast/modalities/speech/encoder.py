"""The speech encoder: convolutions over the waveform, convolutional positions, post-norm blocks.

Shape letters: B batch, N samples, T frames, D width, M masked rows.

The published data2vec audio model (arXiv 2202.03555, section 4.2). The convolutions are trained with the student, and
the teacher uses them unchanged; the teacher averages the layers after them.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.config import SpeechModelConfig
from d2v_fast.modalities.speech.conv_stack import ConvStack
from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.layers import Linear, dropout
from d2v_fast.models.post_norm import Attendable, Segments, encode_packed, padding_of, post_norm_encoder
from d2v_fast.models.student import MaskedBatch, Student, masked_places


class FrontEndSizes(Protocol):
    """The fields of a model's configuration that describe the convolutions over the waveform."""

    @property
    def width(self) -> int: ...
    @property
    def conv_width(self) -> int: ...
    @property
    def conv_kernels(self) -> tuple[int, ...]: ...
    @property
    def conv_strides(self) -> tuple[int, ...]: ...
    @property
    def front_end_checkpointing(self) -> bool: ...


class PositionSizes(Protocol):
    """The fields of a model's configuration that describe the positional convolutions."""

    @property
    def width(self) -> int: ...
    @property
    def position_depth(self) -> int: ...
    @property
    def position_kernel(self) -> int: ...
    @property
    def position_groups(self) -> int: ...


class FrontEnd(nn.Module):
    """Map a waveform to frames of the encoder's width; holds the mask token, if there is one.

    Args:
        config: sizes.
        has_mask_token: whether masked frames are replaced by a learned one.
        norm_eps: added to the variance in the norm before the projection.
    Attributes:
        holds_convolutions: whether the convolutions are left as they are, without gradient.
    """

    def __init__(self, config: FrontEndSizes, *, has_mask_token: bool = True, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.convolutions = ConvStack(
            config.conv_width, config.conv_kernels, config.conv_strides, recompute=config.front_end_checkpointing
        )
        self.norm = nn.LayerNorm(config.conv_width, eps=norm_eps)
        self.projection = Linear(config.conv_width, config.width)
        self.mask_token = nn.Parameter(torch.empty(config.width)) if has_mask_token else None
        self.holds_convolutions = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Apply the published initialization: mask token uniform in [0, 1), otherwise PyTorch's defaults."""
        if self.mask_token is not None:
            nn.init.uniform_(self.mask_token)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Map `[B, N]` to `[B, T, D]`."""
        with torch.no_grad() if self.holds_convolutions else nullcontext():
            convolved = self.convolutions(waveforms)
        frames: Tensor = self.projection(self.norm(convolved))
        return frames

    def masked(self, batch: MaskedBatch, input_dropout: float = 0.0) -> Tensor:
        """Return the frames `[B, T, D]` of a batch for fine-tuning, with its masks, which are drawn in training only.

        Masked frames are the mask token, or 0 in an encoder that has none; masked channels are 0.

        Args:
            batch: `rows` are the masked frames, and `channel_rows` the masked channels.
            input_dropout: dropout of the frames before masking.
        """
        frames = dropout(self(batch.inputs), input_dropout, self.training)
        B, _, D = frames.shape
        if len(batch.rows):
            token = frames.new_zeros(D) if self.mask_token is None else self.mask_token.to(frames.dtype)
            places = token.expand(len(batch.rows), -1)
            frames = frames.flatten(0, 1).index_copy(0, batch.rows, places).view_as(frames)
        if batch.channel_rows is not None:
            kept = frames.new_ones(B * D).index_fill(0, batch.channel_rows, 0.0)
            frames = frames * kept.view(B, 1, D)
        return frames


class ConvPositions(nn.Module):
    """Positional embedding of frames: grouped convolutions, each with a norm without parameters and GELU."""

    def __init__(self, config: PositionSizes) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(
                config.width,
                config.width,
                config.position_kernel,
                padding=config.position_kernel // 2,
                groups=config.position_groups,
            )
            for _ in range(config.position_depth)
        )

    def forward(self, frames: Tensor, is_padding: Tensor | None) -> Tensor:
        """Return `[B, T, D]` to add to frames `[B, T, D]`.

        Args:
            frames: `[B, T, D]`.
            is_padding: bool `[B, T, 1]`. Padding is zero for every convolution. The public code zeroes it for the
                first one only, so that the end of an utterance depends on its padding.
        """
        x = frames
        for convolution in self.convolutions:
            if is_padding is not None:
                x = x.masked_fill(is_padding, 0)
            # an even kernel makes one frame too many
            x = convolution(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
            x = F.gelu(F.layer_norm(x, x.shape[-1:]))
        return x


class SpeechContext(nn.Module):
    """Positions, norm and blocks.

    Args:
        config: sizes and rates.
        own_positions: whether this module adds the positions, or the frames already include them.
    """

    def __init__(self, config: SpeechModelConfig, own_positions: bool) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.packs = config.attention != "padded"
        self.by_xformers = config.attention == "xformers"
        self.positions = ConvPositions(config) if own_positions else None
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.encoder = post_norm_encoder(config)

    def forward(
        self,
        frames: Tensor,
        lengths: Tensor | None = None,
        unpadded: Tensor | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
        output_rows: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode frames.

        Args:
            frames: `[B, T, D]`, masked or not.
            lengths: int64 `[B]`, frames of each utterance before its padding. `None` means T.
            unpadded: int64 `[M]`, flat indices `b * T + t` of the frames that are not padding, ascending, for packed
                attention.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' features to return.
            output_rows: int64 `[N]`, flat indices of the only frames that the last block computes.

        Returns:
            `last_hidden` `[B, T, D]` and K features of that shape; with `output_rows`, `last_hidden` and the last
            feature are `[N, D]`. They are undefined at padding.
        """
        T = frames.shape[1]
        # the student's frames may have another dtype than the teacher
        x = frames = frames.to(self.norm.weight.dtype)
        is_padding = None if lengths is None else padding_of(lengths, T)
        if self.positions is not None:
            x = x + self.positions(frames, None if is_padding is None else is_padding[:, :, None])
        x = dropout(self.norm(x), self.dropout, self.training)
        if lengths is None or unpadded is None or not self.packs:
            attendable: Attendable = None if is_padding is None else ~is_padding[:, None, None, :]
            padded: EncoderOutput = self.encoder(x, attendable, top_k, output_rows, drop_keys)
            return padded
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return encode_packed(
            self.encoder, x, Segments.of(offsets, T, self.by_xformers), unpadded, top_k, output_rows, drop_keys
        )


@dataclass(frozen=True)
class EmbeddedFrames:
    """Input of `SpeechContext`.

    Attributes:
        frames: `[B, T, D]`.
        lengths, unpadded, drop_keys: as for `SpeechContext`.
    """

    frames: Tensor
    lengths: Tensor | None
    unpadded: Tensor | None
    drop_keys: Drops = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.frames)

    @property
    def num_places(self) -> int:
        """T."""
        return self.frames.shape[1]

    def run(self, averaged: nn.Module, top_k: int = 0, output_rows: Tensor | None = None) -> EncoderOutput:
        """See `Embedded`."""
        output: EncoderOutput = averaged(
            self.frames, self.lengths, self.unpadded, self.drop_keys, top_k=top_k, output_rows=output_rows
        )
        return output


class SpeechModel(Student):
    """The speech encoder. The teacher shares the convolutions and, depending on the configuration, the positions.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    averaged_name = "context"
    entrance_name = "front_end"

    def __init__(self, config: SpeechModelConfig) -> None:
        super().__init__()
        self.width, self.input_dropout = config.width, config.input_dropout
        self.front_end = FrontEnd(config, norm_eps=config.norm_eps)
        shares_positions = config.position_in_teacher == "shared"
        self.positions = ConvPositions(config) if shares_positions else None
        self.context = SpeechContext(config, own_positions=not shares_positions)

    def forward(
        self, waveforms: Tensor, lengths: Tensor | None = None, unpadded: Tensor | None = None, top_k: int = 0
    ) -> EncoderOutput:
        """Encode unmasked utterances.

        Args:
            waveforms: `[B, N]`, each normalized to zero mean and unit variance and padded with zeros.
            lengths, unpadded, top_k: see `SpeechContext`.
        """
        frames = self._with_positions(self.front_end(waveforms), lengths)
        output: EncoderOutput = self.context(frames, lengths, unpadded, top_k=top_k)
        return output

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`."""
        output: EncoderOutput = self(inputs, lengths, top_k=top_k)
        return output.features

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`; with the batch's masks of frames and channels."""
        frames = self._with_positions(self.front_end.masked(batch, self.input_dropout), batch.lengths)
        return EmbeddedFrames(frames, batch.lengths, batch.unpadded, batch.drop_keys).run(self.context).last_hidden

    def hold_entrance(self) -> tuple[str, ...]:
        """See `Student`: the convolutions over the waveform, as published."""
        self.front_end.holds_convolutions = True
        return ("front_end.convolutions.",)

    def embed(self, batch: MaskedBatch) -> tuple[EmbeddedFrames, EmbeddedFrames]:
        """See `Student`."""
        frames = self.front_end(batch.inputs)
        with torch.no_grad():
            unmasked = self._with_positions(frames, batch.lengths).detach()
        masked = dropout(frames, self.input_dropout, self.training).flatten(0, 1)
        assert self.front_end.mask_token is not None
        token = self.front_end.mask_token.to(masked.dtype)
        if batch.num_rows is None:
            masked = masked.index_copy(0, batch.rows, token.expand(len(batch.rows), -1))
        else:
            masked = torch.where(masked_places(batch.rows, batch.num_rows, len(masked))[:, None], token, masked)
        masked = masked.view_as(frames)
        masked = self._with_positions(masked, batch.lengths)
        student = EmbeddedFrames(masked, batch.lengths, batch.unpadded, batch.drop_keys)
        return student, EmbeddedFrames(unmasked, batch.lengths, batch.unpadded)

    def imitate_autocast(self, dtype: torch.dtype) -> None:
        """See `Student`."""
        self.front_end.convolutions.compute_dtype = dtype

    def make_head(self) -> Linear:
        """See `Student`; with PyTorch's initialization."""
        return Linear(self.width, self.width)

    def _with_positions(self, frames: Tensor, lengths: Tensor | None) -> Tensor:
        if self.positions is None:
            return frames
        is_padding = None if lengths is None else padding_of(lengths, frames.shape[1])[:, :, None]
        return frames + self.positions(frames, is_padding)
