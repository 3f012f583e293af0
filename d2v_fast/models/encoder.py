"""Transformer encoder: the stack of blocks that all modalities share.

Shape letters: B batch, T tokens, D width, K returned features, N rows.

A block decides what it computes and which of its values is the feature that targets are computed from. `pre_norm` and
`post_norm` hold the two published kinds of block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from d2v_fast.masking.streams import uniforms

Context = TypeVar("Context", contravariant=True)

# what decides which samples skip parts of blocks: keys uint64 `[B]` of random streams; or what `Encoder.draw` returned;
# or None, to draw keys from torch's generator
Drops = npt.NDArray[np.uint64] | Tensor | None


class Kept(NamedTuple):
    """The samples that compute one part of a block, without a number that the host must know.

    Attributes:
        samples: int64 `[S]`, ascending: only these samples compute the part. Or bool `[B]`: all samples compute it, and
            it counts for those that are True.
        share: 0-d fp64, the expected share of the samples that keep the part.
    """

    samples: Tensor
    share: Tensor


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
        keeps_fixed_counts: whether a captured step may keep the same number of samples in every batch.
    """

    drop_rates: tuple[float, ...]
    keeps_fixed_counts: bool

    def __call__(
        self,
        x: Tensor,
        context: Context,
        rows: Tensor | None = None,
        active: Sequence[Tensor | Kept | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transform tokens.

        Args:
            x: `[B, T, D]`.
            context: shared by the blocks of one encoder, such as an attention bias.
            rows: int64 `[N]`, flat indices `b * T + t` of the only tokens to compute. `None` computes all.
            active: for each of `drop_rates`, int64 `[S]`, ascending: the samples that compute this part, whose
                expected share is 1 minus the rate; or `Kept`; or None for all samples. `None` means that all samples
                compute all parts.

        Returns:
            The residual stream and the feature for targets, each `[B, T, D]`, or `[N, D]` with `rows`.
        """
        ...


class Encoder(nn.Module):
    """A stack of blocks.

    Args:
        blocks: modules with the interface of `Block`.
        gradient_checkpointing: in training, store only the inputs of the blocks and recompute the rest in the
            backward pass.

    Attributes:
        checkpoint_contexts: makes the contexts of a block's forward pass and of its recomputation, as `context_fn` of
            `torch.utils.checkpoint.checkpoint`.
        is_compiled: whether the blocks are compiled. They then get their rates as tensors, since a compiler makes a
            program for every value of a Python number.
    """

    is_compiled = False
    checkpoint_contexts: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]

    def __init__(self, blocks: Iterable[nn.Module], *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.checkpoint_contexts = noop_context_fn
        self.blocks = nn.ModuleList(blocks)

    @property
    def drop_rates(self) -> list[float]:
        """Probabilities of skipping each part of each block, block by block."""
        return [rate for block in self.blocks for rate in block.drop_rates]  # type: ignore[union-attr]

    @property
    def drops_samples(self) -> bool:
        """Whether some samples skip parts of blocks: in training, if a rate is above 0."""
        return self.training and any(self.drop_rates)

    def forward(
        self,
        x: Tensor,
        context: object,
        top_k: int = 0,
        rows: Tensor | None = None,
        drop_keys: Drops = None,
    ) -> EncoderOutput:
        """Run all blocks.

        Args:
            x: `[B, T, D]` token embeddings.
            context: passed to every block.
            top_k: K, how many of the last blocks' features to return. Other features are freed after their block.
            rows: int64 `[N]`, flat indices `b * T + t` of the only tokens that the last block computes, so that its
                output and feature are `[N, D]`. `None` computes all.
            drop_keys: see `Drops`.

        Returns:
            The output of the last block and K features.

        Raises:
            ValueError: `top_k` is not in [0, depth].
        """
        depth = len(self.blocks)
        if not 0 <= top_k <= depth:
            raise ValueError(f"`top_k` must be in [0, {depth}], the number of blocks, but is {top_k} instead.")
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        active = self._active(drop_keys, x) if self.drops_samples else None
        features = []
        for index, block in enumerate(self.blocks):
            wanted = rows if index == depth - 1 else None
            of_block = None if active is None else active[index]
            if recompute:
                x, feature = checkpoint(
                    block, x, context, wanted, of_block, use_reentrant=False, context_fn=self.checkpoint_contexts
                )
            else:
                x, feature = block(x, context, wanted, of_block)
            if index >= depth - top_k:
                features.append(feature)
            # the name would keep the feature alive during the next block
            del feature
        return EncoderOutput(x, features)

    def draw(self, keys: npt.NDArray[np.uint64], *, fixed_counts: bool) -> Tensor | None:
        """Draw what each sample skips in a form whose shape depends on the number of samples only, on the host.

        Args:
            keys: uint64 `[B]`, keys of random streams.
            fixed_counts: keep the same number of samples of every batch in each part, if the blocks allow it, instead
                of deciding for each sample alone.

        Returns:
            bool `[parts, B]`, True for samples that keep the part; with fixed counts int64, the samples that keep the
            first part, ascending, then those that keep the second, and so on. None if no sample skips anything.
        """
        if not self.drops_samples:
            return None
        drawn = uniforms(keys, len(self.drop_rates))
        if not (fixed_counts and all(block.keeps_fixed_counts for block in self.blocks)):
            return torch.from_numpy(np.ascontiguousarray((drawn >= self.drop_rates).T))
        order = np.argsort(-drawn, axis=0, kind="stable")
        counts = self._kept_counts(len(keys))
        return torch.from_numpy(np.concatenate([np.sort(order[:k, part]) for part, k in enumerate(counts)]))

    def _kept_counts(self, num_samples: int) -> list[int]:
        """Return how many samples keep each part if this number is fixed: the nearest to the expected one, not 0."""
        return [max(1, round(num_samples * (1.0 - rate))) for rate in self.drop_rates]

    def _active(self, drops: Drops, x: Tensor) -> list[Sequence[Tensor | Kept | None]]:
        """Return the argument `active` of every block, on the device of `x`."""
        rates = self.drop_rates
        if isinstance(drops, Tensor):
            active = self._drawn(drops, x)
        else:
            keeps = uniforms(random_keys(len(x)) if drops is None else drops, len(rates)) >= rates
            # drawn on the host, so that the sizes are known without waiting for the device
            samples = torch.from_numpy(keeps.T.nonzero()[1]).to(x.device, non_blocking=True)
            drawn = samples.split(keeps.sum(0).tolist())
            active = list(drawn)
            if self.is_compiled:
                active = [_kept(part, 1.0 - rate) for part, rate in zip(drawn, rates, strict=True)]
        parts = iter(active)
        return [[next(parts) for _ in block.drop_rates] for block in self.blocks]  # type: ignore[union-attr]

    def _drawn(self, drops: Tensor, x: Tensor) -> list[Tensor | Kept | None]:
        """Return what `draw` has drawn for each part."""
        if drops.dtype == torch.bool:
            return [_kept(keeps, 1.0 - rate) for keeps, rate in zip(drops.unbind(), self.drop_rates, strict=True)]
        counts = self._kept_counts(len(x))
        parts = zip(drops.split(counts), counts, strict=True)
        return [None if count == len(x) else _kept(samples, count / len(x)) for samples, count in parts]


def _kept(samples: Tensor, share: float) -> Kept:
    # filled on the device: a copy from the host cannot be captured
    return Kept(samples, torch.full((), share, dtype=torch.float64, device=samples.device))


def random_keys(num_samples: int) -> npt.NDArray[np.uint64]:
    """Draw keys of random streams, uint64 `[num_samples]`, from torch's CPU generator."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (num_samples,), dtype=torch.int64, device="cpu")
    return drawn.numpy().view(np.uint64)
