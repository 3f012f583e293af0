"""Names of the text encoder's tensors in other libraries."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import TextModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.post_norm_layout import BlockNames, block_pairs, pair

# our name of the position table
POSITION = "embedding.position"


@dataclass(frozen=True)
class TextNames(BlockNames):
    """Another library's tensor names.

    Attributes:
        token, position: Full names of the embedding tables.
        norm: Name of the embedding norm, without `.weight` and `.bias`.
    """

    token: str
    position: str
    norm: str


def text_layout(config: TextModelConfig, names: TextNames) -> Layout:
    """Return the map from our tensors to theirs; our query, key and value are one tensor."""
    pairs: dict[str, tuple[str, ...]] = {"embedding.token.weight": (names.token,), POSITION: (names.position,)}
    pairs |= pair("embedding.norm", names.norm)
    pairs |= block_pairs(names, config.depth)
    return Layout(pairs)
