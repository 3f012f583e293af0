"""What turns the samples of a micro step into a batch with masks, per modality; runs in the loader's workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, ImageDataset
from d2v_fast.data.listing import Listing
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.masking import block_mask_rows, span_mask_rows, token_mask_rows
from d2v_fast.masking.streams import DROP, stream_keys

if TYPE_CHECKING:
    from d2v_fast.config import SpeechConfig, TextConfig, VisionConfig
    from d2v_fast.masking import TokenMasks
    from d2v_fast.modalities.speech.audio import AudioDataset
    from d2v_fast.modalities.text.tasks import TextDataset, TokenBlocks

__all__ = ["BatchMaker", "ImageBatches", "SpeechBatches", "TextBatches"]

# attention and matrix products are fastest on a multiple of so many frames
_FRAME_MULTIPLE = 8


class BatchMaker(Protocol):
    """Makes batches of a data set.

    Attributes:
        what: one sample of it, in a word.
        num_samples: of the data set.
        sample_bytes: of the largest sample in a batch.
        lengths: int64 `[S]`, where samples are not of the same length, and `max_step_length` the largest sum of the
            lengths in a step; both None otherwise.
        listing: what the data set consists of, and what it leaves out.
        vocabulary: digest of what gives the numbers in a batch their meaning; None: they have one of their own.
        source: the data set, which says by digests which samples these are.
    """

    what: str
    num_samples: int
    sample_bytes: int
    lengths: npt.NDArray[np.int64] | None
    max_step_length: int | None
    listing: Listing
    vocabulary: str | None
    source: SampleSource

    def make(self, micro: MicroStep, seed: int) -> Batch:
        """The batch of a micro step: a function of it and the seed.

        Raises:
            DataError: too many files in a row cannot be read.
        """
        ...

    def warm_up(self) -> None:
        """Compile what is compiled at its first use."""
        ...


class ImageBatches:
    """Augmented images under block masks."""

    what = "image"
    lengths: npt.NDArray[np.int64] | None = None
    max_step_length: int | None = None
    vocabulary: str | None = None

    def __init__(self, dataset: ImageDataset, config: VisionConfig) -> None:
        self._dataset, self._mask, self._grid_size = dataset, config.mask, config.model.grid_size
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.source: SampleSource = dataset
        self.sample_bytes = 4 * dataset.channels * dataset.image_size**2

    def make(self, micro: MicroStep, seed: int) -> Batch:
        """See `BatchMaker`."""
        pixels, bad = self._dataset.augmented(micro.sample_ids, seed, micro.epoch)
        rows = self.rows(seed, micro.epoch, micro.sample_ids)
        # cheaper than asking the other processes: a mask is a millionth of a second
        alone = len(micro.sample_ids) == len(micro.step_sample_ids)
        global_rows = len(rows) if alone else len(self.rows(seed, micro.epoch, micro.step_sample_ids))
        ids = torch.from_numpy(micro.sample_ids)
        keys = _drop_keys(micro, seed)
        return Batch(pixels, torch.from_numpy(rows), ids, bad=bad, drop_keys=keys, global_rows=global_rows)

    def rows(self, seed: int, epoch: int, sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 `[N]`, the masked patches of the samples."""
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


