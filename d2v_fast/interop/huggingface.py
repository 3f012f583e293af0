"""Encoders of any modality as Hugging Face Transformers folders, in both directions, without importing Transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import (
    D2VConfig,
    SpeechConfig,
    SpeechModelConfig,
    TextConfig,
    TextModelConfig,
    VisionConfig,
    VisionModelConfig,
)
from d2v_fast.interop.folders import read_model_config
from d2v_fast.modalities.speech.huggingface import export_speech, import_speech
from d2v_fast.modalities.text.huggingface import export_text, import_text
from d2v_fast.modalities.vision.huggingface import export_vision, import_vision
from d2v_fast.models.student import Student


def export_model(
    model: Student | Mapping[str, Tensor],
    config: D2VConfig | SpeechModelConfig | TextModelConfig | VisionModelConfig,
    folder: str | os.PathLike[str],
    **options: Any,
) -> None:
    """Write a model folder, as the modality of the run, or of the model, has it.

    Args:
        model, config, folder, options: of `export_vision`, `export_speech` or `export_text`.
    """
    if isinstance(config, (VisionConfig, VisionModelConfig)):
        export_vision(model, config, folder, **options)
    elif isinstance(config, (SpeechConfig, SpeechModelConfig)):
        export_speech(model, config, folder, **options)
    elif isinstance(config, (TextConfig, TextModelConfig)):
        export_text(model, config, folder, **options)
    else:
        raise TypeError(f"no folder for {type(config).__name__}")


def import_model(
    folder: str | os.PathLike[str], **options: Any
) -> tuple[Student, VisionModelConfig | SpeechModelConfig | TextModelConfig]:
    """Read a model folder of whatever modality its `config.json` names.

    Args:
        folder, options: of `import_vision`, `import_speech` or `import_text`.
    Returns:
        The encoder, fp32 on the CPU, in training mode, and its configuration.
    Raises:
        ValueError: see `import_vision`, `import_speech` and `import_text`; or it is of another modality.
    """
    kind = read_model_config(Path(folder)).get("model_type")
    if kind == "data2vec-vision":
        return import_vision(folder, **options)
    if kind == "data2vec-audio":
        return import_speech(folder, **options)
    if kind == "data2vec-text":
        return import_text(folder, **options)
    known = '"data2vec-vision", "data2vec-audio" or "data2vec-text"'
    raise ValueError(
        f"`model_type` in {Path(folder) / 'config.json'} must be {known}, but is {json.dumps(kind)} instead."
    )
