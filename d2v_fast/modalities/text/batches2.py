"""Batches of token blocks with several masks each, made in the loader's workers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.makers import empty_masked_batch, masked_batch
from d2v_fast.data.order import MicroStep
from d2v_fast.masking import SeveralMasks, num_masked_of, several_sequence_masks
from d2v_fast.modalities.text.batches import TextBlocks
from d2v_fast.modalities.text.config2 import MaskedTextConfig
from d2v_fast.modalities.text.tasks import TextDataset

__all__ = ["MaskedTextBatches", "largest_batch"]


class MaskedTextBatches(TextBlocks):
    """Blocks of tokens with several masks each; see `BatchMaker`. Special tokens are masked as any other."""

    def __init__(self, dataset: TextDataset, config: MaskedTextConfig) -> None:
        super().__init__(dataset)
        self._mask = config.mask

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        blocks = self._dataset.read(micro.sample_ids)
        masks = self._masks(micro.sample_ids, blocks.lengths, micro.epoch, seed)
        of_step = num_masked_of(self._dataset.lengths[micro.step_sample_ids], self._mask.prob, inverse=True)
        batch = masked_batch(torch.from_numpy(blocks.tokens), masks, micro, seed, lengths=blocks.lengths)
        return MicroBatch(batch, self._mask.num_masks * of_step)

    def _masks(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], epoch: int, seed: int) -> SeveralMasks:
        # inverse blocks of one token: every set of visible tokens is equally likely
        return several_sequence_masks(
            seed, epoch, ids, lengths, self._mask.prob, 1, 0.0, num_masks=self._mask.num_masks, inverse=True
        )

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        self._masks(np.zeros(1, dtype=np.int64), np.array([20]), 0, 0)


def largest_batch(config: MaskedTextConfig, num_samples: int) -> Batch:
    """Return an uninitialized batch with the largest shapes of a run, on torch's current device."""
    tokens = torch.empty(num_samples, config.data.block_size, dtype=torch.int64)
    return empty_masked_batch(tokens, config.mask, config.data.block_size, inverse=True)