class TextBatches:
    """Blocks of tokens of which some are hidden."""

    what = "block"
    max_step_length: int | None = None

    def __init__(self, dataset: TextDataset, config: TextConfig) -> None:
        self._dataset, self._mask = dataset, config.mask
        self.source: SampleSource = dataset
        self._needs_places = config.model.attention == "packed" or config.data.separate_documents
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.lengths: npt.NDArray[np.int64] | None = dataset.lengths
        self.sample_bytes = 16 * int(dataset.lengths.max())
        self.vocabulary: str | None = dataset.tokenizer.digest

    def make(self, micro: MicroStep, seed: int) -> Batch:
        """See `BatchMaker`."""
        blocks = self._dataset.read(micro.sample_ids)
        masks = self._masks(micro.sample_ids, blocks, micro.epoch, seed)
        global_rows = len(masks.rows)
        if len(micro.sample_ids) < len(micro.step_sample_ids):
            of_step = self._dataset.read(micro.step_sample_ids)
            global_rows = len(self._masks(micro.step_sample_ids, of_step, micro.epoch, seed).rows)
        width = blocks.tokens.shape[1]
        padded = bool((blocks.lengths < width).any())
        kept = offsets = None
        if padded and self._needs_places:
            kept = torch.from_numpy(np.flatnonzero(np.arange(width) < blocks.lengths[:, None]))
        if blocks.offsets is not None:
            offsets = torch.from_numpy(blocks.offsets)
        return Batch(
            torch.from_numpy(blocks.tokens),
            torch.from_numpy(masks.rows),
            torch.from_numpy(micro.sample_ids),
            lengths=torch.from_numpy(blocks.lengths) if padded else None,
            kept=kept,
            masked_inputs=torch.from_numpy(masks.tokens),
            offsets=offsets,
            drop_keys=_drop_keys(micro, seed),
            global_rows=global_rows,
        )

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


class SpeechBatches:
    """Parts of utterances under span masks, cropped to the shortest of their step, or padded to the longest of the
    batch."""

    what = "recording"
    vocabulary: str | None = None

    def __init__(self, dataset: AudioDataset, config: SpeechConfig) -> None:
        self._dataset, self._mask, self._model = dataset, config.mask, config.model
        self.source: SampleSource = dataset
        self._crops, self._packs = config.data.lengths == "crop", config.model.attention == "packed"
        self.num_samples, self.listing = len(dataset), dataset.listing
        self.lengths: npt.NDArray[np.int64] | None = dataset.lengths
        seconds = config.data.max_batch_seconds
        self.max_step_length = None if seconds is None else int(seconds * config.model.sample_rate)
        self.sample_bytes = 4 * int(dataset.lengths.max())

    def make(self, micro: MicroStep, seed: int) -> Batch:
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
        # the masks of a step may depend on all of its samples; this part of them starts anew at 0
        start = self._place(micro)
        stop = start + len(micro.sample_ids)
        of_sample, frame = np.divmod(step_rows, frames.max())
        mine = (of_sample >= start) & (of_sample < stop)
        frames = frames[start:stop]
        num_frames = int(frames.max())
        rows = (of_sample[mine] - start) * num_frames + frame[mine]
        waveforms, bad = self._dataset.read(micro.sample_ids, sizes[start:stop], seed, micro.epoch)
        padded = bool((frames < num_frames).any())
        kept = None
        if padded and self._packs:
            kept = torch.from_numpy(np.flatnonzero(np.arange(num_frames) < frames[:, None]))
        return Batch(
            waveforms,
            torch.from_numpy(rows),
            torch.from_numpy(micro.sample_ids),
            lengths=torch.from_numpy(frames) if padded else None,
            kept=kept,
            bad=bad,
            drop_keys=_drop_keys(micro, seed),
            global_rows=len(step_rows),
        )

    def _sizes(self, step_sample_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Samples and frames that a step uses of each of its utterances, int64 `[S]` each."""
        sizes = self._dataset.lengths[step_sample_ids]
        if self._crops:
            num_frames = self._model.num_frames(int(sizes.min()))
            num_frames -= num_frames % _FRAME_MULTIPLE if num_frames >= _FRAME_MULTIPLE else 0
            sizes = np.full_like(sizes, self._model.num_samples(num_frames))
        frames = np.array([self._model.num_frames(int(size)) for size in sizes], dtype=np.int64)
        return sizes, frames

    @staticmethod
    def _place(micro: MicroStep) -> int:
        """Where this part of the step begins."""
        return int(np.flatnonzero(micro.step_sample_ids == micro.sample_ids[0])[0])

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        span_mask_rows(0, 0, np.zeros(1, dtype=np.int64), 20, self._mask.prob, self._mask.length)


def _drop_keys(micro: MicroStep, seed: int) -> npt.NDArray[np.uint64]:
    # an epoch takes a sample once: so these depend on the step, and not on how it is split
    return stream_keys(seed, DROP, micro.epoch, micro.sample_ids)
