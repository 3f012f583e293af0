"""The text encoder of data2vec 2.0: token and position embeddings, a norm, post-norm blocks.

Shape letters: B samples, T tokens, R rows (masked copies of samples), V visible tokens of a row, D width.

The embeddings are trained with the student, and the teacher reads them as the student does, with their dropout; it
averages the blocks.
"""

from __future__ import annotations

from torch import Tensor

from d2v_fast.config import MaskedTextModelConfig
from d2v_fast.modalities.text.encoder import TextEmbedding
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.encoder import Drops, EncoderOutput
from d2v_fast.models.student import MaskedBatch, Student
from d2v_fast.models.visible import NORM_EPS, MaskedContext, MaskedSequences, Places, key_mask


class MaskedTextContext(MaskedContext):
    """The blocks.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: MaskedTextModelConfig) -> None:
        # as published: a norm before the blocks only where there are context blocks
        super().__init__(config, has_norm=config.context_depth > 0)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        places: Places | None = None,
        drop_keys: Drops = None,
        top_k: int = 0,
    ) -> EncoderOutput:
        """Encode embedded tokens.

        Args:
            tokens: `[B, T, D]`.
            lengths: int64 `[B]`, tokens of each sample before its padding. `None` means T.
            places: visible and masked tokens of every row. `None`: all are visible, and R is B.
            drop_keys: see `models.encoder.Drops`.
            top_k: K, how many of the last blocks' features to return.

        Returns:
            `last_hidden` and K features, each `[R, V, D]`, undefined at padding.
        """
        # the student's embeddings may have another dtype than the teacher
        x = tokens.to(next(self.parameters()).dtype)
        if places is None:
            return self.encode(x, key_mask(lengths, x.shape[1]), top_k, drop_keys)
        x = places.gather(x)
        return self.encode(x, key_mask(places.visible_lengths, x.shape[1]), top_k, drop_keys)


class MaskedTextModel(Student):
    """The text encoder. The teacher shares the embeddings.

    Args:
        config: sizes and rates. Parameters are initialized from torch's global generator.
    """

    averaged_name = "context"
    entrance_name = "embedding"

    def __init__(self, config: MaskedTextModelConfig) -> None:
        super().__init__()
        self.width, self.decoder_config = config.width, config.decoder
        self.embedding = TextEmbedding(config, norm_eps=NORM_EPS)
        self.context = MaskedTextContext(config)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None, top_k: int = 0) -> EncoderOutput:
        """Encode tokens.

        Args:
            tokens: int64 `[B, T]`.
            lengths, top_k: see `MaskedTextContext`.
        """
        output: EncoderOutput = self.context(self.embedding(tokens), lengths, top_k=top_k)
        return output

    def features(self, inputs: Tensor, lengths: Tensor | None = None, top_k: int = 1) -> list[Tensor]:
        """See `Student`."""
        output: EncoderOutput = self(inputs, lengths, top_k=top_k)
        return output.features

    def embed(self, batch: MaskedBatch) -> tuple[MaskedSequences, MaskedSequences]:
        """See `Student`."""
        return MaskedSequences.pair(self.embedding(batch.inputs), batch)

    def encode(self, batch: MaskedBatch) -> Tensor:
        """See `Student`."""
        tokens = self.embedding(batch.inputs)
        output: EncoderOutput = self.context(tokens, batch.lengths, drop_keys=batch.drop_keys)
        return output.last_hidden

    def make_head(self) -> ConvDecoder:
        """See `Student`; a decoder with 1-D convolutions."""
        return ConvDecoder(self.width, self.decoder_config).init_normal_()
