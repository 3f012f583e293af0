"""Batches of curves: sums of two waves in every channel, as functions of the sample's number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from d2v_fast.data.batch import Batch, MicroBatch
from d2v_fast.data.listing import Listing
from d2v_fast.data.makers import drop_keys
from d2v_fast.data.order import MicroStep
from d2v_fast.data.samples import digest_of
from d2v_fast.masking import span_mask_rows
from tests.fake_modality.config import CurvesConfig


class CurvesBatches:
    """See `BatchMaker`."""

    what = "curve"
    lengths: npt.NDArray[np.int64] | None = None
    max_step_length: int | None = None
    vocabulary: str | None = None
    listing = Listing()

    def __init__(self, config: CurvesConfig) -> None:
        self.source, self.num_samples = self, config.data.num_samples
        self.mask, self.length, self.channels = config.mask, config.data.length, config.model.channels
        self.sample_bytes = 4 * self.length * self.channels

    def names_digest(self) -> str:
        """See `SampleSource`."""
        return digest_of(b"waves", np.array(self.num_samples))

    def sizes_digest(self) -> str:
        """See `SampleSource`."""
        return digest_of(np.array((self.length, self.channels)))

    def curves(self, ids: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return curves, fp32 `[B, T, C]`."""
        times, channels = np.arange(self.length)[:, None], np.arange(self.channels)
        waves = [np.sin((1 + i % 5) * times / 3 + i + channels) + np.cos(times * (1 + i % 3) / 2) for i in ids]
        return torch.from_numpy(np.stack(waves).astype(np.float32))

    def make(self, micro: MicroStep, seed: int) -> MicroBatch:
        """See `BatchMaker`."""
        ids = micro.sample_ids
        rows, num_rows = self.rows(seed, micro.epoch, ids), len(self.rows(seed, micro.epoch, micro.step_sample_ids))
        keys = drop_keys(micro, seed)
        batch = Batch(self.curves(ids), torch.from_numpy(rows), torch.from_numpy(ids), drop_keys=keys)
        return MicroBatch(batch, num_rows)

    def rows(self, seed: int, epoch: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the masked points, int64 `[N]`."""
        return span_mask_rows(seed, epoch, ids, self.length, self.mask.prob, self.mask.length, equal_counts=False)

    def warm_up(self) -> None:
        """See `BatchMaker`."""
        self.rows(0, 0, np.zeros(1, dtype=np.int64))


def largest_batch(config: CurvesConfig, num_samples: int) -> Batch:
    """Return a batch of the shapes of the largest that a run has, on torch's current device."""
    inputs = torch.empty(num_samples, config.data.length, config.model.channels)
    rows = torch.empty(num_samples * config.data.length // 2, dtype=torch.int64)
    return Batch(inputs, rows, torch.empty(num_samples, dtype=torch.int64))
