"""How samples become batches: the protocol that a modality's batch maker follows, and the maker of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.bad_files import judge_listing
from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.listing import Listing
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.masking import SeveralMasks, num_masked
from d2v_fast.masking.streams import DROP, NOISE, clone_keys, stream_keys
from d2v_fast.modalities import modality_of

if TYPE_CHECKING:
    from d2v_fast.config import D2VConfig, RunConfig
    from d2v_fast.config.data2vec2 import MultiMaskSection

__all__ = ["BatchMaker", "batch_maker", "drop_keys", "empty_masked_batch", "masked_batch", "resolved"]


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

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """The batch of a micro step: a function of it and the seed.

        Raises:
            DataError: too many files in a row cannot be read.
        """
        ...

    def warm_up(self) -> None:
        """Compile what is compiled at its first use."""
        ...


def batch_maker(config: D2VConfig) -> BatchMaker:
    """Return the maker of a run's training batches.

    Raises:
        DataError: there is nothing to read, too much of it is unreadable, or the model does not fit it.
    """
    maker = modality_of(config).batches(config)
    judge_listing(config.data, maker)
    return maker


def resolved(config: RunConfig) -> RunConfig:
    """Return the configuration with everything filled in that follows from the data, such as a vocabulary's size.

    Raises:
        DataError: the data that it follows from cannot be read.
    """
    return config.model_copy(update={"d2v": modality_of(config.d2v).resolved(config.d2v)})


def drop_keys(micro: MicroStep, seed: int) -> npt.NDArray[np.uint64]:
    """Return `Batch.drop_keys` of a micro step, uint64 `[B]`.

    An epoch has every sample once, so the keys do not depend on how a step is split.
    """
    return stream_keys(seed, DROP, micro.epoch, micro.sample_ids)


def empty_masked_batch(inputs: Tensor, mask: MultiMaskSection, num_places: int, *, inverse: bool) -> Batch:
    """Return a batch with several masks per sample, without padding and values, on torch's current device.

    Args:
        inputs: As in `Batch`, `[B, ...]`.
        mask: Masks per sample, and the share of masked places.
        num_places: Of each sample, P.
        inverse: Whether the visible places are counted off, or the masked ones.
    """
    num_rows = len(inputs) * mask.num_masks
    hidden = num_masked(num_places, mask.prob, inverse=inverse)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    return Batch(
        inputs,
        integers(num_rows * hidden),
        integers(len(inputs)),
        visible=integers(num_rows, num_places - hidden),
        noise_keys=integers(num_rows),
    )


def masked_batch(
    inputs: Tensor,
    masks: SeveralMasks,
    micro: MicroStep,
    seed: int,
    *,
    lengths: npt.NDArray[np.int64] | None = None,
    bad: tuple[str, ...] = (),
) -> Batch:
    """Return a batch with several masks per sample.

    Args:
        inputs: As in `Batch`.
        masks: Of the samples of `micro`.
        micro: The micro-step.
        seed: Of the run.
        lengths: int64 `[B]`, places of each sample; None or all equal: no padding.
        bad: As in `Batch`.
    """
    num_masks = len(masks.visible) // len(micro.sample_ids)
    padded = lengths is not None and int(lengths.min()) < int(lengths.max())
    noise = clone_keys(stream_keys(seed, NOISE, micro.epoch, micro.sample_ids), num_masks)
    counts = masks.visible_lengths
    return Batch(
        inputs,
        torch.from_numpy(masks.rows),
        torch.from_numpy(micro.sample_ids),
        lengths=torch.from_numpy(lengths) if padded else None,
        bad=bad,
        drop_keys=clone_keys(drop_keys(micro, seed), num_masks).reshape(-1),
        visible=torch.from_numpy(masks.visible),
        visible_lengths=None if counts is None else torch.from_numpy(counts),
        noise_keys=torch.from_numpy(noise.reshape(-1).view(np.int64)),
    )
