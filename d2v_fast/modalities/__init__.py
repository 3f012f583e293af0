"""The modalities: one record for each, and the registry that finds a record by its name.

The registry imports no torch, no numba and no configuration, because the configuration asks it for the class of a
`"d2v"` section. A record's functions import the heavy modules when they are called.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from d2v_fast.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from d2v_fast.config import D2VConfig
    from d2v_fast.config.errors import Section
    from d2v_fast.data import Batch, BatchMaker
    from d2v_fast.evaluation.inputs import Encoder, Source
    from d2v_fast.evaluation.probing import Probing
    from d2v_fast.interop.formats import HuggingFace, Published
    from d2v_fast.interop.onnx import Graph
    from d2v_fast.models.student import Student
    from d2v_fast.objectives.finetune import Finetuning

__all__ = [
    "BUILT_IN",
    "ENTRY_POINTS",
    "Modality",
    "ModalityError",
    "all_modalities",
    "build_student",
    "encoder_of",
    "modality_named",
    "modality_names",
    "modality_of",
    "modality_of_model",
    "register",
]

# each is a folder beside this file whose `__init__.py` defines MODALITY
BUILT_IN = ("vision", "speech", "text")
# the entry-point group in which other packages name their records
ENTRY_POINTS = "d2v_fast.modalities"

ConfigT = TypeVar("ConfigT", bound="D2VConfig")


def _unchanged(config: ConfigT) -> ConfigT:
    return config


class ModalityError(UserError, ValueError):
    """A modality that does not exist, cannot be imported, or is defined twice."""


@dataclass(frozen=True)
class Modality(Generic[ConfigT]):
    """Everything that the rest of the library asks of one modality.

    Attributes:
        name: value of `d2v.modality`, such as "speech".
        place: one position that may be masked, in a word, such as "frame".
        config: class of the `"d2v"` section.
        encoder: return the encoder class, which is built from `config.model`.
        batches: return the maker of the training batches. Raise DataError where there is nothing to train on.
        largest_batch: return a batch of so many samples that is as large as any of a run, on torch's current device.
            Its values are not read.
        resolved: return the section with everything filled in that follows from the data, such as a vocabulary's size.
        huggingface: return the modality's Transformers folders. None: Transformers has no such model.
        published: return the checkpoints of the modality's published code. None: there are none.
        onnx: return the graph of an encoder in eval mode. None: there is none.
        open_inputs: return the samples of a path, for an encoder, and for a path of a tokenizer or None. None: no files
            hold samples.
        probing: return the modality's probes. None: there are none.
        draw: return a figure of encoders by name, with the run's section, a folder of samples or None for the run's
            own, the number of samples and a title. None: there are no pictures.
        tokenizer: return a tokenizer, from the run's section or None, its path or None for the one that the section
            names, the digest that it must have or None, and the run's name for messages. None: there are none.
        tokenize: tokenize the data of a run into its cache, and return the data set. None: there are no tokens.
        filled: return the `"d2v"` section of a file, not yet checked, with what follows from the weights that a run is
            to begin with. None: nothing does.
        finetuning: return what the modality defines for fine-tuning. None: the objective pre-trains.
        objective: value of `d2v.objective` that this record serves.
        others: records of this modality for other objectives.
    """

    name: str
    place: str
    config: type[ConfigT]
    encoder: Callable[[], type[Student]]
    batches: Callable[[ConfigT], BatchMaker]
    largest_batch: Callable[[ConfigT, int], Batch]
    resolved: Callable[[ConfigT], ConfigT] = _unchanged
    huggingface: Callable[[], HuggingFace] | None = None
    published: Callable[[], Published] | None = None
    onnx: Callable[[Any, ConfigT], Graph] | None = None
    open_inputs: Callable[[Encoder, Path, Path | None], Source] | None = None
    probing: Callable[[], Probing] | None = None
    draw: Callable[[dict[str, Student], ConfigT, Path | None, int, str], Figure] | None = None
    tokenizer: Callable[[ConfigT | None, Path | None, str | None, str], Any] | None = None
    tokenize: Callable[[ConfigT], Any] | None = None
    filled: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    finetuning: Callable[[], Finetuning] | None = None
    objective: str = "data2vec"
    others: tuple[Modality[Any], ...] = ()

    @property
    def objectives(self) -> dict[str, Modality[Any]]:
        """The records of this modality, by objective."""
        return {one.objective: one for one in (self, *self.others)}

    @property
    def places(self) -> str:
        """The plural of `place`."""
        return f"{self.place}{'es' if self.place.endswith(('ch', 's', 'sh', 'x')) else 's'}"


_registered: dict[str, Modality[Any]] = {}


def register(modality: Modality[Any]) -> None:
    """Add a modality to those of this process.

    A package that other processes must find as well, such as those of a launcher, names its record in the entry-point
    group `d2v_fast.modalities` instead.

    Raises:
        ModalityError: another modality has this name.
    """
    if modality.name in BUILT_IN or _registered.setdefault(modality.name, modality) is not modality:
        raise ModalityError(f'there is already a modality "{modality.name}": give the new one another name.')


def modality_named(name: str) -> Modality[Any]:
    """Return the record of a modality: of this library, registered, or named by the entry point of another package.

    Raises:
        ModalityError: there is none of this name, or its package cannot be imported or does not define it.
    """
    if name in BUILT_IN:
        modality: Modality[Any] = import_module(f"{__name__}.{name}").MODALITY
        return modality
    if name not in _registered:
        _registered[name] = _installed(name)
    return _registered[name]


def modality_names() -> list[str]:
    """Return the names of all modalities, without importing those of other packages."""
    return list(dict.fromkeys([*BUILT_IN, *_registered, *(point.name for point in _entry_points(tuple(sys.path)))]))


def all_modalities() -> list[Modality[Any]]:
    """Return the records of all modalities.

    Raises:
        ModalityError: one of another package cannot be imported or does not define it.
    """
    return [modality_named(name) for name in modality_names()]


def modality_of(config: D2VConfig) -> Modality[Any]:
    """Return the record of the modality that a `"d2v"` section is of.

    Raises:
        ModalityError: see `modality_named`.
        TypeError: the section is not of the class that its modality has.
    """
    modality = modality_named(config.modality).objectives[config.objective]
    if not isinstance(config, modality.config):
        raise TypeError(
            f'the section of modality "{modality.name}" must be a {modality.config.__name__}, but is a '
            f"{type(config).__name__} instead."
        )
    return modality


def modality_of_model(config: Section) -> Modality[Any]:
    """Return the record of the modality whose model section a configuration is.

    Raises:
        TypeError: no modality has such a model section.
    """
    # one after the other: a modality of another package that cannot be imported breaks no other one
    for name in modality_names():
        for modality in modality_named(name).objectives.values():
            if type(config) is modality.config.model_fields["model"].annotation:
                return modality
    raise TypeError(f"no modality has a model section {type(config).__name__}.")


def build_student(config: D2VConfig) -> Student:
    """Return the encoder of the configuration, with the published initialization drawn from torch's generator."""
    make: Any = encoder_of(config)
    student: Student = make(config.model)
    return student


