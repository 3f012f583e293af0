"""Names of the tensors of data2vec 2.0's text encoder in fairseq, and in the Transformers folders written here."""

from __future__ import annotations

from d2v_fast.config import MaskedTextModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.multi_layout import context_pairs
from d2v_fast.interop.post_norm_layout import pair

FRONT = "modality_encoders.TEXT."
TOKENS, ROWS = f"{FRONT}local_encoder.embed_tokens.weight", f"{FRONT}local_encoder.embed_positions.weight"


def masked_text_layout(config: MaskedTextModelConfig) -> Layout:
    """Return the map from our tensors to theirs."""
    pairs: dict[str, tuple[str, ...]] = {"embedding.token.weight": (TOKENS,), "embedding.position": (ROWS,)}
    pairs |= pair("embedding.norm", f"{FRONT}local_encoder.layernorm_embedding")
    pairs |= context_pairs(config, FRONT, has_norm=config.context_depth > 0)
    return Layout(pairs)
