"""The names that other libraries have for the text encoder's tensors: one encoder, so one order of them."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import TextModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.post_norm_layout import BlockNames, block_pairs, pair

# our name of the table of positions
POSITION = "embedding.position"


@dataclass(frozen=True)
class TextNames(BlockNames):
    """Their names.

    Attributes:
        token, position: the tables, whole names.
        norm: of the embeddings, without `.weight` and `.bias`.
    """

    token: str
    position: str
    norm: str


def text_layout(config: TextModelConfig, names: TextNames) -> Layout:
    """Where their tensors go; our query, key and value are one map."""
    pairs: dict[str, tuple[str, ...]] = {"embedding.token.weight": (names.token,), POSITION: (names.position,)}
    pairs |= pair("embedding.norm", names.norm)
    pairs |= block_pairs(names, config.depth)
    return Layout(pairs)
