"""Make batches of recordings with span masks, in the loader's workers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.masking import span_mask_rows
from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.config import RecordingInputsConfig, SpeechConfig
from d2v_fast.modalities.speech.samples import SpeechSamples

__all__ = ["SpeechBatches", "Utterances", "largest_batch", "speech_dataset"]

# attention and matrix products are fastest when the number of frames is a multiple of 8
_FRAME_MULTIPLE = 8


def speech_dataset(config: RecordingInputsConfig) -> AudioDataset:
    """Open the recordings selected by `data.kind`.

    Raises:
        DataError: The data set has no usable recordings.
    """
    kind = SpeechSamples if config.data.kind == "speech" else AudioDataset
    return kind(config.data, config.model)


class Utterances:
    """What every maker of batches of utterances has; see `BatchMaker`.

    Utterances are cropped to the shortest of the step or padded to the longest of the batch.
    """

    what = "recording"
    vocabulary: str | None = None

    def __init__(self, dataset: AudioDataset, config: RecordingInputsConfig) -> None:
        self._dataset, self._model = dataset, config.model
        self.source: SampleSource = dataset
        self._crops = config.data.lengths == "crop"
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.lengths: npt.NDArray[np.int64] | None = dataset.lengths
        seconds = config.data.max_batch_seconds
        self.max_step_length = None if seconds is None else int(seconds * config.model.sample_rate)
        self.sample_bytes = 4 * int(dataset.lengths.max())

    def _sizes(self, step_sample_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the number of samples and of frames used of each utterance of a step, int64 `[S]` each."""
        sizes = self._dataset.lengths[step_sample_ids]
        if self._crops:
            num_frames = self._model.num_frames(int(sizes.min()))
            num_frames -= num_frames % _FRAME_MULTIPLE if num_frames >= _FRAME_MULTIPLE else 0
            sizes = np.full_like(sizes, self._model.num_samples(num_frames))
        frames = np.array([self._model.num_frames(int(size)) for size in sizes], dtype=np.int64)
        return sizes, frames

    @staticmethod
    def _start_in_step(micro: MicroStep) -> int:
        """Return the position of this micro-batch's first sample within its step."""
        return int(np.flatnonzero(micro.step_sample_ids == micro.sample_ids[0])[0])


class SpeechBatches(Utterances):
    """Make batches of utterances with span masks."""

    def __init__(self, dataset: AudioDataset, config: SpeechConfig) -> None:
        super().__init__(dataset, config)
        self._mask, self._packs = config.mask, config.model.attention != "padded"

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        sizes, frames = self._sizes(micro.step_sample_ids)
        step_rows = span_mask_rows(
            seed,
            micro.epoch,
            micro.step_sample_ids,
            int(frames.max()),
            self._mask.prob,
            self._mask.length,
            min_masks=self._mask.min_masks,
            equal_counts=self._mask.equal_counts,
            lengths=frames,
        )
        # masks may depend on all samples of the step: select this micro-batch's rows and shift them to start at 0
        start = self._start_in_step(micro)
        stop = start + len(micro.sample_ids)
        of_sample, frame = np.divmod(step_rows, frames.max())
        is_own = (of_sample >= start) & (of_sample < stop)
        frames = frames[start:stop]
        num_frames = int(frames.max())
        rows = (of_sample[is_own] - start) * num_frames + frame[is_own]
        waveforms, bad = self._dataset.read(micro.sample_ids, sizes[start:stop], seed, micro.epoch)
        padded = bool((frames < num_frames).any())
        unpadded = None
        if padded and self._packs:
            unpadded = torch.from_numpy(np.flatnonzero(np.arange(num_frames) < frames[:, None]))
        batch = Batch(
            waveforms,
            torch.from_numpy(rows),
            torch.from_numpy(micro.sample_ids),
            lengths=torch.from_numpy(frames) if padded else None,
            unpadded=unpadded,
            bad=bad,
            drop_keys=drop_keys(micro, seed),
        )
        return MicroBatch(batch, len(step_rows))

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        span_mask_rows(0, 0, np.zeros(1, dtype=np.int64), 20, self._mask.prob, self._mask.length)


def largest_batch(config: SpeechConfig, num_samples: int) -> Batch:
    """Return an uninitialized batch with the largest shapes of a run, on torch's current device."""
    length = int(config.data.max_seconds * config.model.sample_rate)
    # expected share of masked frames when spans overlap at random
    share = 1 - math.exp(-config.mask.prob)
    rows = torch.empty(int(num_samples * config.model.num_frames(length) * share), dtype=torch.int64)
    return Batch(torch.empty(num_samples, length), rows, torch.empty(num_samples, dtype=torch.int64))
