"""Read and write fairseq's checkpoints without importing fairseq: the parts that all modalities share.

A checkpoint is a pickle. It is read with `weights_only=True`, so that nothing in it is executed; one that needs Python
classes is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from d2v_fast.files.atomic import replaced
from d2v_fast.files.reading import NotRegularError, open_regular, printable, refuse_pointer
from d2v_fast.interop.fairseq_recipe import AVERAGED_UPDATES, strip_script
from d2v_fast.interop.layout import Layout, Misfit
from d2v_fast.interop.pickle_files import NeededClass, RefusedPickle, check_pickles, check_values

# prefixes of names, and the kind of model that has them
TEXT_PREFIX = "encoder.sentence_encoder."
KINDS = {
    TEXT_PREFIX: "a text model",
    "feature_extractor.": "a speech model",
    "w2v_encoder.": "a speech model",
    "modality_encoders.": "a model of data2vec 2.0",
    "patch_embed.": "an image model",
    "model.patch_embed.": "an image model",
    "cls_token": "an image model",
    "quantizer.": "a model of wav2vec 2.0",
}

# in torch's error for a file that needs more than tensors and plain values
_GLOBAL = re.compile(r"(?:GLOBAL|[Ff]unction|[Cc]lass) ([A-Za-z_][\w.]*)")

Model = TypeVar("Model")


class NeedsClass(ValueError):
    """A pickle needs a Python class.

    Attributes:
        name: Of the class, with its module.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the dictionary of a checkpoint, which has a mapping `model`.

    Raises:
        ValueError: The file is not a checkpoint, is damaged, or would execute code.
    """
    return require_checkpoint(read_pickle(path), path)


def read_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """Read a pickle of tensors and plain values.

    Args:
        path: The file.
        allowed: Further classes that it may hold. Making an instance of one must execute nothing.
    Raises:
        ValueError: The file is not such a pickle, is damaged, or would execute code.
    """
    try:
        refuse_pointer(path)
        with open_regular(path) as file:
            return _load(file, allowed)
    except FileNotFoundError:
        raise ValueError(f"`{path}` must be a checkpoint of fairseq, but is no file.") from None
    except NotRegularError as error:
        raise ValueError(f"`{path}` must be a checkpoint of fairseq, but is {error.what} instead.") from None
    except NeededClass as error:
        stripped = path.with_name(f"{path.stem}-weights.pt")
        raise NeedsClass(
            f"`{path}` must hold tensors and plain values only, but needs {printable(error.name)}, and reading that "
            f"could execute code or take any amount of memory. If you trust whoever made it, run this program with any "
            f"Python that has torch, and import {stripped} instead:\n\n{strip_script(path, stripped)}",
            error.name,
        ) from None
    except RefusedPickle as error:
        raise ValueError(f"`{path}` must be a checkpoint that torch.save wrote, but {error}.") from None


def _load(file: BufferedReader, allowed: Sequence[type]) -> Any:
    """Read the content of an open file.

    Raises:
        RefusedPickle: The file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        check_pickles(file, size, [f"{kind.__module__}.{kind.__qualname__}" for kind in allowed])
        with torch.serialization.safe_globals(list(allowed)):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except RefusedPickle:
        raise
    except Exception as error:
        # torch's own message advises to switch its protection off
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0]
        found = _GLOBAL.search(reason)
        if found is not None:
            raise NeededClass(found[1]) from None
        damage = printable(f"{type(error).__name__} {reason.split('. ')[0][:200]}".strip())
        raise RefusedPickle(f"cannot be read: {damage} (was it copied completely?)") from None
    check_values(content, size)
    return content


def require_checkpoint(state: Any, path: Path) -> dict[str, Any]:
    """Return the content of a pickle if it is a dictionary with a mapping `model`.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(state, dict) or not isinstance(state.get("model"), Mapping):
        keys = list(state)[:10] if isinstance(state, dict) else [type(state).__name__]
        named = ", ".join(printable(str(key)) for key in keys) or "nothing"
        raise ValueError(f"`{path}` must be a checkpoint of fairseq with a `model`, but holds {named} instead.")
    return state


def write_checkpoint(
    path: str | os.PathLike[str], weights: Mapping[str, Any], cfg: Mapping[str, Any], num_updates: int
) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
        path: The `.pt` file.
        weights: fp32 tensors by fairseq's names.
        cfg: fairseq's configuration.
        num_updates: Optimizer steps that the student has made.
    """
    content = {
        "args": None,
        # fairseq sets these two keys, and cannot add one
        "cfg": {**cfg, "criterion": {"_name": "model"}, "lr_scheduler": {"_name": "cosine"}},
        "model": weights,
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "", "lr_scheduler_state": {}, "num_updates": num_updates}],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"epoch": 1, "iterations_in_epoch": 0},
            AVERAGED_UPDATES: num_updates,
        },
    }
    replace_file(path, content)


