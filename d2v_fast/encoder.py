"""Transformer encoder: the stack that all modalities share.

Shape letters: B batch, T tokens, D width, K kept features, N rows.

What a block computes, and which of its values the teacher's targets are made of, is the block's affair: `pre_norm` and
`post_norm` hold the two kinds of published blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class EncoderOutput(NamedTuple):
    """What an encoder hands back.

    Attributes:
        last_hidden: residual stream after the last block, before any final norm: `[B, T, D]`, or `[N, D]` where
            only some rows of it were asked for.
        features: what the targets are made of, `[B, T, D]` of each of the last K blocks, first to last; the last one
            has the rows of `last_hidden`.
    """

    last_hidden: Tensor
    features: list[Tensor]


class Block(Protocol):
    """One layer of an encoder, an `nn.Module`."""

    def __call__(self, x: Tensor, context: Any, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transform tokens.

        Args:
            x: `[B, T, D]`.
            context: what the blocks of one encoder share, such as an attention bias.
            rows: int64 `[N]`, flat indices `b * T + t`: the only tokens whose output is wanted; None: all.
        Returns:
            The residual stream and the feature that targets are made of, each `[B, T, D]`, or `[N, D]` with `rows`.
        """
        ...


class Encoder(nn.Module):
    """A stack of blocks.

    Args:
        blocks: modules that are called as `Block` says.
        gradient_checkpointing: training keeps only the inputs of the blocks and computes the rest again in the
            backward pass.
        layer_drop: probability with which training skips a block altogether (arXiv 1909.11556). Where several processes
            may train together, a skipped block is computed and discarded: its parameters have a gradient, zero, on
            every process, and all of them call the same modules.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], *, gradient_checkpointing: bool = False, layer_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.layer_drop = layer_drop
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context: Any, top_k: int = 0, rows: Tensor | None = None) -> EncoderOutput:
        """Run all blocks.

        Args:
            x: `[B, T, D]` token embeddings.
            context: handed to every block.
            top_k: K, how many of the last blocks' features to return; no other outlives its block.
            rows: int64 `[N]`, flat indices `b * T + t`: the last block computes these tokens only, and its output
                and feature are `[N, D]`; None: all tokens.
        Raises:
            ValueError: `top_k` is not in [0, depth].
        """
        depth = len(self.blocks)
        if not 0 <= top_k <= depth:
            raise ValueError(f"`top_k` must be in [0, {depth}], the number of blocks, but is {top_k} instead.")
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        features = []
        for index, block in enumerate(self.blocks):
            wanted = rows if index == depth - 1 else None
            if self._drops_layer():
                x = feature = self._skip(block, x, context, wanted)
            elif recompute:
                x, feature = checkpoint(block, x, context, wanted, use_reentrant=False)
            else:
                x, feature = block(x, context, wanted)
            if index >= depth - top_k:
                features.append(feature)
            # or it would live on while the next block works
            del feature
        return EncoderOutput(x, features)

    def _drops_layer(self) -> bool:
        # drawn on the host, which decides what runs
        return self.training and self.layer_drop > 0 and torch.rand((), device="cpu").item() < self.layer_drop

    @staticmethod
    def _skip(block: nn.Module, x: Tensor, context: Any, rows: Tensor | None) -> Tensor:
        skipped = x if rows is None else x.flatten(0, 1).index_select(0, rows)
        if not torch.distributed.is_initialized():
            return skipped
        discarded, _ = block(x, context, rows)
        return torch.where(discarded.new_zeros((), dtype=torch.bool), discarded, skipped)
