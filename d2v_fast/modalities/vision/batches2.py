"""Batches of augmented images with several masks each, made in the loader's workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from d2v_fast.data.batch import Batch, ImageDataset, MicroBatch
from d2v_fast.data.makers import empty_masked_batch, masked_batch
from d2v_fast.data.order import MicroStep
from d2v_fast.masking import SeveralMasks, num_masked_of, several_image_masks
from d2v_fast.modalities.vision.batches import Images
from d2v_fast.modalities.vision.config2 import MaskedVisionConfig

__all__ = ["MaskedImageBatches", "largest_batch"]


class MaskedImageBatches(Images):
    """Make batches of augmented images with several masks each; see `BatchMaker`."""

    def __init__(self, dataset: ImageDataset, config: MaskedVisionConfig) -> None:
        super().__init__(dataset)
        self._mask, self._grid_size = config.mask, config.model.grid_size
        self._num_masked = num_masked_of(np.array([config.model.num_patches]), config.mask.prob, inverse=True)

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        pixels, scale, bad = self._dataset.drawn(micro.sample_ids, seed, micro.epoch)
        batch = replace(masked_batch(pixels, self._masks(micro, seed), micro, seed, bad=bad), scale=scale)
        return MicroBatch(batch, len(micro.step_sample_ids) * self._mask.num_masks * self._num_masked)

    def _masks(self, micro: MicroStep, seed: int) -> SeveralMasks:
        mask = self._mask
        return several_image_masks(
            seed,
            micro.epoch,
            micro.sample_ids,
            self._grid_size,
            mask.prob,
            mask.length,
            mask.prob_adjust,
            num_masks=mask.num_masks,
        )

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        ids = np.zeros(1, dtype=np.int64)
        self._masks(MicroStep(0, ids, ids), 0)


def largest_batch(config: MaskedVisionConfig, num_samples: int) -> Batch:
    """Return a batch with the shapes of a run's largest one, uninitialized, on torch's current device."""
    model = config.model
    pixels = torch.empty(num_samples, model.channels, model.image_size, model.image_size)
    return empty_masked_batch(pixels, config.mask, model.num_patches, inverse=True)