@functools.cache
def _entry_points(path: tuple[str, ...]) -> EntryPoints:
    """Return the modalities of other packages; reading the metadata of all that are installed takes milliseconds."""
    return entry_points(group=ENTRY_POINTS)


def encoder_of(config: D2VConfig) -> type[Student]:
    """Return the class of a run's encoder, which fine-tuning has in common with the pre-training of its version."""
    modality = modality_of(config)
    return (modality if modality.finetuning is None else modality_of_model(config.model)).encoder()


def _installed(name: str) -> Modality[Any]:
    """Return the record that another package's entry point names."""
    points = _entry_points(tuple(sys.path)).select(name=name)
    if not points:
        raise ModalityError(f'there is no modality "{name}". {_hint(name)}')
    if len(points) > 1:
        both = " and ".join(sorted(f"`{point.value}`" for point in points))
        raise ModalityError(f'the modality "{name}" is defined by {both}: uninstall one of these packages.')
    point: EntryPoint = next(iter(points))
    where = f'`{point.value}`, the entry point of the modality "{name}",'
    try:
        modality = point.load()
    except Exception as error:
        raise ModalityError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(modality, Modality) or modality.name != name:
        found = f'the modality "{modality.name}"' if isinstance(modality, Modality) else f"a {type(modality).__name__}"
        raise ModalityError(f"{where} must be a Modality of this name, but is {found}.")
    return modality


def _hint(name: str) -> str:
    """Say which modalities there are, and which is the nearest."""
    names = modality_names()
    near = difflib.get_close_matches(name, names, n=1)
    known = ", ".join(f'"{one}"' for one in names)
    return f'Did you mean "{near[0]}"? Known are {known}.' if near else f"Known are {known}."
