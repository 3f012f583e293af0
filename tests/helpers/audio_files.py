"""Recordings and manifests in a folder, and data sets of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d2v_fast.modalities.speech.audio import AudioDataset
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelConfig

RATE = 16_000


def make_dataset(path: Path, sample_rate: int = RATE, **data: object) -> AudioDataset:
    options = {"kind": "audio", "path": str(path), "min_seconds": 0.5, "max_seconds": 2.0, **data}
    return AudioDataset(SpeechDataConfig.model_validate(options), SpeechModelConfig(sample_rate=sample_rate))


def tone(seconds: float, hertz: float = 440, rate: int = RATE) -> np.ndarray:
    """Return a tone that gets louder."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.2 * (1 + times / seconds) * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def write_manifest(path: Path, root: str | Path, names: list[str], counts: list[int]) -> Path:
    lines = [f"{name}\t{count}" for name, count in zip(names, counts, strict=True)]
    path.write_text("\n".join([str(root), *lines]) + "\n")
    return path
