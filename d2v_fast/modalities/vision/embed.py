"""Inputs of `d2v-fast embed` and of the probe for images."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_fast.config.errors import check
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.files.reading import printable, read_json
from d2v_fast.modalities.vision.config import ImageModelSection, VisionDataConfig
from d2v_fast.modalities.vision.decode import Limits, center_box, read_square
from d2v_fast.modalities.vision.images import KINDS
from d2v_fast.models.student import Student

PREPROCESSOR = "preprocessor_config.json"

_log = logging.getLogger(__name__)


def open_images(encoder: Encoder, inputs: Path, tokenizer: Path | None = None) -> Source:
    """Return the images of a folder, normalized as the encoder's run or Transformers folder says.

    Raises:
        ValueError: The preprocessor configuration is invalid, or there are no images.
    """
    data = _preparation(encoder.folder, encoder.config) if encoder.run is None else encoder.run.data
    return Images(encoder.model, encoder.origin, inputs, encoder.config, data)


class Images(Source):
    """Images without augmentation: the largest centered square, resized to the model's input."""

    what = "image"
    batch_size = 64

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: ImageModelSection,
        data: VisionDataConfig,
        paths: list[str] | None = None,
    ) -> None:
        super().__init__(model, origin, inputs, KINDS, data.follow_outside, paths)
        self._limits = Limits(data.max_image_pixels, data.max_image_bytes, data.min_image_side, self._inside)
        self._size_px, self._channels = config.image_size, config.channels
        self._bit_depth, self._has_warned_dark = data.bit_depth, False
        # per channel, on the scale of 0 to 255
        self._mean, self._std = (np.array(v, np.float32)[:, None, None] * 255 for v in (data.mean, data.std))

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        yield from self._decoded(self._decode)

    def _decode(self, path: str) -> list[Tensor]:
        note = None if self._has_warned_dark else functools.partial(self._warn_dark, path)
        square = read_square(
            path, self._size_px, self._channels, center_box, self._limits, bit_depth=self._bit_depth, note=note
        )
        levels = np.atleast_3d(square).transpose(2, 0, 1).astype(np.float32)
        return [torch.from_numpy((levels - self._mean) / self._std)]

    def _warn_dark(self, path: str, dim: Any) -> None:
        # each of several threads may log it once
        self._has_warned_dark = True
        _log.warning("%s: %s (in a Transformers folder: `bit_depth` in its %s)", printable(path), dim, PREPROCESSOR)


def _preparation(folder: Path, model: ImageModelSection) -> VisionDataConfig:
    """Read mean, standard deviation and bit depth from a Transformers folder; the defaults are ImageNet's."""
    path = folder / PREPROCESSOR
    try:
        raw = read_json(path, MAX_FILE_BYTES) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must be a preprocessor configuration, but: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"`{path}` must hold one section {{...}}, but does not.")
    named = {"mean": "image_mean", "std": "image_std", "bit_depth": "bit_depth"}
    data, problems = check(VisionDataConfig, {ours: raw[theirs] for ours, theirs in named.items() if theirs in raw})
    if data is None:
        raise ValueError(f"`{path}` is not a valid preprocessor configuration: {problems[0]}")
    for values, key in ((data.mean, "image_mean"), (data.std, "image_std")):
        if len(values) not in (1, model.channels):
            raise ValueError(f"`{key}` in {path} must hold {model.channels} values, but holds {len(values)} instead.")
    return data
