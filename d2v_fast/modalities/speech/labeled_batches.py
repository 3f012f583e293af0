"""Make batches of labeled recordings, in the loader's workers.

Shape letters: B samples, T frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.few import LabeledSubset
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.errors import DataError
from d2v_fast.masking import channel_mask_rows, span_mask_rows
from d2v_fast.masking.streams import AUGMENT, stream_keys, uniforms
from d2v_fast.modalities.speech.config import SpeechModelConfig, SpeechModelSection
from d2v_fast.modalities.speech.config_finetune import (
    FinetuneMaskConfig,
    SpeechClassifyConfig,
    SpeechCtcConfig,
    SpeechFinetuneConfig,
)
from d2v_fast.modalities.speech.labeled import Chosen, recordings_held_out, recordings_to_train
from d2v_fast.modalities.speech.vocabulary import Vocabulary

__all__ = [
    "Classes",
    "HeldOutRecordings",
    "LabeledRecordings",
    "Transcripts",
    "batch_of",
    "held_out_recordings",
    "labeled_recordings",
    "largest_batch",
]


class Targets(ABC):
    """What the head should answer to recordings."""

    @abstractmethod
    def of(self, sample_ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Return `Batch.targets` and `Batch.target_lengths` of samples."""

    @abstractmethod
    def references(self) -> list[Any]:
        """Return `HeldOut.targets` of all samples."""


