"""What follows from the encoder that fine-tuning on recordings begins with: its sizes, and the letters of its head."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import read_run_config
from d2v_fast.files.paths import expand_path
from d2v_fast.files.reading import printable
from d2v_fast.interop.folders import read_model_config
from d2v_fast.interop.sources import fill, place_of
from d2v_fast.modalities.speech.config_finetune import SpeechCtcConfig
from d2v_fast.modalities.speech.huggingface_head import LETTERS
from d2v_fast.modalities.speech.vocabulary import read_vocabulary

__all__ = ["fill_speech"]

_log = logging.getLogger(__name__)


def fill_speech(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the `"d2v"` section of a file with the encoder and the model section of its source, and its letters.

    The letters of a source that writes transcripts are taken unless the file names others, so that its head goes on
    training.

    Args:
        raw: The section, not yet checked.
    Raises:
        ValueError: The source cannot be read, or holds an encoder of another modality.
        DataError: The letters of a Transformers folder cannot be read.
    """
    filled = fill(raw)
    section, data = raw.get("finetune"), raw.get("data")
    source = section.get("source") if isinstance(section, dict) else None
    is_named = raw.get("labels") is not None or (isinstance(data, dict) and data.get("vocabulary") is not None)
    if not isinstance(source, str) or raw.get("objective") != "ctc" or is_named:
        return filled
    tokens = _letters(Path(expand_path(source)))
    if tokens is None:
        return filled
    _log.warning("the %d letters are those of %s", len(tokens), printable(source))
    return {**filled, "labels": list(tokens)}


def _letters(source: Path) -> tuple[str, ...] | None:
    """Return the letters of a source; None if it does not write transcripts."""
    place = place_of(source, None)
    if place.run is not None:
        run = read_run_config(place.run)
        return run.labels if isinstance(run, SpeechCtcConfig) else None
    if not place.path.is_dir() or not (place.path / LETTERS).is_file():
        return None
    kinds = read_model_config(place.path).get("architectures")
    is_ctc = isinstance(kinds, list) and any(str(kind).endswith("ForCTC") for kind in kinds)
    return read_vocabulary(str(place.path / LETTERS)).tokens if is_ctc else None
