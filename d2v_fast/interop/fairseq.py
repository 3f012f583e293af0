"""fairseq's data2vec checkpoints of both versions, in both directions, without importing fairseq."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from d2v_fast.config import D2VConfig
from d2v_fast.config.errors import Section
from d2v_fast.interop.fairseq_recipe import Settings
from d2v_fast.interop.formats import Pretrained, published_formats
from d2v_fast.interop.published import load_published, read_published
from d2v_fast.modalities import modality_of
from d2v_fast.models.student import Student

FORM = "fairseq"


def read_fairseq(path: str | os.PathLike[str], *, heads: int | None = None) -> Pretrained:
    """Read everything of a checkpoint.

    Args:
        path: The `.pt` file.
        heads: Attention heads, if the file does not say; None is 64 channels in each.
    Returns:
        Student, regression head, whole teacher and the model's configuration; head and teacher may be None.
    Raises:
        ValueError: The file is damaged, needs code, or holds no model of fairseq.
    """
    return read_published(path, Settings.of(None, heads), form=FORM)


def load_fairseq(
    path: str | os.PathLike[str], *, weights: str = "student", heads: int | None = None
) -> tuple[Student, dict[str, Tensor] | None, Section]:
    """Read student or teacher of a checkpoint.

    Args:
        path: The `.pt` file.
        weights: "student" or "teacher".
        heads: Attention heads, if the file does not say; None is 64 channels in each.
    Returns:
        The encoder, the tensors of the regression head or None, and the model's configuration.
    Raises:
        ValueError: The file is damaged, needs code, holds no model of fairseq, or has no teacher.
    """
    return load_published(path, weights=weights, heads=heads, form=FORM)


def save_fairseq(
    model: Student | Mapping[str, Tensor],
    head: nn.Module | Mapping[str, Tensor] | None,
    teacher: Student | Mapping[str, Tensor] | None,
    config: D2VConfig,
    path: str | os.PathLike[str],
    *,
    num_updates: int = 0,
) -> None:
    """Write a checkpoint.

    Args:
        model: The student, or its tensors by name.
        head: The regression head, or its tensors by name; None leaves it out.
        teacher: The whole teacher, or its tensors by name; None leaves it out.
        config: The run's. It decides the modality.
        path: The `.pt` file; it is replaced as a whole.
        num_updates: Optimizer steps that the student has made.
    Raises:
        ValueError: fairseq has no encoder of this modality, or none with these settings.
    """
    make = modality_of(config).published
    found = None if make is None else make()
    if found is None or found.form != FORM:
        must = " or ".join(name for name, one in published_formats(config.objective) if one.form == FORM)
        raise ValueError(f"`d2v.modality` must be {must} for fairseq, but is {config.modality} instead.")
    found.write(model, head, teacher, config, path, num_updates=num_updates)