class Classes(Targets):
    """A class per recording.

    Args:
        classes: int64 `[S]`.
    """

    def __init__(self, classes: npt.NDArray[np.int64]) -> None:
        self._classes = classes

    def of(self, sample_ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """See `Targets`."""
        return torch.from_numpy(self._classes[sample_ids]), None

    def references(self) -> list[Any]:
        """See `Targets`: the number of the class."""
        return self._classes.tolist()


class Transcripts(Targets):
    """The letters of a transcript per recording.

    Args:
        texts: the transcripts.
        vocabulary: their letters.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary) -> None:
        self._texts = list(texts)
        letters = [vocabulary.encode(text) for text in texts]
        self._ends = np.cumsum([len(classes) for classes in letters], dtype=np.int64)
        self._letters = np.array([letter for classes in letters for letter in classes], dtype=np.int64)

    def of(self, sample_ids: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """See `Targets`."""
        starts = np.where(sample_ids > 0, self._ends[sample_ids - 1], 0)
        lengths = self._ends[sample_ids] - starts
        parts = [self._letters[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(lengths)

    def references(self) -> list[Any]:
        """See `Targets`: the transcript, with its characters outside the vocabulary."""
        return self._texts


class Recordings:
    """What makers of batches of labeled recordings share; see `BatchMaker`.

    Args:
        chosen: recordings and labels.
        targets: what the labels mean for the head.
        config: the run's section.
    """

    what = "recording"
    vocabulary: str | None = None

    def __init__(self, chosen: Chosen, targets: Targets, config: SpeechFinetuneConfig) -> None:
        self._dataset, self._targets, self._model = chosen.dataset, targets, config.model
        self._packs = isinstance(config.model, SpeechModelConfig) and config.model.attention != "padded"
        seconds = config.data.max_batch_seconds
        self.max_step_length = None if seconds is None else int(seconds * config.model.sample_rate)
        self.num_samples, self.listing = len(chosen.dataset), chosen.dataset.listing
        self.lengths: npt.NDArray[np.int64] | None = chosen.dataset.lengths
        self.sample_bytes = 4 * int(chosen.dataset.lengths.max(initial=0))
        positions = np.arange(self.num_samples, dtype=np.int64)
        self.source: SampleSource = LabeledSubset(chosen.dataset, positions, chosen.labels)

    def _batch(self, waves: list[Tensor], read: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64]) -> Batch:
        """Return a batch of waveforms, which are of the samples `read`, without masks."""
        targets, target_lengths = self._targets.of(read)
        batch = padded_batch(waves, self._model, packs=self._packs)
        ids = torch.from_numpy(sample_ids)
        return replace(batch, sample_ids=ids, targets=targets, target_lengths=target_lengths)


class LabeledRecordings(Recordings):
    """Make batches of recordings with masks of frames and channels."""

    def __init__(self, chosen: Chosen, targets: Targets, config: SpeechFinetuneConfig) -> None:
        super().__init__(chosen, targets, config)
        self._mask = config.mask

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`. A step has as many rows as samples."""
        ids = micro.sample_ids
        places = uniforms(stream_keys(seed, AUGMENT, micro.epoch, ids), 1)[:, 0]
        waves, read, bad = self._dataset.read_labeled(ids, places)
        batch = self._batch(waves, read, ids)
        frames = np.array([self._model.num_frames(len(wave)) for wave in waves], dtype=np.int64)
        rows, channels = masks(self._mask, micro, seed, frames, self._model.width)
        batch = replace(batch, rows=rows, channel_rows=channels, bad=bad, drop_keys=drop_keys(micro, seed))
        return MicroBatch(batch, len(micro.step_sample_ids))

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        ids = np.zeros(1, dtype=np.int64)
        masks(self._mask, MicroStep(0, ids, ids), 0, np.array([20]), self._model.width)


class HeldOutRecordings(Recordings):
    """Make batches of whole held-out recordings, or of the middle of longer ones; see `HeldOut`.

    Recordings are ordered by length, so that batches need little padding.
    """

    def __init__(self, chosen: Chosen, targets: Targets, config: SpeechFinetuneConfig) -> None:
        super().__init__(chosen, targets, config)
        self._order = np.argsort(-chosen.dataset.lengths, kind="stable").astype(np.int64)
        references = targets.references()
        self.targets: list[Any] = [references[position] for position in self._order.tolist()]

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`.

        Raises:
            DataError: a recording cannot be read: it has no answer, and another one would count twice.
        """
        positions = self._order[micro.sample_ids]
        waves, read, bad = self._dataset.read_labeled(positions, np.full(len(positions), 0.5))
        if bad:
            raise DataError(f"held-out recordings must be readable. Repair or remove {bad[0]}")
        return MicroBatch(self._batch(waves, read, micro.sample_ids), len(micro.step_sample_ids))

    def warm_up(self) -> None:
        """See `BatchMaker`."""


def masks(
    mask: FinetuneMaskConfig, micro: MicroStep, seed: int, frames: npt.NDArray[np.int64], num_channels: int
) -> tuple[Tensor, Tensor | None]:
    """Return `Batch.rows` and `Batch.channel_rows` of samples with so many frames, int64 `[B]`."""
    rows, most = np.zeros(0, dtype=np.int64), int(frames.max())
    if mask.prob > 0 and most >= 2:
        rows = span_mask_rows(
            seed, micro.epoch, micro.sample_ids, most, mask.prob, mask.length, equal_counts=False, lengths=frames
        )
    if mask.channel_prob == 0:
        return torch.from_numpy(rows), None
    channels = channel_mask_rows(
        seed, micro.epoch, micro.sample_ids, num_channels, mask.channel_prob, mask.channel_length
    )
    return torch.from_numpy(rows), torch.from_numpy(channels)


def padded_batch(waves: Sequence[Tensor], model: SpeechModelSection, *, packs: bool = False) -> Batch:
    """Return a batch of waveforms fp32 `[N]`, padded with zeros, without masks or targets.

    Args:
        waves: the waveforms, normalized.
        model: the model section.
        packs: whether the encoder skips padding.
    """
    frames = torch.tensor([model.num_frames(len(wave)) for wave in waves], dtype=torch.int64)
    most = int(frames.max())
    is_padded = bool((frames < most).any())
    unpadded = torch.nonzero((torch.arange(most) < frames[:, None]).flatten())[:, 0] if is_padded and packs else None
    return Batch(
        pad_sequence(list(waves), batch_first=True),
        torch.empty(0, dtype=torch.int64),
        torch.arange(len(waves)),
        lengths=frames if is_padded else None,
        unpadded=unpadded,
    )


def batch_of(config: SpeechFinetuneConfig, parts: list[Tensor]) -> Batch:
    """Return a batch of waveforms without targets."""
    return padded_batch(parts, config.model)


def largest_batch(config: SpeechFinetuneConfig, num_samples: int) -> Batch:
    """Return an uninitialized batch with the largest shapes of a run, on torch's current device."""
    length = int(config.data.max_seconds * config.model.sample_rate)
    ids = torch.zeros(num_samples, dtype=torch.int64)
    targets, target_lengths = ids, None
    if isinstance(config, SpeechCtcConfig):
        # a letter in every second frame, which is more than anybody says
        num_letters = max(1, config.model.num_frames(length) // 2)
        target_lengths = torch.full((num_samples,), num_letters, dtype=torch.int64)
        targets = torch.ones(num_samples * num_letters, dtype=torch.int64)
    rows = torch.zeros(0, dtype=torch.int64)
    return Batch(torch.empty(num_samples, length), rows, ids, targets=targets, target_lengths=target_lengths)


def labeled_recordings(config: SpeechCtcConfig | SpeechClassifyConfig) -> LabeledRecordings:
    """Return the maker of the training batches.

    Raises:
        DataError: see `recordings_to_train`.
    """
    chosen = recordings_to_train(config)
    return LabeledRecordings(chosen, _targets(chosen, config), config)


def held_out_recordings(config: SpeechCtcConfig | SpeechClassifyConfig) -> HeldOutRecordings:
    """Return the maker of the held-out batches.

    Raises:
        DataError: see `recordings_held_out`.
    """
    chosen = recordings_held_out(config)
    return HeldOutRecordings(chosen, _targets(chosen, config), config)


def _targets(chosen: Chosen, config: SpeechCtcConfig | SpeechClassifyConfig) -> Targets:
    labels = config.labels or ()
    if isinstance(config, SpeechCtcConfig):
        return Transcripts(chosen.labels, Vocabulary(labels))
    return Classes(np.array([labels.index(label) for label in chosen.labels], dtype=np.int64))
