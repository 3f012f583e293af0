"""Read recordings for `d2v-fast embed` and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from d2v_fast.data.files import UnreadableFile
from d2v_fast.evaluation.inputs import Encoder, Sample, Source
from d2v_fast.modalities.speech.audio import KINDS, normalized
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelSection
from d2v_fast.modalities.speech.decode import AudioLimits, import_audio, read_header, read_part, read_whole
from d2v_fast.models.student import Student


def open_recordings(encoder: Encoder, inputs: Path, tokenizer: Path | None = None) -> Source:
    """Open the recordings of a folder.

    Raises:
        ValueError: The folder has no recordings, or a package is missing.
    """
    data = SpeechDataConfig() if encoder.run is None else encoder.run.data
    return Recordings(encoder.model, encoder.origin, inputs, encoder.config, data)


class Recordings(Source):
    """Whole recordings. Those longer than the run's `max_seconds` are encoded in parts of equal length."""

    what = "recording"
    batch_size = 8

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: SpeechModelSection,
        data: SpeechDataConfig,
        paths: list[str] | None = None,
    ) -> None:
        import_audio("soundfile")
        super().__init__(model, origin, inputs, KINDS, data.follow_outside, paths)
        self._limits = AudioLimits(config.sample_rate, data.max_file_bytes, data.silence, self._inside)
        self._fewest = config.receptive_field
        self._most = max(int(data.max_seconds * config.sample_rate), 2 * self._fewest)
        self.num_places = config.num_frames

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        yield from self._decoded(self._decode)

    def _decode(self, path: str) -> list[Tensor]:
        wave = normalized(read_whole(path, self._limits))
        if len(wave) < self._fewest:
            raise UnreadableFile(f"{len(wave)} samples are too few: a frame needs {self._fewest}")
        return list(wave.tensor_split(-(-len(wave) // self._most)))


class Middles(Recordings):
    """The middle part of each recording, no longer than `max_seconds` or the run's own limit."""

    def __init__(
        self,
        model: Student,
        inputs: Path,
        config: SpeechModelSection,
        data: SpeechDataConfig,
        paths: list[str],
        max_seconds: float,
    ) -> None:
        super().__init__(model, "", inputs, config, data, paths)
        self._most = min(self._most, max(int(max_seconds * config.sample_rate), 2 * self._fewest))

    def _decode(self, path: str) -> list[Tensor]:
        if read_header(path, self._limits).length(self._limits.sample_rate) <= self._most:
            return [torch.cat(super()._decode(path))]
        return [normalized(read_part(path, self._most, 0.5, self._limits))]
