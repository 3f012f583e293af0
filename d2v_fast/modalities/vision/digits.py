"""The 1,797 handwritten digits that scikit-learn ships, which need no download.

Each is an 8x8 scan in 17 gray levels (UCI, Optical Recognition of Handwritten Digits). A fixed part is held out from
pre-training, which sees no labels. Only `digit_classes` and `digits_for_probe` return labels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.batch import Drawn
from d2v_fast.data.listing import Listing
from d2v_fast.data.samples import digest_of
from d2v_fast.errors import DataError
from d2v_fast.masking.streams import AUGMENT, SPLIT, permutation, stream_keys, uniforms
from d2v_fast.modalities.vision.affine import warp

if TYPE_CHECKING:
    from d2v_fast.modalities.vision.config import ImageModelSection, ImagesConfig, VisionDataConfig

__all__ = ["DigitsDataset", "ProbeData", "digit_classes", "digits_for_probe"]

SCAN_SIZE = 8

# the same digits are held out in every run, so that scores of different runs are comparable
SPLIT_SEED = 0


@dataclass(frozen=True)
class ProbeData:
    """Labeled images for a probe.

    Attributes:
        images: fp32 `[S, C, H, W]`, normalized for the encoder, not augmented.
        labels: int64 `[S]`.
        train_indices, test_indices: int64 positions in `images`. Pre-training saw only the train part.
    """

    images: Tensor
    labels: Tensor
    train_indices: Tensor
    test_indices: Tensor


class DigitsDataset:
    """The digits of one split, without labels.

    Augmented digits are rotated, zoomed and shifted in one cubic resampling; pixels outside the scan are background.
    The other options of `VisionDataConfig` (crop, flip, color) are for photographs and have no effect here.
    """

    channels = 1
    value_bytes = 4
    listing = Listing()

    def __init__(
        self, data: VisionDataConfig, model: ImageModelSection, split: Literal["train", "test"] = "train"
    ) -> None:
        if model.channels != 1:
            raise DataError(f"`d2v.model.channels` must be 1 for digits, but is {model.channels} instead.")
        scans, labels = _load_scans()
        train, test = _split(labels, data.test_fraction)
        self.image_size = model.image_size
        self._scans = scans[train if split == "train" else test]
        self._mean, self._std = data.mean[0], data.std[0]
        self._max_turn = math.radians(data.rotation_degrees)
        self._max_log_zoom = math.log1p(data.zoom)
        # from pixels of the model's input to pixels of the scan
        self._max_shift = data.shift_pixels * SCAN_SIZE / model.image_size
        # compile the resampling once here, not in every worker
        self.plain(np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._scans)

    def __getitem__(self, sample_id: int) -> Tensor:
        """Return one digit, fp32 `[1, H, W]`, normalized, not augmented."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return self.plain(np.array([sample_id]))[0]

    def drawn(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> Drawn:
        """See `ImageDataset`."""
        pixels, bad = self.augmented(sample_ids, seed, epoch)
        return Drawn(pixels, None, bad)

    def augmented(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> tuple[Tensor, tuple[str, ...]]:
        """See `Dataset`; no digit is replaced."""
        draws = 2 * uniforms(stream_keys(seed, AUGMENT, epoch, sample_ids), 4) - 1
        limits = np.array([self._max_turn, self._max_log_zoom, self._max_shift, self._max_shift])
        return self._pixels(sample_ids, draws * limits), ()

    def names_digest(self) -> str:
        """Return a digest of the scans, which have no names."""
        return digest_of(self._scans)

    def sizes_digest(self) -> str:
        """Return a digest of the scans' shape."""
        return digest_of(str(self._scans.shape).encode())

    def plain(self, sample_ids: npt.NDArray[np.int64]) -> Tensor:
        """See `Dataset`."""
        return self._pixels(sample_ids, np.zeros((len(sample_ids), 4)))

    def _pixels(self, sample_ids: npt.NDArray[np.int64], motions: npt.NDArray[np.float64]) -> Tensor:
        pixels = np.empty((len(sample_ids), 1, self.image_size, self.image_size), dtype=np.float32)
        warp(pixels[:, 0], self._scans, np.ascontiguousarray(sample_ids), motions)
        return torch.from_numpy(pixels).sub_(self._mean).div_(self._std)


def digit_classes(data: VisionDataConfig, split: Literal["train", "test"]) -> npt.NDArray[np.int64]:
    """Return the digit on each scan of `DigitsDataset`, int64 `[S]`."""
    _, labels = _load_scans()
    train, test = _split(labels, data.test_fraction)
    return labels[train if split == "train" else test]


def digits_for_probe(config: ImagesConfig) -> ProbeData:
    """Return all digits with their labels, and the split into the pre-training part and the held-out part."""
    _, labels = _load_scans()
    train, test = _split(labels, config.data.test_fraction)
    images = torch.empty(len(labels), 1, config.model.image_size, config.model.image_size)
    train_set = DigitsDataset(config.data, config.model, "train")
    test_set = DigitsDataset(config.data, config.model, "test")
    for dataset, indices in ((train_set, train), (test_set, test)):
        images[indices] = dataset.plain(np.arange(len(dataset), dtype=np.int64))
    return ProbeData(images, torch.tensor(labels), torch.from_numpy(train), torch.from_numpy(test))


@functools.cache
def _load_scans() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return scans, fp32 `[S, 8, 8]` in [0, 1], and labels, int64 `[S]`."""
    # a slow import, needed only here
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    # shared by all that read them
    for shared in (scans, labels):
        shared.setflags(write=False)
    return scans, labels


def _split(labels: npt.NDArray[np.int64], test_fraction: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return sorted train and test positions, stratified by class."""
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = permutation(SPLIT_SEED, SPLIT, int(label), len(members))
        num_test = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        held_out[members[order[:num_test]]] = True
    return np.flatnonzero(~held_out).astype(np.int64), np.flatnonzero(held_out).astype(np.int64)
