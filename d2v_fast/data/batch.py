"""What the data layer hands to the training loop, and what a data set must be able to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.listing import Listing
from d2v_fast.data.samples import SampleSource

__all__ = ["Batch", "ImageDataset", "MicroBatch", "Step"]


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process. It holds no labels.

    Attributes:
        inputs: pixels fp32 `[B, C, H, W]`, normalized; waveforms fp32 `[B, N]`, normalized, zero after their end;
            tokens int64 `[B, T]`, padding tokens after their end.
        rows: int64 `[N]`, flat indices `b * P + p` of the places in the loss (patches, frames, tokens), ascending.
        sample_ids: int64 `[B]`, positions in the data set.
        lengths: int64 `[B]`, places of each sample that are not padding; None: all.
        unpadded: int64 `[M]`, flat indices of the places that are not padding, ascending; None: all.
        masked_inputs: what the student sees, of the form of `inputs`, where masks are a part of the input; None: where
            the encoder puts its mask token at `rows`.
        offsets: int32 `[S + 1]`, where the documents start in the row of all places that are not padding, and its
            length; None: a sample is one document.
        bad: the unreadable files that were replaced by a neighbor, as `path: reason`.
        drop_keys: uint64 `[B]`, always on the host: keys of the streams (`streams.DROP`) from which stochastic depth
            and layer-drop decide what each sample skips; None: new ones, drawn from torch's generator.
    """

    inputs: Tensor
    rows: Tensor
    sample_ids: Tensor
    lengths: Tensor | None = None
    unpadded: Tensor | None = None
    masked_inputs: Tensor | None = None
    offsets: Tensor | None = None
    bad: tuple[str, ...] = ()
    drop_keys: npt.NDArray[np.uint64] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies to the GPU that do not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class MicroBatch(NamedTuple):
    """What a loader worker makes of one micro-step of one process.

    Attributes:
        batch: the samples of this micro-step.
        step_rows: masked places of the whole optimizer step, over all its micro-steps and processes.
    """

    batch: Batch
    step_rows: int


@dataclass(frozen=True)
class Step:
    """What one process needs for one optimizer step.

    Attributes:
        micro_batches: the batches of its micro-steps.
        num_rows: masked places of the whole step, over all micro-steps and processes.
    """

    micro_batches: list[Batch]
    num_rows: int


class ImageDataset(SampleSource, Protocol):
    """Images that are addressed by their position, 0 to `len(dataset)` - 1."""

    image_size: int
    channels: int
    listing: Listing

    def __len__(self) -> int: ...

    def augmented(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels fp32 `[B, C, H, W]`, randomly changed and normalized, and the files that had to be replaced.

        Each sample depends on (seed, epoch, its id) and on nothing else, bit for bit.
        """
        ...

    def plain(self, sample_ids: npt.NDArray[np.int64]) -> Tensor:
        """Pixels fp32 `[B, C, H, W]`, unchanged but for size and normalization."""
        ...
