"""Encoders of any modality as Hugging Face Transformers folders, in both directions, without importing Transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import D2VConfig, SpeechConfig, SpeechModelConfig, VisionConfig, VisionModelConfig
from d2v_fast.interop.folders import read_model_config
from d2v_fast.interop.huggingface_speech import export_speech, import_speech
from d2v_fast.interop.huggingface_vision import export_vision, import_vision
from d2v_fast.modalities import Student


def export_model(
    model: Student | Mapping[str, Tensor], config: D2VConfig, folder: str | os.PathLike[str], **options: Any
) -> None:
    """Write a model folder, as the modality of the run has it.

    Args:
        model, config, folder, options: of `export_vision` or `export_speech`.
    """
    if isinstance(config, VisionConfig):
        export_vision(model, config, folder, **options)
    elif isinstance(config, SpeechConfig):
        export_speech(model, config, folder, **options)
    else:
        raise TypeError(f"no folder for {type(config).__name__}")


def import_model(
    folder: str | os.PathLike[str], **options: Any
) -> tuple[Student, VisionModelConfig | SpeechModelConfig]:
    """Read a model folder of whatever modality its `config.json` names.

    Args:
        folder, options: of `import_vision` or `import_speech`.
    Returns:
        The encoder, fp32 on the CPU, in training mode, and its configuration.
    Raises:
        ValueError: see `import_vision` and `import_speech`; or it is of another modality.
    """
    kind = read_model_config(Path(folder)).get("model_type")
    if kind == "data2vec-vision":
        return import_vision(folder, **options)
    if kind == "data2vec-audio":
        return import_speech(folder, **options)
    known = '"data2vec-vision" or "data2vec-audio"'
    raise ValueError(
        f"`model_type` in {Path(folder) / 'config.json'} must be {known}, but is {json.dumps(kind)} instead."
    )
