"""Speech probes: word and voice of the sample recordings, or a user's own labels.

The word classifier is tested on voices that it was not fitted to, and the voice classifier on words that it was not
fitted to. A recording's features are the encoder's output, averaged over frames. The baselines are the untrained
network and the averaged log-mel spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.data.labels import LabeledSet, labeled_files
from d2v_fast.evaluation.classifiers import ProbeReport, ProbeReports, Task, score
from d2v_fast.evaluation.features import sequence_features
from d2v_fast.evaluation.inputs import Rows, Sample, Source
from d2v_fast.evaluation.probing import Labeled, Probed, Probing
from d2v_fast.modalities.speech.audio import KINDS
from d2v_fast.modalities.speech.config import RecordingsConfig
from d2v_fast.modalities.speech.embed import Middles
from d2v_fast.modalities.speech.log_mel import log_mel
from d2v_fast.modalities.speech.samples import SpeechProbeData, speech_for_probe
from d2v_fast.models.student import Student

LOG_MEL = "log-mel average"
# keeps the time for thousands of recordings to minutes
MAX_SECONDS = 10.0


def run_speech_probe(models: Mapping[str, Student], data: SpeechProbeData, config: RecordingsConfig) -> ProbeReports:
    """Score every model's features, and log-mel averages, on words and on voices.

    Args:
        models: Encoders by their name in the tables.
        data: Recordings, labels and splits.
        config: The run's configuration.
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


def _labeled(config: RecordingsConfig) -> Labeled:
    def find(key: str) -> LabeledSet:
        probe, follow = config.probe, config.data.follow_outside
        return labeled_files(str(probe.path), KINDS, probe.max_samples, follow_outside=follow, key=key)

    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        paths = [sample.name for sample in found.samples]
        source = Middles(model, Path(found.root), config.model, config.data, paths, MAX_SECONDS)
        return source, source.samples()

    def pooled(frames: Rows) -> Rows:
        return np.asarray(frames.mean(0), dtype=np.float32)

    def spectrum(sample: Sample) -> Rows:
        return log_mel(sample.parts[0], config.model.sample_rate).mean(0).numpy()

    return Labeled("recording", find, read, pooled, LOG_MEL, spectrum, lambda rows, task: np.stack(rows))


def _run(probed: Probed, config: RecordingsConfig) -> ProbeReports:
    return run_speech_probe(probed.encoders, speech_for_probe(config), config)


PROBING = Probing("speech", _run, _labeled, ("--data", "FOLDER"), "recordings whose sub-folders are classes")
