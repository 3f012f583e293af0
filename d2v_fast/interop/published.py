"""Checkpoints of the published data2vec code, whatever modality: of fairseq for speech and text, of the BEiT-style code
for images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from torch import Tensor

from d2v_fast.config import SpeechModelConfig, TextModelConfig, VisionModelConfig
from d2v_fast.interop.fairseq import fairseq_of
from d2v_fast.interop.fairseq_files import NeedsClass, check_weights, chosen, read_pickle, require_checkpoint
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, Settings
from d2v_fast.modalities.speech import fairseq as fairseq_speech
from d2v_fast.modalities.speech.fairseq import FairseqSpeech
from d2v_fast.modalities.text import fairseq as fairseq_text
from d2v_fast.modalities.text.fairseq import FairseqText
from d2v_fast.modalities.vision.beit import AVERAGE, BeitVision, beit_of, is_beit
from d2v_fast.models.student import Student

_AVERAGES = {FairseqSpeech: fairseq_speech.AVERAGE, FairseqText: fairseq_text.AVERAGE, BeitVision: AVERAGE}


def read_published(
    path: str | os.PathLike[str], settings: Settings = NO_SETTINGS
) -> FairseqSpeech | FairseqText | BeitVision:
    """Everything of a checkpoint, of the modality that its names tell.

    Args:
        path: the `.pt` or `.pth` file.
        settings: values of the model's configuration that do not come from the file.
    Raises:
        ValueError: see `load_fairseq_speech`, `load_fairseq_text` and `beit_of`.
    """
    path = Path(path)
    try:
        content = read_pickle(path)
    except NeedsClass as error:
        # the code for images keeps its command line, in a class that does nothing
        if error.name != "argparse.Namespace":
            raise
        content = read_pickle(path, [argparse.Namespace])
        if not is_beit(content):
            raise error from None
    if is_beit(content):
        return beit_of(content, path, settings)
    return fairseq_of(require_checkpoint(content, path), path, settings)


def load_published(
    path: str | os.PathLike[str], *, weights: str = "student", heads: int | None = None
) -> tuple[Student, dict[str, Tensor] | None, SpeechModelConfig | TextModelConfig | VisionModelConfig]:
    """Student or teacher of a checkpoint, its regression head and the model's configuration.

    Args:
        path: the `.pt` or `.pth` file.
        weights: "student" or "teacher".
        heads: of attention, where the file does not tell.
    Raises:
        ValueError: as of `read_published`; or the checkpoint has no teacher.
    """
    check_weights(weights)
    found = read_published(path, Settings.of(None, heads))
    return choose(found, weights, path), found.head, found.config


def choose(found: FairseqSpeech | FairseqText | BeitVision, weights: str, path: object) -> Student:
    """Student or teacher of what `read_published` returns.

    Raises:
        ValueError: there is no teacher.
    """
    student: Student = found.student
    return chosen(student, found.teacher, weights, path, _AVERAGES[type(found)])
