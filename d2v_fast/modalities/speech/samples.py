"""The bundled sample set: 420 synthetic recordings of spoken words.

Fourteen eSpeak NG voices speak thirty words each (`speech_samples/README.md`). Pre-training uses ten of the voices and
no labels; four voices are held out for the probe. Only `sample_labels` and `speech_for_probe` return labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.listing import Listing
from d2v_fast.errors import DataError
from d2v_fast.modalities.speech.audio import AudioDataset, normalized
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelSection
from d2v_fast.modalities.speech.decode import AudioLimits, read_whole

if TYPE_CHECKING:
    from d2v_fast.config import D2VConfig

__all__ = [
    "HELD_OUT_VOICES",
    "SpeechProbeData",
    "SpeechSamples",
    "held_out_words",
    "sample_labels",
    "speech_for_probe",
]

FOLDER = Path(__file__).resolve().parent / "speech_samples"

# one voice of each accent that has other voices, and all of one accent that pre-training never uses
HELD_OUT_VOICES = ("en-us+f5", "en-gb+m6", "en-gb-x-gbcwmd+f1", "en-029+m3")
# the voice probe holds out every fourth word
HELD_OUT_EVERY = 4


@dataclass(frozen=True)
class SpeechProbeData:
    """Labeled recordings for two probes: words of held-out voices, and voices of held-out words.

    Attributes:
        waveforms: `S` whole recordings, each fp32 `[N]` at the model's rate, with zero mean and unit variance.
        words, voices: Labels, int64 `[S]`, indices into `word_names` and `voice_names`.
        word_names, voice_names: Names of the classes.
        word_train_indices, word_test_indices: int64 indices into `waveforms`. The test part holds the voices that
            pre-training does not use.
        voice_train_indices, voice_test_indices: int64 indices into `waveforms`, of the other voices only. The test part
            holds words that are not in the train part.
    """

    waveforms: list[Tensor]
    words: Tensor
    voices: Tensor
    word_names: tuple[str, ...]
    voice_names: tuple[str, ...]
    word_train_indices: Tensor
    word_test_indices: Tensor
    voice_train_indices: Tensor
    voice_test_indices: Tensor


class SpeechSamples(AudioDataset):
    """The recordings of one split, without labels.

    They last 0.3 to 0.8 s, so `data.min_seconds` must be set accordingly.
    """

    def __init__(
        self, data: SpeechDataConfig, model: SpeechModelSection, split: Literal["train", "test"] = "train"
    ) -> None:
        self.listing = Listing()
        rows = sorted(row for row in _index() if (row.voice in HELD_OUT_VOICES) == (split == "test"))
        self._fill(data, model, str(FOLDER), [row.path for row in rows], np.array([row.num_samples for row in rows]))


def speech_for_probe(config: D2VConfig) -> SpeechProbeData:
    """Read all recordings, of any length, with their labels, at the sample rate of `config`.

    Raises:
        DataError: `config` is not for speech.
    """
    data, model = config.data, config.model
    if not isinstance(data, SpeechDataConfig) or not isinstance(model, SpeechModelSection):
        raise DataError("`d2v.model` must be a speech model for the speech probe, but is of another modality.")
    rows = _index()
    limits = AudioLimits(model.sample_rate, data.max_file_bytes, data.silence)
    waveforms = [normalized(read_whole(str(FOLDER / row.path), limits)) for row in rows]
    word_names = tuple(dict.fromkeys(row.word for row in rows))
    voice_names = tuple(dict.fromkeys(row.voice for row in rows))
    words = torch.tensor([word_names.index(row.word) for row in rows])
    voices = torch.tensor([voice_names.index(row.voice) for row in rows])
    voice_is_new = torch.tensor([row.voice in HELD_OUT_VOICES for row in rows])
    word_is_new = words % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return SpeechProbeData(
        waveforms,
        words,
        voices,
        word_names,
        voice_names,
        word_train_indices=torch.nonzero(~voice_is_new)[:, 0],
        word_test_indices=torch.nonzero(voice_is_new)[:, 0],
        voice_train_indices=torch.nonzero(~voice_is_new & ~word_is_new)[:, 0],
        voice_test_indices=torch.nonzero(~voice_is_new & word_is_new)[:, 0],
    )


def sample_labels(names: list[str], what: Literal["word", "voice"]) -> list[str]:
    """Return the spoken word or the voice of each recording, by its name in `SpeechSamples`."""
    labels = {row.path: row.word if what == "word" else row.voice for row in _index()}
    return [labels[name] for name in names]


def held_out_words(names: list[str]) -> npt.NDArray[np.bool_]:
    """Return which recordings are of words that the voice probe holds out, bool `[S]`."""
    rows = _index()
    words = list(dict.fromkeys(row.word for row in rows))
    numbers = np.array([words.index(word) for word in sample_labels(names, "word")])
    return numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


class _Row(NamedTuple):
    path: str
    word: str
    voice: str
    num_samples: int


def _index() -> list[_Row]:
    lines = (FOLDER / "index.tsv").read_text(encoding="utf-8").splitlines()[1:]
    fields = [line.split("\t") for line in lines]
    return [_Row(path, word, voice, int(samples)) for path, word, voice, _, samples in fields]
