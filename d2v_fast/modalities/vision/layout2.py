"""Names of the tensors of data2vec 2.0's image encoder in fairseq, and in the Transformers folders written here."""

from __future__ import annotations

from torch import Tensor

from d2v_fast.config import MaskedVisionModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.multi_layout import context_pairs
from d2v_fast.interop.post_norm_layout import pair
from d2v_fast.models.visible import sine_positions

FRONT = "modality_encoders.IMAGE."
# of the fixed table, which the others store and this library computes
POSITIONS = "embedding.positions"


def masked_vision_layout(config: MaskedVisionModelConfig) -> Layout:
    """Return the map from our tensors, and `POSITIONS`, to theirs."""
    token, table = f"{FRONT}extra_tokens", f"{FRONT}fixed_positional_encoder.positions"
    projection = f"{FRONT}local_encoder.proj"
    pairs = {
        "embedding.cls_token": (token,),
        POSITIONS: (table,),
        **pair("embedding.projection", projection),
        **context_pairs(config, FRONT, has_norm=True),
    }
    size = config.patch_size
    shapes = {
        token: (1, 1, config.width),
        table: (1, config.num_patches, config.width),
        f"{projection}.weight": (config.width, config.channels, size, size),
    }
    return Layout(pairs, shapes)


def fixed_positions(config: MaskedVisionModelConfig) -> Tensor:
    """Return the table of positions, fp32 `[P, D]`."""
    return sine_positions(config.width, config.grid_size)
