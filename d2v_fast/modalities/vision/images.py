"""A data set of a folder tree of JPEG, PNG, WebP, TIFF, BMP and GIF files, without labels."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.batch import Drawn, Scale
from d2v_fast.data.files import NUM_CHECKED, PathList, find_files, require_readable, spread, tried_in_order
from d2v_fast.data.listing import ARCHIVES, VIDEOS, FileKinds
from d2v_fast.data.samples import digest_of, file_sizes
from d2v_fast.errors import DataError
from d2v_fast.files.reading import printable
from d2v_fast.masking.streams import AUGMENT, stream_keys, uniforms
from d2v_fast.modalities.vision.bit_depth import Dim
from d2v_fast.modalities.vision.decode import (
    Box,
    Levels,
    Limits,
    Resampler,
    SmallImage,
    UnreadableImage,
    center_box,
    check_header,
    read_square,
)
from d2v_fast.modalities.vision.jitter import jitter_

if TYPE_CHECKING:
    from d2v_fast.modalities.vision.config import ImageModelSection, VisionDataConfig

__all__ = ["KINDS", "ImagesDataset", "random_box"]

_CONVERT = "convert them to PNG or JPEG"
KINDS = FileKinds(
    "images",
    read=(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
    unread={
        **ARCHIVES,
        **dict.fromkeys(VIDEOS, "extract the frames as PNG or JPEG files"),
        **dict.fromkeys((".arrow", ".parquet", ".tfrecord"), "extract the images as files"),
        **dict.fromkeys((".apng", ".avif", ".dcm", ".dds", ".dib", ".exr", ".hdr", ".heic"), _CONVERT),
        **dict.fromkeys((".heif", ".hif", ".ico", ".j2k", ".jp2", ".jpx", ".jxl", ".nii"), _CONVERT),
        **dict.fromkeys((".pbm", ".pcx", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga"), _CONVERT),
        # raw files of cameras
        **dict.fromkeys((".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"), _CONVERT),
    },
)
# formats whose values may have more or fewer than 8 bits
_MANY_DEPTHS = (".png", ".tif", ".tiff")
# headers that are read before training starts, to count unusable images
NUM_HEADERS = 1000
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
NUM_CROP_TRIES = 10

# which random numbers of an image decide what
_CROP = slice(0, 4 * NUM_CROP_TRIES)
_FLIP = _CROP.stop
_JITTER = slice(_FLIP + 1, _FLIP + 5)

_log = logging.getLogger(__name__)


class ImagesDataset:
    """All images below `data.path`, ordered by path, without hidden files and folders.

    Links that lead out of `data.path` are followed only with `data.follow_outside`.

    Augmented images are random resized crops (`crop_scale` of the area, aspect 3/4 to 4/3, cubic), randomly flipped
    left to right, with random brightness, contrast and saturation if `color_jitter` > 0. A file that is unreadable or
    beyond the limits of `data` is replaced by the next readable one.

    Args:
        data: Folder, augmentation and limits.
        model: Image size and channels.
    Attributes:
        listing: The files that are used and those that are not.
    Raises:
        DataError: The folder does not exist, holds no images, or none of those tried can be read.
    """

    value_bytes = 1

    def __init__(self, data: VisionDataConfig, model: ImageModelSection) -> None:
        if model.channels not in (1, 3):
            raise DataError(f"`d2v.model.channels` must be 1 or 3, but is {model.channels} instead.")
        if data.path is None:
            raise DataError("`d2v.data.path` must be the folder that holds the images, but is null instead.")
        self.image_size = model.image_size
        self.channels = model.channels
        self.root = os.path.abspath(data.path)
        self._limits = Limits(
            max_pixels=data.max_image_pixels,
            max_bytes=data.max_image_bytes,
            min_side=data.min_image_side,
            root=None if data.follow_outside else os.path.realpath(self.root),
        )
        paths, self.listing = find_files(self.root, self._limits.root, KINDS)
        self._paths = PathList(paths)
        self._crop_scale = data.crop_scale
        self._flip_prob = data.flip_prob
        self._jitter = data.color_jitter
        # per channel, on the scale of 0 to 255
        of_levels = [(np.array(values, dtype=np.float32) * 255).tolist() for values in (data.mean, data.std)]
        self._scale = Scale(*map(tuple, of_levels))
        self._bit_depth = data.bit_depth
        self._resampler = data.resampler
        self._has_warned_dark = False
        if self._jitter > 0:
            # compile it once here, not in every worker
            jitter_(np.zeros((self.channels, 1, 1), np.uint8), 0.0, [1.0, 1.0, 1.0])
        self._require_readable()
        self._check_depths()
        self._count_unusable()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, sample_id: int) -> Tensor:
        """Return one image, fp32 `[C, H, W]`, normalized, not augmented."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        return self.plain(np.array([sample_id]))[0]

    def exactly(self, sample_id: int) -> Tensor:
        """Return the image that `__getitem__` returns, but never a replacement.

        Raises:
            DataError: The image is unreadable.
        """
        path = self.path(sample_id)
        try:
            return self._scale.applied(self._stacked([self._read(path, center_box)]))[0]
        except UnreadableImage as error:
            raise DataError(printable(f"{path}: {error}")) from None

    def name(self, sample_id: int) -> str:
        """Return the path of a sample's file below the folder."""
        return self._paths[sample_id]

    def path(self, sample_id: int) -> str:
        """Return the path of a sample's file."""
        return os.path.join(self.root, self._paths[sample_id])

    def names_digest(self) -> str:
        """Return a digest of the paths below `data.path`, in order."""
        return digest_of(*self._paths.content)

    def sizes_digest(self) -> str:
        """Return a digest of the files' current sizes."""
        return digest_of(file_sizes(self.root, self._paths))

    def drawn(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> Drawn:
        """See `ImageDataset`. A replacement gets the crop and flip drawn for the unreadable image.

        Raises:
            DataError: An image and the next ones after it are all unreadable.
        """
        draws = uniforms(stream_keys(seed, AUGMENT, epoch, sample_ids), _JITTER.stop)
        squares, bad = [], []
        for sample_id, numbers in zip(sample_ids.tolist(), draws, strict=True):
            choose_box = functools.partial(random_box, numbers[_CROP], self._crop_scale)
            square, failures = self._read_or_replace(sample_id, choose_box, self._resampler)
            squares.append(square[:, ::-1] if numbers[_FLIP] < self._flip_prob else square)
            bad += failures
        levels = self._stacked(squares)
        if self._jitter > 0:
            for level, (order, *strengths) in zip(levels.numpy(), draws[:, _JITTER].tolist(), strict=True):
                jitter_(level, order, [1 + self._jitter * (2 * s - 1) for s in strengths])
        return Drawn(levels, self._scale, tuple(bad))

    def augmented(self, sample_ids: npt.NDArray[np.int64], seed: int, epoch: int) -> tuple[Tensor, tuple[str, ...]]:
        """See `ImageDataset`."""
        levels, _, bad = self.drawn(sample_ids, seed, epoch)
        return self._scale.applied(levels), bad

    def plain(self, sample_ids: npt.NDArray[np.int64]) -> Tensor:
        """See `Dataset`. Return the largest centered squares; log a warning for each unreadable file replaced."""
        squares = []
        for sample_id in sample_ids.tolist():
            square, failures = self._read_or_replace(sample_id, center_box)
            squares.append(square)
            for failure in failures:
                _log.warning("skipped unreadable image: %s", failure)
        return self._scale.applied(self._stacked(squares))

    def _read_or_replace(
        self, sample_id: int, choose_box: Callable[[int, int], Box], resampler: Resampler = "pillow"
    ) -> tuple[Levels, list[str]]:
        failures: list[str] = []
        for distance in tried_in_order(len(self)):
            path = self.path((sample_id + distance) % len(self))
            try:
                return self._read(path, choose_box, resampler), failures
            except UnreadableImage as error:
                failures.append(printable(f"{path}: {error}"))
        raise DataError(
            f"{len(failures)} files in a row are unreadable. Remove or repair them:\n  " + "\n  ".join(failures)
        )

    def _read(self, path: str, choose_box: Callable[[int, int], Box], resampler: Resampler = "pillow") -> Levels:
        # warn once: a folder usually has many such images
        note = None if self._has_warned_dark else functools.partial(self._warn_dark, path)
        return read_square(
            path,
            self.image_size,
            self.channels,
            choose_box,
            self._limits,
            bit_depth=self._bit_depth,
            note=note,
            resampler=resampler,
        )

    def _warn_dark(self, path: str, dim: Dim) -> None:
        self._has_warned_dark = True
        _log.warning("%s: %s", printable(path), dim)

    def _stacked(self, squares: list[Levels]) -> Tensor:
        levels = np.empty((len(squares), self.channels, self.image_size, self.image_size), dtype=np.uint8)
        for level, square in zip(levels, squares, strict=True):
            level[...] = np.atleast_3d(square).transpose(2, 0, 1)
        return torch.from_numpy(levels)

    def _check_depths(self) -> None:
        """Warn before training if the values of sampled images need fewer bits than are stored."""
        for sample_id in spread(len(self), NUM_CHECKED):
            path = self.path(sample_id)
            if path.lower().endswith(_MANY_DEPTHS) and not self._has_warned_dark:
                # unreadable files are reported elsewhere
                with contextlib.suppress(UnreadableImage):
                    self._read(path, center_box)

    def _count_unusable(self) -> None:
        """Record in the listing how many images will be replaced, judged by their headers."""
        small: list[str] = []
        unreadable: list[str] = []
        ids = spread(len(self), NUM_HEADERS)
        for sample_id in ids:
            try:
                check_header(self.path(sample_id), self._limits)
            except UnreadableImage as error:
                kind = small if isinstance(error, SmallImage) else unreadable
                kind.append(printable(self._paths[sample_id]))
        of_all = "" if len(ids) == len(self) else f" (of {len(ids):,} whose headers were read)"
        limit = f"`d2v.data.min_image_side` ({self._limits.min_side})"
        for found, why in ((small, f"smaller than {limit}"), (unreadable, "unreadable")):
            if found:
                reason = f"{why}{of_all}, such as {found[0]}; training replaces it by another"
                self.listing = self.listing.without(len(found), "image", reason)

    def _require_readable(self) -> None:
        """Raise DataError before training if none of a few spread samples can be read."""
        require_readable(
            spread(len(self), NUM_CHECKED),
            lambda sample_id: self._read(self.path(sample_id), center_box),
            self.path,
            f"{len(self)} in '{printable(self.root)}'",
            "images",
        )


def random_box(numbers: npt.NDArray[np.float64], scale: tuple[float, float], width: int, height: int) -> Box:
    """Return the box (left, top, width, height) of an Inception-style random resized crop.

    Args:
        numbers: fp64 `[40]`, uniform in [0, 1), four for each of ten tries.
        scale: Smallest and largest share of the image's area.
        width, height: The image's size in pixels.
    """
    log_low, log_high = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    low, high = scale
    for share, ratio, across, down in numbers.reshape(-1, 4).tolist():
        area = width * height * (low + (high - low) * share)
        aspect = math.exp(log_low + (log_high - log_low) * ratio)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = math.floor(across * (width - crop_width + 1))
            return left, math.floor(down * (height - crop_height + 1)), crop_width, crop_height
    # a very long or very small image: take the largest centered crop of an allowed aspect
    crop_width = max(1, min(width, round(height * MAX_ASPECT)))
    crop_height = max(1, min(height, round(width / MIN_ASPECT)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
