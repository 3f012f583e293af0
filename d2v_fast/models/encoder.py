"""Transformer encoder: the stack that all modalities share.

Shape letters: B batch, T tokens, D width, K kept features, N rows.

What a block computes, and which of its values the teacher's targets are made of, is the block's affair: `pre_norm` and
`post_norm` hold the two kinds of published blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_fast.masking.streams import uniforms

Context = TypeVar("Context", contravariant=True)


class EncoderOutput(NamedTuple):
    """Output of an encoder.

    Attributes:
        last_hidden: residual stream after the last block, before any final norm: `[B, T, D]`, or `[N, D]` if only
            these rows were requested.
        features: features of the last K blocks, first to last, from which targets are computed: `[B, T, D]` each,
            the last one shaped like `last_hidden`.
    """

    last_hidden: Tensor
    features: list[Tensor]


class Block(Protocol[Context]):
    """One layer of an encoder, an `nn.Module`.

    Attributes:
        drop_rates: for each part of the block that a sample can skip, the probability of skipping it in training.
    """

    drop_rates: tuple[float, ...]

    def __call__(
        self, x: Tensor, context: Context, rows: Tensor | None = None, active: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform tokens.

        Args:
            x: `[B, T, D]`.
            context: shared by the blocks of one encoder, such as an attention bias.
            rows: int64 `[N]`, flat indices `b * T + t` of the only tokens to compute. `None` computes all.
            active: for each of `drop_rates`, int64 `[S]`, ascending: the samples that compute this part. `None`
                means that all samples compute all parts.

        Returns:
            The residual stream and the feature for targets, each `[B, T, D]`, or `[N, D]` with `rows`.
        """
        ...


class Encoder(nn.Module):
    """A stack of blocks.

    Args:
        blocks: modules that are called as `Block` says.
        gradient_checkpointing: training keeps only the inputs of the blocks and computes the rest again in the
            backward pass.
    """

    def __init__(self, blocks: Iterable[nn.Module], *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.blocks = nn.ModuleList(blocks)

    @property
    def drop_rates(self) -> list[float]:
        """Probabilities of all decisions that are made for a sample, block by block."""
        return [rate for block in self.blocks for rate in block.drop_rates]  # type: ignore[union-attr]

    @property
    def drops_samples(self) -> bool:
        """Whether it leaves out parts of blocks for some samples: in training, with a rate above 0."""
        return self.training and any(self.drop_rates)

    def forward(
        self,
        x: Tensor,
        context: object,
        top_k: int = 0,
        rows: Tensor | None = None,
        drop_keys: npt.NDArray[np.uint64] | None = None,
    ) -> EncoderOutput:
        """Run all blocks.

        Args:
            x: `[B, T, D]` token embeddings.
            context: handed to every block.
            top_k: K, how many of the last blocks' features to return; no other outlives its block.
            rows: int64 `[N]`, flat indices `b * T + t`: the last block computes these tokens only, and its output
                and feature are `[N, D]`; None: all tokens.
            drop_keys: uint64 `[B]`, keys of the streams that say in training what each sample leaves out; None: new
                ones, drawn from torch's generator.
        Raises:
            ValueError: `top_k` is not in [0, depth].
        """
        depth = len(self.blocks)
        if not 0 <= top_k <= depth:
            raise ValueError(f"`top_k` must be in [0, {depth}], the number of blocks, but is {top_k} instead.")
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        kept = self._kept(random_keys(len(x)) if drop_keys is None else drop_keys, x) if self.drops_samples else None
        features = []
        for index, block in enumerate(self.blocks):
            wanted = rows if index == depth - 1 else None
            of_block = None if kept is None else kept[index]
            if recompute:
                x, feature = checkpoint(block, x, context, wanted, of_block, use_reentrant=False)
            else:
                x, feature = block(x, context, wanted, of_block)
            if index >= depth - top_k:
                features.append(feature)
            # or it would live on while the next block works
            del feature
        return EncoderOutput(x, features)

    def _kept(self, keys: npt.NDArray[np.uint64], x: Tensor) -> list[Sequence[Tensor]]:
        """For every block, `kept` as `Block` describes it, on the device of `x`."""
        rates = self.drop_rates
        keeps = uniforms(keys, len(rates)) >= rates
        # drawn on the host, which so has the sizes without waiting for a device, and copied to it at once
        samples = torch.from_numpy(keeps.T.nonzero()[1]).to(x.device, non_blocking=True)
        parts = iter(samples.split(keeps.sum(0).tolist()))
        return [[next(parts) for _ in block.drop_rates] for block in self.blocks]  # type: ignore[union-attr]


def random_keys(num_samples: int) -> npt.NDArray[np.uint64]:
    """Keys of streams that nothing has named, uint64 `[num_samples]`, drawn from torch's generator of the CPU."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (num_samples,), dtype=torch.int64, device="cpu")
    return drawn.numpy().view(np.uint64)