def replace_file(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a pickle of tensors and plain values, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part:
        torch.save(content, part)


def known_kind(model: Mapping[Any, Any], but: str = "") -> tuple[str, str] | None:
    """Return which kind of model the names of a checkpoint are of, and the first name that shows it.

    Args:
        model: Values by name.
        but: A kind to pass over, such as "a text model".
    """
    for prefix, kind in KINDS.items():
        named = next((name for name in map(str, model) if name.startswith(prefix)), None)
        if named is not None and kind != but:
            return kind, named
    return None


def refuse_others(model: Mapping[Any, Any], wanted: str, path: Path) -> None:
    """Refuse a checkpoint in which a name is of another kind of model.

    Args:
        model: Values by name.
        wanted: The kind that is read, such as "a text model".
        path: Of the file, for the message.
    Raises:
        ValueError: A name is of another kind; the message names both.
    """
    found = known_kind(model, wanted)
    if found is not None:
        data2vec = wanted.replace("a ", "a data2vec ", 1)
        raise ValueError(f"`{path}` must hold {data2vec}, but holds {found[0]}: `{printable(found[1])}`.")


def require_tensors(parts: Sequence[Mapping[str, Any] | None], what: str) -> None:
    """Refuse values that are not tensors; the Misfit names each."""
    wrong = [name for part in parts for name, value in (part or {}).items() if not isinstance(value, Tensor)]
    if wrong:
        raise Misfit(what, [f"`{printable(name)}` is no tensor" for name in wrong])


def require_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]], prefix: str, what: str) -> None:
    """Refuse tensors of another shape than `shapes` says; the Misfit names each with `prefix` in front."""
    problems = [
        f"`{prefix}{name}` must be {shape}, but is {list(tensors[name].shape)} instead"
        for name, shape in shapes.items()
        if list(tensors[name].shape) != shape
    ]
    if problems:
        raise Misfit(what, problems)


def require_average(
    average: Mapping[str, Tensor], known: Mapping[str, Tensor], needed: set[str], averaged: str, key: str, what: str
) -> None:
    """Refuse an average that lacks tensors, or holds others than its model.

    Args:
        average: The average, by fairseq's names in the model.
        known: The model's tensors.
        needed: Names that the average must have.
        averaged: Prefix of the averaged part's names in the model.
        key: Name of the average.
        what: The beginning of the error.
    Raises:
        Misfit: Lists the unknown tensors, or else the missing ones.
    """
    unknown = sorted(average.keys() - known.keys())
    if unknown:
        raise Misfit(what, [f"`{key}.{printable(name)}` has no place in this encoder" for name in unknown])
    missing = sorted(needed - average.keys())
    if missing:
        raise Misfit(what, [f"`{key}.{name.removeprefix(averaged)}` is missing" for name in missing])


def average_of(layout: Layout, teacher: Mapping[str, Tensor], averaged: str) -> dict[str, Tensor]:
    """Return the tensors of a teacher whose fairseq names begin with `averaged`, by the rest of their names."""
    average: dict[str, Tensor] = {}
    for name, their_names in layout.names.items():
        if their_names[0].startswith(averaged):
            parts = layout.theirs(name, teacher[name])
            average |= {their_name.removeprefix(averaged): part for their_name, part in parts.items()}
    return average


def chosen(student: Model, teacher: Model | None, weights: str, path: object, key: str) -> Model:
    """Return student or teacher, as `weights` says.

    Args:
        student, teacher: Of a checkpoint.
        weights: "student" or "teacher".
        path: Of the checkpoint, for the message.
        key: Name of the average, for the message.
    Raises:
        ValueError: There is no teacher.
    """
    if weights == "student":
        return student
    if teacher is None:
        raise ValueError(f"`weights` must be student with `{path}`, which holds no average `{key}`: it has no teacher.")
    return teacher


def check_weights(weights: str) -> None:
    """Refuse other values than "student" and "teacher"."""
    if weights not in ("student", "teacher"):
        raise ValueError(f"`weights` must be student or teacher, but is {weights} instead.")


def state_of(module: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a module by name; a mapping is returned as it is."""
    return module if isinstance(module, Mapping) else module.state_dict()


def as_fp32(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Convert tensors to fp32 in host memory, and put `prefix` in front of their names."""
    return {f"{prefix}{name}": value.detach().to("cpu", torch.float32) for name, value in tensors.items()}
