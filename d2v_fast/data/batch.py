"""Batches that the data layer passes to the training loop, and the interface of image data sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.listing import Listing
from d2v_fast.data.samples import SampleSource

__all__ = ["Batch", "Drawn", "ImageDataset", "MicroBatch", "Scale", "Step"]


class Scale(NamedTuple):
    """Normalization of levels per channel; one value serves all channels.

    Attributes:
        mean: Is subtracted.
        std: Is divided by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def applied(self, levels: Tensor) -> Tensor:
        """Return the normalized levels `[B, C, H, W]` in fp32, on the same device."""
        mean, std = (_of_channels(values, levels.device) for values in self)
        return levels.to(torch.float32).sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None].to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        inputs: Normalized pixels fp32 `[B, C, H, W]`, or with a `scale` levels uint8; normalized waveforms fp32
            `[B, N]`, padded with zeros; or tokens int64 `[B, T]`, padded with the padding token.
        rows: int64 `[N]`, flat indices `b * P + p` of the places in the loss (patches, frames, tokens), ascending.
        sample_ids: int64 `[B]`, positions in the data set.
        lengths: int64 `[B]`, number of places of each sample that are not padding. `None` means no padding.
        unpadded: int64 `[M]`, flat indices of the places that are not padding, ascending. `None` means all.
        masked_inputs: The student's inputs, shaped like `inputs`, for modalities that mask the input itself. `None`
            means that the encoder puts its mask token at `rows`.
        offsets: int32 `[S + 1]`, start of each document among the unpadded places, and the number of these places.
            `None` means one document per sample.
        bad: Unreadable files that were replaced by a neighbor, as `path: reason`.
        drop_keys: uint64 `[B]`, always on the host: keys of the random streams (`streams.DROP`) that decide which
            branches and blocks each sample skips. Or what they decide, as `models.encoder.Encoder.draw` returns it.
            `None` means keys drawn from torch's generator.
        visible: With several masks per sample, int64 `[B * M, V]`: flat indices `(b * M + m) * P + p` of the visible
            places of each mask, ascending, and `B * M * P` for padding. `rows` then counts in the same way, and
            `drop_keys` are of the masks.
        visible_lengths: int64 `[B * M]`, number of visible places of each mask. `None` means V.
        noise_keys: int64 `[B * M]`, keys of the noise at masked places (`streams.NOISE`).
        num_rows: 0-d int64, how many of `rows` count; the others are padding. `None` means all.
        scale: How `to` normalizes `inputs`, on the device that trains: levels take a quarter of the memory and of the
            copies. `None` means that they are normalized.
        targets: What a head should answer: classes int64 `[B]` or their shares fp32 `[B, C]`, scores fp32 `[B]`, or for
            CTC labels int64 `[sum of target_lengths]`. `None`: there are no labels, as in pre-training.
        target_lengths: int64 `[B]`, labels of each sample, for CTC.
        channel_rows: int64, flat indices `b * D + d` of the channels that fine-tuning masks in all places of a sample,
            ascending. `None` means none.
    """

    inputs: Tensor
    rows: Tensor
    sample_ids: Tensor
    lengths: Tensor | None = None
    unpadded: Tensor | None = None
    masked_inputs: Tensor | None = None
    offsets: Tensor | None = None
    bad: tuple[str, ...] = ()
    drop_keys: npt.NDArray[np.uint64] | Tensor | None = None
    visible: Tensor | None = None
    visible_lengths: Tensor | None = None
    noise_keys: Tensor | None = None
    num_rows: Tensor | None = None
    scale: Scale | None = None
    targets: Tensor | None = None
    target_lengths: Tensor | None = None
    channel_rows: Tensor | None = None

    @property
    def num_masks(self) -> int:
        """Masks per sample."""
        return 1 if self.visible is None else len(self.visible) // len(self.inputs)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`, and its inputs normalized."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking)).with_inputs(
            lambda tensor: tensor
        )

    def with_inputs(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with `inputs` and `masked_inputs` changed, and then normalized."""
        inputs, masked = change(self.inputs), self.masked_inputs
        inputs = inputs if self.scale is None else self.scale.applied(inputs)
        return replace(self, inputs=inputs, masked_inputs=None if masked is None else change(masked), scale=None)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, so that copies to the GPU do not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class MicroBatch(NamedTuple):
    """The result of a loader worker for one micro-step of one process.

    Attributes:
        batch: The samples of this micro-step.
        step_rows: Number of masked places of the whole optimizer step, over all its micro-steps and processes.
    """

    batch: Batch
    step_rows: int


@dataclass(frozen=True)
class Step:
    """The batches of one process for one optimizer step.

    Attributes:
        micro_batches: One batch per micro-step.
        num_rows: Number of masked places of the whole step, over all micro-steps and processes.
    """

    micro_batches: list[Batch]
    num_rows: int


class Drawn(NamedTuple):
    """Augmented images of a batch.

    Attributes:
        values: Levels uint8 `[B, C, H, W]`, or normalized pixels fp32.
        scale: The normalization of levels; None if they are normalized.
        bad: The unreadable files that were replaced.
    """

    values: Tensor
    scale: Scale | None
    bad: tuple[str, ...]


class ImageDataset(SampleSource, Protocol):
    """Images addressed by their position, 0 to `len(dataset) - 1`.

    Attributes:
        value_bytes: Bytes of a value that `drawn` returns.
    """

    image_size: int
    channels: int
    value_bytes: int
    listing: Listing

    def __len__(self) -> int: ...

    def drawn(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> Drawn:
        """Return augmented images.

        Each sample depends only on (seed, epoch, sample id), bit for bit.
        """
        ...

    def augmented(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> tuple[Tensor, tuple[str, ...]]:
        """Return the images of `drawn`, normalized fp32 `[B, C, H, W]`, and the unreadable files replaced."""
        ...

    def plain(self, sample_ids: npt.NDArray[np.int64]) -> Tensor:
        """Return resized and normalized pixels fp32 `[B, C, H, W]`, without augmentation."""
        ...
