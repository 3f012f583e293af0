"""Batches of augmented images with block masks, made in the loader's workers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, ImageDataset, MicroBatch
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.errors import DataError
from d2v_fast.masking import block_mask_rows
from d2v_fast.modalities.vision.config import ImageInputsConfig, VisionConfig
from d2v_fast.modalities.vision.digits import DigitsDataset
from d2v_fast.modalities.vision.images import ImagesDataset

__all__ = ["ImageBatches", "Images", "image_dataset", "largest_batch"]


def image_dataset(
    config: ImageInputsConfig, split: Literal["train", "test"] = "train"
) -> DigitsDataset | ImagesDataset:
    """Return the data set that `data.kind` names, with images of the model's input size.

    Args:
        config: The run's `d2v` section.
        split: "test" is the held-out part of the digits. A folder of images has only "train".
    Raises:
        DataError: There are no readable images, the model has another number of channels, or there is no such split.
    """
    if config.data.kind == "digits":
        return DigitsDataset(config.data, config.model, split)
    if split != "train":
        raise DataError(f'`split` must be "train" for a folder of images, but is "{split}" instead.')
    return ImagesDataset(config.data, config.model)


class Images:
    """What every maker of batches of images has; see `BatchMaker`."""

    what = "image"
    lengths: npt.NDArray[np.int64] | None = None
    max_step_length: int | None = None
    vocabulary: str | None = None

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset = dataset
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.source: SampleSource = dataset
        self.sample_bytes = dataset.value_bytes * dataset.channels * dataset.image_size**2


class ImageBatches(Images):
    """Make batches of augmented images with block masks; see `BatchMaker`."""

    def __init__(self, dataset: ImageDataset, config: VisionConfig) -> None:
        super().__init__(dataset)
        self._mask, self._grid_size = config.mask, config.model.grid_size

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        pixels, scale, bad = self._dataset.drawn(micro.sample_ids, seed, micro.epoch)
        rows = self.rows(seed, micro.epoch, micro.sample_ids)
        # drawing the other processes' masks again is cheaper than communication: a mask takes about 1 us
        alone = len(micro.sample_ids) == len(micro.step_sample_ids)
        step_rows = len(rows) if alone else len(self.rows(seed, micro.epoch, micro.step_sample_ids))
        ids = torch.from_numpy(micro.sample_ids)
        keys = drop_keys(micro, seed)
        batch = Batch(pixels, torch.from_numpy(rows), ids, bad=bad, drop_keys=keys, scale=scale)
        return MicroBatch(batch, step_rows)

    def rows(self, seed: int, epoch: int, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the flat indices `b * P + p` of the masked patches, int64 `[N]`."""
        mask = self._mask
        return block_mask_rows(
            seed,
            epoch,
            sample_ids,
            self._grid_size,
            mask.num_patches,
            mask.min_patches,
            mask.max_patches,
            mask.min_aspect,
        )

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        self.rows(0, 0, np.zeros(1, dtype=np.int64))


def largest_batch(config: VisionConfig, num_samples: int) -> Batch:
    """Return a batch with the shapes of a run's largest one, uninitialized, on torch's current device."""
    model = config.model
    pixels = torch.empty(num_samples, model.channels, model.image_size, model.image_size)
    num_rows = num_samples * min(config.mask.num_patches, model.num_patches)
    return Batch(pixels, torch.empty(num_rows, dtype=torch.int64), torch.empty(num_samples, dtype=torch.int64))
