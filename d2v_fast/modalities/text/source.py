"""What follows from the encoder that fine-tuning on text begins with: its sizes, and the tokenizer of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import open_checkpoint, read_run_config
from d2v_fast.config import D2VConfig
from d2v_fast.errors import DataError
from d2v_fast.files.paths import expand_path
from d2v_fast.interop.sources import fill, place_of
from d2v_fast.modalities.text.reference_pages import docs_tokenizer_folder
from d2v_fast.modalities.text.tokenizer import load_tokenizer

__all__ = ["fill_text"]


def fill_text(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the `"d2v"` section of a file with the encoder, the model section and the tokenizer of its source.

    Args:
        raw: The section, not yet checked.
    Raises:
        ValueError: The source cannot be read, holds an encoder of another modality, or was trained with another
            tokenizer than `data.tokenizer` names.
    """
    filled = fill(raw)
    section, data = raw.get("finetune"), raw.get("data")
    source = section.get("source") if isinstance(section, dict) else None
    if not isinstance(source, str) or not isinstance(data, dict):
        return filled
    step = section.get("step") if isinstance(section, dict) else None
    place = place_of(Path(expand_path(source)), step if isinstance(step, int) else None)
    given = data.get("tokenizer")
    if isinstance(given, str):
        if digest := _digest(place.run, place.step, place.path):
            load_tokenizer(given).require(digest, source)
        return filled
    if place.run is not None:
        found = _of_run(read_run_config(place.run), data)
    else:
        found = str(place.path) if (place.path / "tokenizer.json").is_file() else None
    return filled if found is None else {**filled, "data": {**data, "tokenizer": found}}


def _of_run(run: D2VConfig, data: dict[str, Any]) -> str | None:
    """Return the path of a run's tokenizer; None if the data of the new run lead to the same one without a path."""
    own: Any = run.data
    if own.tokenizer is not None:
        return str(own.tokenizer)
    if data.get("kind") == "docs" and data.get("test_fraction", own.test_fraction) == own.test_fraction:
        return None
    model: Any = run.model
    return str(docs_tokenizer_folder(own, model))


def _digest(run: Path | None, step: int | None, path: Path) -> str | None:
    """Return the digest of the tokenizer that a source was trained with; None if it is unknown."""
    if run is not None:
        with open_checkpoint(run, step) as checkpoint:
            digest: str | None = checkpoint.state.get("vocabulary")
            return digest
    try:
        return load_tokenizer(path).digest if (path / "tokenizer.json").is_file() else None
    except DataError:
        return None
