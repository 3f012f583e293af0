"""The encoder that fine-tuning begins with, from a run, a Transformers folder or a checkpoint of the published code."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2v_fast.checkpoints.best import best_step
from d2v_fast.checkpoints.saved_weights import chosen_step, encoder_weights, open_checkpoint, read_run_config
from d2v_fast.config import D2VConfig
from d2v_fast.config.errors import Section, show
from d2v_fast.config.file import section as raw_section
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.config.model_keys import FREE_HEAD_KEYS
from d2v_fast.config.model_paths import explain, is_run
from d2v_fast.files.paths import expand_path
from d2v_fast.files.reading import printable
from d2v_fast.interop.heads import SavedHead
from d2v_fast.interop.huggingface import import_model, options_of_run
from d2v_fast.interop.published import load_published
from d2v_fast.modalities import modality_named, modality_of, modality_of_model
from d2v_fast.models.weights import require_finite

_log = logging.getLogger(__name__)

KEY = "`d2v.finetune.source`"
# classes that a line names
MAX_NAMED = 5


class Place(NamedTuple):
    """Where weights are.

    Attributes:
        run: Folder of a run; None for a Transformers folder or a file.
        step: Step of its checkpoint; None is the best one of a fine-tuned run, or the newest.
        path: The Transformers folder or the file.
    """

    run: Path | None
    step: int | None
    path: Path


class Found(NamedTuple):
    """The weights of a source, fp32 on the CPU.

    Attributes:
        origin: The source in words.
        config: The model section of its encoder.
        encoder: Tensors of the encoder by name.
        head: The head of a fine-tuned model; None if there is none.
    """

    origin: str
    config: Section
    encoder: Mapping[str, Tensor]
    head: SavedHead | None = None

    def copy_to(self, student: nn.Module, head: nn.Module, config: FinetuneConfig) -> None:
        """Copy the weights into an encoder, and into a head that distinguishes the same classes by the same means.

        Log whether the head is that of the source, or why it is a new one.

        Raises:
            ValueError: A tensor of the encoder is missing or has another shape, or a value is not finite.
        """
        expected = student.state_dict()
        wrong = [
            f"{name} is {list(self.encoder[name].shape) if name in self.encoder else 'missing'} there and "
            f"{list(value.shape)} in `d2v.model`"
            for name, value in expected.items()
            if name not in self.encoder or self.encoder[name].shape != value.shape
        ]
        if wrong:
            shown = "\n  ".join([*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])])
            raise ValueError(
                f"{KEY} ({self.origin}) must hold an encoder of the sizes in `d2v.model`, but does not:\n  {shown}"
            )
        state = {name: self.encoder[name] for name in expected}
        require_finite(state.items(), f"`{self.origin}`")
        student.load_state_dict(state)
        if self.head is None:
            return
        if (why := _misfit(self.head, head, config)) is not None:
            _log.warning("the head is a new one, not that of %s: %s", printable(self.origin), printable(why))
            return
        require_finite(self.head.tensors.items(), f"`{self.origin}`")
        head.load_state_dict(dict(self.head.tensors))
        # a level that is shown: another line says that the encoder is read without its head
        _log.warning("the head is that of %s", printable(self.origin))


def _misfit(given: SavedHead, head: nn.Module, config: FinetuneConfig) -> str | None:
    """Return why a head of a source is not that of a run; None if it is."""
    section: Any = config.head
    # a score has no classes
    there, here = given.labels or (), config.labels or ()
    if set(there) != set(here):
        return f"it distinguishes {_named(there)}, and the run {_named(here)}"
    if tuple(there) != tuple(here):
        return f"its classes have another order: {_named(there)}, and in the run {_named(here)}"
    for key, value in given.keys.items():
        if (own := getattr(section, key, None)) != value:
            return f"its `d2v.head.{key}` is {show(value)}, and that of the run {show(own)}"
    if {n: v.shape for n, v in given.tensors.items()} != {n: v.shape for n, v in head.state_dict().items()}:
        return "its tensors have other names or shapes"
    return None


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(map(show, labels[:MAX_NAMED])) + (", ..." if len(labels) > MAX_NAMED else "")
    return f"{len(labels):,} classes ({shown})" if labels else "no classes"


def place_of(source: Path, step: int | None) -> Place:
    """Return what a source is.

    Args:
        source: A run, a checkpoint in it, an export, a Transformers folder, or a file.
        step: Step of a run's checkpoint.
    Raises:
        ValueError: There is no such path, or it is none of these.
    """
    if not os.path.lexists(source):
        raise ValueError(f"{KEY} must be a run, a Transformers folder or a checkpoint, but there is no `{source}`.")
    if source.is_file():
        return Place(None, None, source)
    name = source.name.removeprefix("step-")
    if source.parent.name == "checkpoints" and source.name.startswith("step-") and name.isdecimal():
        return Place(source.parent.parent, int(name), source)
    if (source / "checkpoints").is_dir() or is_run(source):
        return Place(source, step, source)
    if (reason := explain(source)) is not None:
        raise ValueError(f"{KEY} must be a run, a Transformers folder or a checkpoint. {reason}")
    if not (source / "config.json").is_file():
        raise ValueError(
            f"{KEY} must be a run, a Transformers folder or a checkpoint, but `{source}` is a folder without "
            "`config.json`."
        )
    return Place(None, None, source)


def fill(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the `"d2v"` section of a file with the encoder and the model section of its source.

    The sizes are those of the source. Other keys of `d2v.model` in the file, such as the rates of dropout, have
    precedence; see `FinetuneConfig.model_like`.

    Args:
        raw: The section, not yet checked.
    Raises:
        ValueError: The source cannot be read, or holds an encoder of another modality.
    """
    section = raw.get("finetune")
    source = section.get("source") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(source, str):
        return raw
    step = section.get("step")
    model = _model_section(place_of(Path(expand_path(source)), step if isinstance(step, int) else None))
    found, own = modality_of_model(model), raw.get("modality", "vision")
    if found.name != own:
        raise ValueError(f'{KEY} must hold an encoder of modality "{own}", but `{source}` is of "{found.name}".')
    kind: Any = modality_named(own).objectives[raw["objective"]].config
    section = kind.model_like(raw_section(raw, "model"), found.objective, model.model_dump(mode="json"))
    return {**raw, "encoder": found.objective, "model": section}


