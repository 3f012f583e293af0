"""Is speech being learned? Which word was said, by voices never heard, and which voice said it, in other words.

Features of a recording are averages over its frames of the encoder's output. Beside the network before training stands
the plainest description of a sound: the average of its log-mel spectrum. The classifiers are those of `probe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.config import SpeechConfig
from d2v_fast.evaluation.classifiers import ProbeReport, ProbeReports, Task, score
from d2v_fast.evaluation.features import sequence_features
from d2v_fast.modalities.speech.log_mel import log_mel
from d2v_fast.modalities.speech.samples import SpeechProbeData
from d2v_fast.models.student import Student

LOG_MEL = "log-mel average"


def run_speech_probe(models: Mapping[str, Student], data: SpeechProbeData, config: SpeechConfig) -> ProbeReports:
    """Score every model's features, and log-mel averages, on both questions.

    Args:
        models: encoders, by the name they get in the tables.
        data: recordings, labels and the splits.
        config: of the run.
    """
    features = {
        name: _average(sequence_features(model, data.waveforms, num_places=config.model.num_frames))
        for name, model in models.items()
    }
    features[LOG_MEL] = _average([log_mel(waveform, config.model.sample_rate) for waveform in data.waveforms])
    questions = {
        "word": Task(*map(np.asarray, (data.words, data.word_train_indices, data.word_test_indices))),
        "voice": Task(*map(np.asarray, (data.voices, data.voice_train_indices, data.voice_test_indices))),
    }
    titles = {"word": "words, new voices", "voice": "voices, new words"}
    return ProbeReports(
        {
            question: ProbeReport(
                {name: score(values, task, config.probe) for name, values in features.items()},
                config.probe,
                titles[question],
            )
            for question, task in questions.items()
        }
    )


def _average(frames: Sequence[Tensor]) -> NDArray[np.float32]:
    return torch.stack([values.mean(0) for values in frames]).numpy()
