"""A data set of tiny images whose workers can be made to fail, and loaders for it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import torch

from d2v_fast.config import BatchSplit, VisionConfig
from d2v_fast.data import ImageDataset, StepLoader
from d2v_fast.data.batch import Drawn
from d2v_fast.data.listing import Listing
from d2v_fast.errors import DataError
from d2v_fast.modalities.vision.batches import ImageBatches
from tests.helpers import loaders


def make_config(num_workers: int = 0, **data: object) -> VisionConfig:
    moving = {"kind": "digits", "rotation_degrees": 10.0, "zoom": 0.1, "shift_pixels": 1.0}
    return VisionConfig.model_validate(
        {
            "model": {"image_size": 8, "patch_size": 2, "channels": 1 if "path" not in data else 3},
            "mask": {"num_patches": 10, "min_patches": 4},
            "data": {**moving, "mean": [0.3], "std": [0.3], "num_workers": num_workers, **data},
            "run": {"seed": 9, "device": "cpu"},
        }
    )


class Squares:
    """A hundred tiny images; the worker that reads sample 50 fails as `trouble` says."""

    image_size = 8
    channels = 1
    value_bytes = 4
    listing = Listing()

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return 100

    def drawn(self, sample_ids: np.ndarray, seed: int, epoch: int) -> Drawn:
        if 50 in sample_ids:
            if self.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "hangs":
                time.sleep(600)
            if self.trouble == "raises":
                raise KeyError("no such square")
            if self.trouble == "data":
                raise DataError("64 files in a row are unreadable")
        return Drawn(
            torch.zeros(len(sample_ids), 1, 8, 8) + torch.from_numpy(sample_ids)[:, None, None, None], None, ()
        )

    def plain(self, sample_ids: np.ndarray) -> torch.Tensor:
        raise NotImplementedError


def make_loader(
    dataset: ImageDataset,
    config: VisionConfig,
    *,
    micro_batch: int,
    accumulation: int = 1,
    world_size: int = 1,
    **options: Any,
) -> StepLoader:
    split = BatchSplit.of(micro_batch, accumulation, world_size)
    return loaders.make_loader(ImageBatches(dataset, config), config, split, **options)
