"""fairseq's data2vec checkpoints (version 1) of speech and text, in both directions, without importing fairseq."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from d2v_fast.config import D2VConfig, SpeechConfig, SpeechModelConfig, TextConfig, TextModelConfig
from d2v_fast.interop.fairseq_files import TEXT_PREFIX, check_weights, chosen, read_checkpoint
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, Settings
from d2v_fast.modalities.speech.fairseq import AVERAGE as SPEECH_AVERAGE
from d2v_fast.modalities.speech.fairseq import FairseqSpeech, save_fairseq_speech, speech_of
from d2v_fast.modalities.text.fairseq import AVERAGE as TEXT_AVERAGE
from d2v_fast.modalities.text.fairseq import FairseqText, save_fairseq_text, text_of
from d2v_fast.models.student import Student


def read_fairseq(path: str | os.PathLike[str], *, heads: int | None = None) -> FairseqSpeech | FairseqText:
    """Everything of a checkpoint, of text where its names say so, else of speech.

    Args:
        path: the `.pt` file.
        heads: of attention, which no tensor tells. None: of `cfg`; without one, as many as are 64 wide.
    Raises:
        ValueError: see `load_fairseq_speech` and `load_fairseq_text`.
    """
    path = Path(path)
    return fairseq_of(read_checkpoint(path), path, Settings.of(None, heads))


def fairseq_of(content: Mapping[str, Any], path: Path, settings: Settings = NO_SETTINGS) -> FairseqSpeech | FairseqText:
    """Everything of what `read_checkpoint` has read; see `read_fairseq`."""
    if any(str(name).startswith(TEXT_PREFIX) for name in content["model"]):
        return text_of(content, path, settings=settings)
    return speech_of(content, path, settings=settings)


def load_fairseq(
    path: str | os.PathLike[str], *, weights: str = "student", heads: int | None = None
) -> tuple[Student, dict[str, Tensor] | None, SpeechModelConfig | TextModelConfig]:
    """Student or teacher of a checkpoint, its regression head and the model's configuration.

    Args:
        path, weights, heads: as of `load_fairseq_speech` and `load_fairseq_text`.
    Raises:
        ValueError: see there.
    """
    check_weights(weights)
    found = read_fairseq(path, heads=heads)
    average = TEXT_AVERAGE if isinstance(found, FairseqText) else SPEECH_AVERAGE
    student: Student = found.student
    return chosen(student, found.teacher, weights, path, average), found.head, found.config


def save_fairseq(
    model: Student | Mapping[str, Tensor],
    head: nn.Module | Mapping[str, Tensor] | None,
    teacher: Student | Mapping[str, Tensor] | None,
    config: D2VConfig,
    path: str | os.PathLike[str],
    *,
    num_updates: int = 0,
) -> None:
    """Write a checkpoint, as the modality of the run has it.

    Args:
        model, head, teacher, config, path, num_updates: of `save_fairseq_speech` or `save_fairseq_text`.
    Raises:
        ValueError: fairseq has no such encoder.
    """
    if isinstance(config, SpeechConfig):
        save_fairseq_speech(model, head, teacher, config, path, num_updates=num_updates)
    elif isinstance(config, TextConfig):
        save_fairseq_text(model, head, teacher, config, path, num_updates=num_updates)
    else:
        raise ValueError(f"`d2v.modality` must be speech or text for fairseq, but is {config.modality} instead.")