def read_source(source: Path, weights: str, step: int | None, config: FinetuneConfig) -> Found:
    """Read the weights of a source.

    Args:
        source: See `place_of`.
        weights: "student" or "teacher", of a source that has both.
        step: Step of a run's checkpoint; None is the best one of a fine-tuned run, or the newest.
        config: The section of the run that is to begin with them.
    Raises:
        ValueError: The source cannot be read.
    """
    place = place_of(source, step)
    if place.run is not None:
        return _of_run(place.run, place.step, weights)
    if place.path.is_dir():
        student, model = import_model(place.path, **options_of_run(place.path, config.model))
        made = modality_of(config).huggingface
        head = None if made is None else made().head(place.path)
        return Found(str(place.path), model, student.state_dict(), head)
    student, _, model = load_published(place.path, weights=weights)
    return Found(f"{weights} of {place.path}", model, student.state_dict())


def _of_run(folder: Path, step: int | None, weights: str) -> Found:
    run = read_run_config(folder)
    tuned = run if isinstance(run, FinetuneConfig) else None
    with open_checkpoint(folder, best_step(folder) if step is None and tuned is not None else step) as checkpoint:
        which = averaged(run, weights)
        saved = encoder_weights(checkpoint, run, which)
        origin = f"{which} of {folder}, step {checkpoint.step}"
        if tuned is None:
            return Found(origin, run.model, dict(saved))
        keys = tuned.head.model_dump(exclude=set(FREE_HEAD_KEYS))
        return Found(origin, run.model, dict(saved), SavedHead(saved.head(), tuned.labels, keys))


def averaged(config: D2VConfig, weights: str) -> str:
    """Return whose weights of a run are meant: those of a fine-tuned one are its average, if it keeps one."""
    if not isinstance(config, FinetuneConfig):
        return weights
    return "student" if config.finetune.average_decay is None else "teacher"


def _model_section(place: Place) -> Section:
    """Return the model section of a source's encoder; a run must have the checkpoint, which is read later."""
    if place.run is not None:
        chosen_step(place.run, place.step)
        return read_run_config(place.run).model
    if place.path.is_dir():
        return import_model(place.path)[1]
    return load_published(place.path)[2]
