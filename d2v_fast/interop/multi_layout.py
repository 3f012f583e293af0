"""Names of the tensors of data2vec 2.0 in fairseq, and in the Transformers folders that this library writes.

The names of a modality's own layers are in its folder.
"""

from __future__ import annotations

from typing import Any

from d2v_fast.interop.layout import Layout
from d2v_fast.interop.post_norm_layout import pair

BLOCKS = "blocks."
_BLOCK = {
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "norm1": "norm1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "norm2": "norm2",
}


def context_pairs(config: Any, front: str, *, has_norm: bool) -> dict[str, tuple[str, ...]]:
    """Return our names of the norm and the blocks, and theirs; our context blocks come first in one list.

    Args:
        config: `d2v.model` of data2vec 2.0.
        front: Prefix of their names of everything before the main blocks, such as `modality_encoders.IMAGE.`.
        has_norm: Whether there is a norm before the blocks.
    """
    pairs = pair("context.norm", f"{front}context_encoder.norm") if has_norm else {}
    for index in range(config.context_depth + config.depth):
        main = index - config.context_depth
        theirs = f"{front}context_encoder.{BLOCKS}{index}" if main < 0 else f"{BLOCKS}{main}"
        for own_module, their_module in _BLOCK.items():
            pairs |= pair(f"context.encoder.blocks.{index}.{own_module}", f"{theirs}.{their_module}")
    return pairs


def decoder_layout(config: Any, front: str) -> Layout:
    """Return the layout of a decoder; for the arguments, see `context_pairs`."""
    theirs = f"{front}decoder."
    pairs: dict[str, tuple[str, ...]] = {}
    for index in range(config.decoder.depth):
        pairs |= pair(f"convolutions.{index}", f"{theirs}blocks.{index}.0")
    if config.decoder.projection == 1:
        pairs |= pair("projection", f"{theirs}proj")
    else:
        for index in (0, 2):
            pairs |= pair(f"projection.{index}", f"{theirs}proj.{index}")
    return Layout(pairs)
