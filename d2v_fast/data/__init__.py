"""Data: which images there are, how they are read and changed at random, and in which order they are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from d2v_fast.data.batch import Batch, DataError, Dataset
from d2v_fast.data.digits import DigitsDataset, ProbeData, digits_for_probe
from d2v_fast.data.images import ImagesDataset
from d2v_fast.data.loader import StepLoader, worker_died

if TYPE_CHECKING:
    from d2v_fast.config import DataConfig, VisionModelConfig

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "DigitsDataset",
    "ImagesDataset",
    "ProbeData",
    "StepLoader",
    "build_dataset",
    "digits_for_probe",
    "worker_died",
]


def build_dataset(
    data: DataConfig, model: VisionModelConfig, split: Literal["train", "test"] = "train"
) -> DigitsDataset | ImagesDataset:
    """The data set that `data.kind` names, with images of the size that the model reads.

    Args:
        split: "test" is the held-out part of the digits; a folder of images has none.
    Raises:
        DataError: if there is nothing to read, or the model does not fit it.
    """
    if data.kind == "digits":
        return DigitsDataset(data, model, split)
    if split != "train":
        raise DataError(f'`split` must be "train" for a folder of images, but is "{split}" instead.')
    return ImagesDataset(data, model)
