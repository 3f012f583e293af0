"""Batches of token blocks with masks, made in the loader's workers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.masking import TokenMasks, token_mask_rows
from d2v_fast.modalities.text.config import TextConfig
from d2v_fast.modalities.text.tasks import TextDataset, TokenBlocks

__all__ = ["TextBatches", "TextBlocks", "largest_batch"]


class TextBlocks:
    """What every maker of batches of token blocks has; see `BatchMaker`."""

    what = "block"
    max_step_length: int | None = None

    def __init__(self, dataset: TextDataset) -> None:
        self._dataset = dataset
        self.source: SampleSource = dataset
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.lengths: npt.NDArray[np.int64] | None = dataset.lengths
        self.sample_bytes = 16 * int(dataset.lengths.max())
        self.vocabulary: str | None = dataset.tokenizer.digest


class TextBatches(TextBlocks):
    """Blocks of tokens, some of which are masked."""

    def __init__(self, dataset: TextDataset, config: TextConfig) -> None:
        super().__init__(dataset)
        self._mask = config.mask
        self._needs_places = config.model.attention != "padded" or config.data.separate_documents

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        blocks = self._dataset.read(micro.sample_ids)
        masks = self._masks(micro.sample_ids, blocks, micro.epoch, seed)
        step_rows = len(masks.rows)
        if len(micro.sample_ids) < len(micro.step_sample_ids):
            of_step = self._dataset.read(micro.step_sample_ids)
            step_rows = len(self._masks(micro.step_sample_ids, of_step, micro.epoch, seed).rows)
        width = blocks.tokens.shape[1]
        padded = bool((blocks.lengths < width).any())
        unpadded = offsets = None
        if padded and self._needs_places:
            unpadded = torch.from_numpy(np.flatnonzero(np.arange(width) < blocks.lengths[:, None]))
        if blocks.offsets is not None:
            offsets = torch.from_numpy(blocks.offsets)
        batch = Batch(
            torch.from_numpy(blocks.tokens),
            torch.from_numpy(masks.rows),
            torch.from_numpy(micro.sample_ids),
            lengths=torch.from_numpy(blocks.lengths) if padded else None,
            unpadded=unpadded,
            masked_inputs=torch.from_numpy(masks.tokens),
            offsets=offsets,
            drop_keys=drop_keys(micro, seed),
        )
        return MicroBatch(batch, step_rows)

    def _masks(self, ids: npt.NDArray[np.int64], blocks: TokenBlocks, epoch: int, seed: int) -> TokenMasks:
        mask, specials = self._mask, self._dataset.specials
        return token_mask_rows(
            seed,
            epoch,
            ids,
            blocks.tokens,
            blocks.lengths,
            prob=mask.prob,
            length=mask.length,
            vocab_size=self._dataset.vocab_size,
            mask_id=specials.mask,
            special_ids=specials.ids,
            keep_prob=mask.keep_prob,
            random_prob=mask.random_prob,
            loss_on_kept=mask.loss_on_kept,
            mask_specials=mask.mask_specials,
        )

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        ids = np.zeros(1, dtype=np.int64)
        self._masks(ids, self._dataset.read(ids), 0, 0)


def largest_batch(config: TextConfig, num_samples: int) -> Batch:
    """Return an uninitialized batch with the largest shapes of a run, on torch's current device."""
    tokens = torch.empty(num_samples, config.data.block_size, dtype=torch.int64)
    # expected share of masked tokens: spans overlap at random
    share = 1 - math.exp(-config.mask.prob)
    rows = torch.empty(int(num_samples * config.data.block_size * share), dtype=torch.int64)
    ids = torch.empty(num_samples, dtype=torch.int64)
    return Batch(tokens, rows, ids, masked_inputs=torch.empty_like(tokens))
