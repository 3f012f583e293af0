"""Checkpoints of the published data2vec code, of any modality, without importing that code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config.errors import Section
from d2v_fast.files.reading import printable
from d2v_fast.interop.fairseq_files import (
    NeedsClass,
    check_weights,
    chosen,
    known_kind,
    read_pickle,
    require_checkpoint,
)
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, Settings
from d2v_fast.interop.formats import Pretrained, Published, published_formats
from d2v_fast.models.student import Student


def read_published(
    path: str | os.PathLike[str], settings: Settings = NO_SETTINGS, *, form: str | None = None
) -> Pretrained:
    """Read everything of a checkpoint; the names in it decide the modality.

    Args:
        path: The `.pt` or `.pth` file.
        settings: Values of the model's configuration that do not come from the file.
        form: Read only this format, such as "fairseq"; None reads any.
    Raises:
        ValueError: The file is damaged, needs code, or holds no model of a modality.
    """
    return open_published(Path(path), settings, form)[1]


def open_published(
    path: Path, settings: Settings = NO_SETTINGS, form: str | None = None
) -> tuple[Published, Pretrained]:
    """Read a checkpoint as `read_published` does; returns its format and everything in it."""
    found, content = _read(path, form)
    return found, found.read(content, path, settings)


def load_published(
    path: str | os.PathLike[str], *, weights: str = "student", heads: int | None = None, form: str | None = None
) -> tuple[Student, dict[str, Tensor] | None, Section]:
    """Read student or teacher of a checkpoint.

    Args:
        path: The `.pt` or `.pth` file.
        weights: "student" or "teacher".
        heads: Attention heads, if the file does not say; None is 64 channels in each.
        form: See `read_published`.
    Returns:
        The encoder, the tensors of the regression head or None, and the model's configuration.
    Raises:
        ValueError: See `read_published`; or the checkpoint has no teacher.
    """
    check_weights(weights)
    found, read = open_published(Path(path), Settings.of(None, heads), form)
    return chosen(read.student, read.teacher, weights, path, found.average), read.head, read.config


def _read(path: Path, form: str | None) -> tuple[Published, Any]:
    """Return the format that a file is of, and what the file holds."""
    content, needed = None, None
    try:
        content = read_pickle(path)
    except NeedsClass as error:
        needed = error
    owners = []
    for name, found in published_formats():
        if form not in (None, found.form):
            continue
        if (owner := f"{name} ({found.owner})") not in owners:
            owners.append(owner)
        # some code keeps an object that does nothing in its files: only files of that format may have it
        held = read_pickle(path, found.classes) if needed and needed.name in map(_name_of, found.classes) else content
        if held is not None and found.is_own(held):
            return found, held
    if needed is not None:
        raise needed
    names = require_checkpoint(content, path)["model"]
    known = known_kind(names)
    what = f"no name of one: {_shown(names)}" if known is None else f"{known[0]}: `{printable(known[1])}`"
    raise ValueError(f"`{path}` must hold a data2vec encoder of {' or '.join(owners)}, but holds {what}.")


def _shown(names: Mapping[Any, Any]) -> str:
    return ", ".join(f"`{printable(str(name))}`" for name in list(names)[:3]) or "it is empty"


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
