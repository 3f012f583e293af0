"""The speech encoder of data2vec 2.0: convolutions over the waveform, convolutional positions, post-norm blocks, ALiBi.

Shape letters: B samples, N samples of a waveform, T frames, R rows (masked copies of samples), V visible frames of a
row, D width.

The convolutions over the waveform are trained with the student, and the teacher uses them unchanged; it averages the
positions and all that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2v_fast.config import MaskedSpeechModelConfig
from d2v_fast.modalities.speech.encoder import ConvPositions, FrontEnd
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.post_norm import AlibiPlaces, padding_of
from d2v_fast.models.sequence_convolution import convolve_sequence
from d2v_fast.models.student import MaskedBatch, Student
from d2v_fast.models.visible import NORM_EPS, Alibi, MaskedContext, MaskedSequences, Places, biased, key_mask
from d2v_fast.ops import layer_norm_gelu


class FusedPositions(ConvPositions):
    """`ConvPositions` with norm and GELU in one operation, and channels last throughout."""

    ones: Tensor
    zeros: Tensor

    def __init__(self, config: MaskedSpeechModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("ones", torch.ones(config.width), persistent=False)
        self.register_buffer("zeros", torch.zeros(config.width), persistent=False)

    def forward(self, frames: Tensor, is_padding: Tensor | None) -> Tensor:
        """See `ConvPositions`."""
        x = frames
        for convolution in self.convolutions:
            if is_padding is not None:
                x = x.masked_fill(is_padding, 0)
            x = layer_norm_gelu(convolve_sequence(convolution, x), self.ones, self.zeros, eps=NORM_EPS)
        return x


class MaskedSpeechContext(MaskedContext):
    """Positions, norm, dropout and blocks with ALiBi.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: MaskedSpeechModelConfig) -> None:
        super().__init__(config, has_norm=True)
        self.positions = FusedPositions(config)
        self.alibi = Alibi(config.heads)
        self.is_fused = config.attention == "fused"

    def forward(
        self,
        frames: Tensor,
        lengths: Tensor | None = None,
        places: Places | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
    ) -> EncoderOutput:
        """Encode frames.

        Args:
            frames: `[B, T, D]`.
            lengths: int64 `[B]`, frames of each utterance before its padding. `None` means T.
            places: visible and masked frames of every row. `None`: all are visible, and R is B.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' features to return.

        Returns:
            `last_hidden` and K features, each `[R, V, D]`, undefined at padding.
        """
        T = frames.shape[1]
        # the student's frames may have another dtype than the teacher
        frames = frames.to(self.alibi.scale.dtype)
        if places is None:
            is_padding = None if lengths is None else padding_of(lengths, T)[:, :, None]
            x = frames + self.positions(frames, is_padding)
            return self.encode(x, self._attendable(x, None, lengths), top_k, drop_keys)
        visible = places.gather(frames)
        is_padding = None if places.lengths is None else padding_of(places.lengths, T)[:, :, None]
        positions = self.positions(places.scatter(visible), is_padding)
        R, V, D = visible.shape
        # padding reads the last frame
        taken = places.visible.flatten().clamp_max(R * T - 1)
        x = visible + positions.flatten(0, 1).index_select(0, taken).view(R, V, D)
        attendable = self._attendable(x, places.visible % T, places.visible_lengths)
        return self.encode(x, attendable, top_k, drop_keys)

    def _attendable(self, x: Tensor, places: Tensor | None, lengths: Tensor | None) -> Tensor | AlibiPlaces:
        """Return the bias of tokens `[R, V, D]` at `places`, or what attention computes it from."""
        if self.alibi.needs_no_bias(x, self.is_fused):
            return self.alibi.without_bias(places, lengths)
        V = x.shape[1]
        if places is None:
            places = torch.arange(V, device=x.device)[None]
        return biased(self.alibi(places), key_mask(lengths, V))


class MaskedSpeechModel(Student):
    """The speech encoder. The teacher shares the convolutions over the waveform.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    averaged_name = "context"
    entrance_name = "front_end"

    def __init__(self, config: MaskedSpeechModelConfig) -> None:
        super().__init__()
        self.width, self.decoder_config = config.width, config.decoder
        self.front_end = FrontEnd(config, has_mask_token=False)
        self.context = MaskedSpeechContext(config)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, top_k: int = 0) -> EncoderOutput:
        """Encode unmasked utterances.

        Args:
            waveforms: `[B, N]`, each normalized to zero mean and unit variance and padded with zeros.
            lengths, top_k: see `MaskedSpeechContext`.
        """
        output: EncoderOutput = self.context(self.front_end(waveforms), lengths, top_k=top_k)
        return output

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`."""
        output: EncoderOutput = self(inputs, lengths, top_k=top_k)
        return output.features

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`; with the batch's masks of frames and channels."""
        frames = self.front_end.masked(batch)
        output: EncoderOutput = self.context(frames, batch.lengths, drop_keys=batch.drop_keys)
        return output.last_hidden

    def hold_entrance(self) -> tuple[str, ...]:
        """See `Student`: the convolutions over the waveform, as published."""
        self.front_end.holds_convolutions = True
        return ("front_end.convolutions.",)

    def embed(self, batch: MaskedBatch) -> tuple[MaskedSequences, MaskedSequences]:
        """See `Student`."""
        return MaskedSequences.pair(self.front_end(batch.inputs), batch)

    def imitate_autocast(self, dtype: torch.dtype) -> None:
        """See `Student`."""
        self.front_end.convolutions.compute_dtype = dtype

    def make_head(self) -> ConvDecoder:
        """See `Student`; a decoder with 1-D convolutions."""
        return ConvDecoder(self.width, self.decoder_config)
