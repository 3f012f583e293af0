"""How samples become batches: the protocol that a modality's batch maker follows, and the maker of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from d2v_fast.data.bad_files import judge_listing
from d2v_fast.data.batch import MicroBatch
from d2v_fast.data.listing import Listing
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import SampleSource
from d2v_fast.masking.streams import DROP, stream_keys
from d2v_fast.modalities import modality_of

if TYPE_CHECKING:
    from d2v_fast.config import D2VConfig, RunConfig

__all__ = ["BatchMaker", "batch_maker", "drop_keys", "resolved"]


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
