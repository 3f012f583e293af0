"""Batches of recordings with several masks each, made in the loader's workers."""

from __future__ import annotations

import numpy as np
import torch

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.makers import empty_masked_batch, masked_batch
from d2v_fast.data.order import MicroStep
from d2v_fast.masking import num_masked_of, several_sequence_masks
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.batches import Utterances
from d2v_fast.modalities.speech.config2 import MaskedSpeechConfig

__all__ = ["MaskedSpeechBatches", "largest_batch"]


class MaskedSpeechBatches(Utterances):
    """Make batches of utterances with several masks each; see `BatchMaker`.

    Masks are drawn after cropping, so that every mask of an utterance hides as many frames.
    """

    def __init__(self, dataset: AudioDataset, config: MaskedSpeechConfig) -> None:
        super().__init__(dataset, config)
        self._mask = config.mask

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        mask = self._mask
        sizes, frames = self._sizes(micro.step_sample_ids)
        step_rows = mask.num_masks * num_masked_of(frames, mask.prob, inverse=mask.inverse)
        start = self._start_in_step(micro)
        stop = start + len(micro.sample_ids)
        waveforms, bad = self._dataset.read(micro.sample_ids, sizes[start:stop], seed, micro.epoch)
        frames = frames[start:stop]
        masks = several_sequence_masks(
            seed,
            micro.epoch,
            micro.sample_ids,
            frames,
            mask.prob,
            mask.length,
            mask.prob_adjust,
            num_masks=mask.num_masks,
            inverse=mask.inverse,
        )
        return MicroBatch(masked_batch(waveforms, masks, micro, seed, lengths=frames, bad=bad), step_rows)

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        ids = np.zeros(1, dtype=np.int64)
        several_sequence_masks(0, 0, ids, np.array([20]), 0.5, 1, 0.0, num_masks=1, inverse=False)


def largest_batch(config: MaskedSpeechConfig, num_samples: int) -> Batch:
    """Return an uninitialized batch with the largest shapes of a run, on torch's current device."""
    length = int(config.data.max_seconds * config.model.sample_rate)
    waveforms = torch.empty(num_samples, length)
    return empty_masked_batch(waveforms, config.mask, config.model.num_frames(length), inverse=config.mask.inverse)
