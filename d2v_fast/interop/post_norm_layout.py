"""Names of the tensors of post-norm Transformer blocks in other libraries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockNames:
    """Their names without `.weight` and `.bias`.

    Attributes:
        block: A block, `{}` for its index; the other names are relative to it.
    """

    block: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    fc1: str
    fc2: str
    mlp_norm: str


def pair(own: str, *theirs: str) -> dict[str, tuple[str, ...]]:
    """Return our names of a module's weight and bias, and their names of each, as for `Layout.names`."""
    return {f"{own}.{parameter}": tuple(f"{name}.{parameter}" for name in theirs) for parameter in ("weight", "bias")}


def block_pairs(names: BlockNames, depth: int) -> dict[str, tuple[str, ...]]:
    """Return our names of all blocks' tensors and theirs; our query, key and value are one matrix."""
    pairs: dict[str, tuple[str, ...]] = {}
    for index in range(depth):
        own, theirs = f"context.encoder.blocks.{index}", names.block.format(index)
        pairs |= pair(f"{own}.attention.qkv", *(f"{theirs}.{name}" for name in (names.query, names.key, names.value)))
        pairs |= pair(f"{own}.attention.proj", f"{theirs}.{names.output}")
        pairs |= pair(f"{own}.norm1", f"{theirs}.{names.attention_norm}")
        pairs |= pair(f"{own}.fc1", f"{theirs}.{names.fc1}")
        pairs |= pair(f"{own}.fc2", f"{theirs}.{names.fc2}")
        pairs |= pair(f"{own}.norm2", f"{theirs}.{names.mlp_norm}")
    return pairs
