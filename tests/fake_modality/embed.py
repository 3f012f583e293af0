"""Curves in files, for `d2v-fast embed` and the probe: every `.npy` holds one, fp32 `[T, C]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2v_fast.data.files import UnreadableFile
from d2v_fast.data.listing import FileKinds
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.models.student import Student
from tests.fake_modality.config import CurvesConfig

KINDS = FileKinds("curves", (".npy",), {})


class Curves(Source):
    """All curves of a folder, which have the length that the encoder was trained with."""

    what = "curve"
    batch_size = 16

    def __init__(
        self, model: Student, origin: str, inputs: Path, config: CurvesConfig, paths: list[str] | None = None
    ) -> None:
        super().__init__(model, origin, inputs, KINDS, False, paths)
        self._shape = (config.data.length, config.model.channels)

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        yield from self._decoded(self._decode)

    def _decode(self, path: str) -> list[Tensor]:
        try:
            curve = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise UnreadableFile(f"not an .npy file: {error}") from None
        if curve.shape != self._shape:
            raise UnreadableFile(f"its shape must be {self._shape}, but is {curve.shape} instead")
        return [torch.from_numpy(curve.astype(np.float32))]


def open_curves(encoder: Encoder, inputs: Path) -> Source:
    """Return the curves of a folder."""
    return Curves(encoder.model, encoder.origin, inputs, encoder.run)
