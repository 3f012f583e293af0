"""Encoders of any modality as Hugging Face Transformers folders, in both directions, without importing Transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import D2VConfig
from d2v_fast.config.errors import Section
from d2v_fast.interop.folders import read_model_config
from d2v_fast.interop.formats import huggingface_formats, require_format
from d2v_fast.modalities import modality_of, modality_of_model
from d2v_fast.models.student import Student


def export_model(
    model: Student | Mapping[str, Tensor], config: D2VConfig | Section, folder: str | os.PathLike[str], **options: Any
) -> None:
    """Write a Transformers folder.

    Args:
        model: An encoder, or its tensors by name.
        config: The run's or the model's configuration. It decides the modality.
        folder: Made if it is missing.
        options: See the function of the modality, such as `d2v_fast.modalities.vision.huggingface.export_vision`.
    Raises:
        ValueError: The modality has no Transformers model.
    """
    modality = modality_of(config) if isinstance(config, D2VConfig) else modality_of_model(config)
    require_format(modality, modality.huggingface, "Transformers model")().write(model, config, folder, **options)


def options_of_run(folder: Path, wanted: Section) -> dict[str, Any]:
    """Return the options of `import_model` for a run that is to begin with a folder.

    Args:
        folder: See `import_model`.
        wanted: The model section of the run.
    Raises:
        ValueError: The folder has no `config.json`.
    """
    raw, made = read_model_config(folder), modality_of_model(wanted).huggingface
    own = None if made is None else made()
    return own.options_of_run(raw, wanted) if own is not None and own.reads(raw) else {}


def import_model(folder: str | os.PathLike[str], **options: Any) -> tuple[Student, Section]:
    """Read a Transformers folder of the modality that its `config.json` names.

    Args:
        folder: With `config.json` and `model.safetensors`.
        options: See the function of the modality, such as `d2v_fast.modalities.vision.huggingface.import_vision`.
    Returns:
        The encoder, fp32 on the CPU, in training mode, and its configuration.
    Raises:
        ValueError: No modality has such a model, or the folder does not hold what its `config.json` says.
    """
    raw = read_model_config(Path(folder))
    kind = raw.get("model_type")
    kinds = []
    for _, found in huggingface_formats():
        if found.reads(raw):
            return found.read(folder, **options)
        if f'"{found.kind}"' not in kinds:
            kinds.append(f'"{found.kind}"')
    where = Path(folder) / "config.json"
    known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    raise ValueError(f"`model_type` in {where} must be {known}, but is {json.dumps(kind)} instead.")
