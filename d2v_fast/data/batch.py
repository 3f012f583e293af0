"""What the data layer hands to the training loop, and what a data set must be able to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Batch", "DataError", "Dataset"]


class DataError(ValueError):
    """The data cannot be trained on; the message says what was found and what to change."""


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process. It holds no labels.

    Attributes:
        pixels: fp32 `[B, C, H, W]`, normalised.
        rows: int64 `[N]`, flat indices `b * P + p` of the masked patches, ascending.
        sample_ids: int64 `[B]`, positions in the data set.
        bad: the unreadable files that were replaced by a neighbour, as `path: reason`.
        global_rows: masked patches of the whole optimizer step, over all its micro steps and processes; None
        when the
            batch was not made by a `StepLoader`.
    """

    pixels: Tensor
    rows: Tensor
    sample_ids: Tensor
    bad: tuple[str, ...] = ()
    global_rows: int | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies to the GPU that do not block."""
        return replace(
            self,
            pixels=self.pixels.pin_memory(),
            rows=self.rows.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
        )


class Dataset(Protocol):
    """Images that are addressed by their position, 0 to `len(dataset)` - 1."""

    image_size: int
    channels: int

    def __len__(self) -> int: ...

    def augmented(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> tuple[Tensor, tuple[str, ...]]:
        """Pixels fp32 `[B, C, H, W]`, randomly changed and normalised, and the files that had to be replaced.

        Each sample depends on (seed, epoch, its id) and on nothing else, bit for bit.
        """
        ...

    def plain(self, sample_ids: npt.NDArray[np.int64]) -> Tensor:
        """Pixels fp32 `[B, C, H, W]`, unchanged but for size and normalisation."""
        ...
