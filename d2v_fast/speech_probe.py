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
from torch.nn.utils.rnn import pad_sequence

from d2v_fast.config import SpeechConfig
from d2v_fast.data.speech import SpeechProbeData
from d2v_fast.log_mel import log_mel
from d2v_fast.modalities import Student
from d2v_fast.probe import ProbeReport, ProbeReports, Task, score

LOG_MEL = "log-mel average"
_BATCH = 64


@torch.no_grad()
def frame_features(model: Student, waveforms: Sequence[Tensor], config: SpeechConfig) -> list[Tensor]:
    """The encoder's output `[T, D]` for each recording, fp32.

    The model may be training elsewhere: its mode is restored, and it is run where its parameters are.

    Args:
        waveforms: `[N]` each, of zero mean and unit variance.
    """
    was_training, parameter = model.training, next(model.parameters())
    model.eval()
    found: dict[int, Tensor] = {}
    # those of like length together, so that little is padded
    order = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        lengths = [config.model.num_frames(len(waveforms[index])) for index in chosen]
        batch = pad_sequence([waveforms[index] for index in chosen], batch_first=True)
        on_device = torch.tensor(lengths, device=parameter.device)
        output = model(batch.to(parameter.device, parameter.dtype), on_device).last_hidden.float().cpu()
        found |= {
            index: output[place, :length] for place, (index, length) in enumerate(zip(chosen, lengths, strict=True))
        }
    model.train(was_training)
    return [found[index] for index in range(len(waveforms))]


def run_speech_probe(models: Mapping[str, Student], data: SpeechProbeData, config: SpeechConfig) -> ProbeReports:
    """Score every model's features, and log-mel averages, on both questions.

    Args:
        models: encoders, by the name they get in the tables.
        data: recordings, labels and the splits.
        config: of the run.
    """
    features = {name: _average(frame_features(model, data.waveforms, config)) for name, model in models.items()}
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
