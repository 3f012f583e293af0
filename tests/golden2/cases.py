"""Read recorded steps: a `.safetensors` file with the tensors, and a `.json` file beside it that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# of a case; also the key of a modality in the reference's configuration
KINDS = ("IMAGE", "AUDIO", "TEXT")
_KEYS = {"modality": str, "config": dict, "ema_decay_of_the_update": float}
_TENSORS = ("input", "mask", "ids_keep", "decoder_noise", "expected.prediction", "expected.target")


class CaseError(ValueError):
    """A folder or a file that holds no recorded step; the message is for the user."""


@dataclass(frozen=True)
class Case:
    """One recorded step.

    Attributes:
        name: The file's, without its suffix.
        kind: One of `KINDS`.
        model: The reference's `cfg.model`.
        decay: Of the teacher's update.
        frozen: Names of the student's tensors that are not trained.
        tensors: Everything recorded, by name.
    """

    name: str
    kind: str
    model: Mapping[str, Any]
    decay: float
    frozen: frozenset[str]
    tensors: Mapping[str, Tensor]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}

    @property
    def checkpoint(self) -> dict[str, Any]:
        """The case as the content of a checkpoint of the reference, before the update of the teacher."""
        return {
            "cfg": {"model": dict(self.model), "task": {}, "criterion": None, "lr_scheduler": None},
            "model": {**self.below("student."), "_ema": self.below("teacher.")},
            # every update of the average has been made
            "extra_state": {"average_num_updates": 0},
        }


def cases_of(folder: Path) -> list[Case]:
    """Read every case of a folder, in the order of their names.

    Raises:
        CaseError: There is no folder or no case in it, one of a pair of files is missing, or a file is not as the
            README says.
    """
    if not folder.is_dir():
        raise CaseError(f"`{folder}` must be a folder of recorded cases, but is {_what_is(folder)}.")
    described = {path.stem for path in folder.glob("*.json") if "case" in _description(path)}
    recorded = {path.stem for path in folder.glob("*.safetensors")}
    for name in sorted(described ^ recorded):
        there, missing = (".json", ".safetensors") if name in described else (".safetensors", ".json")
        raise CaseError(f"`{folder}` holds {name}{there}, but no {name}{missing} of a case beside it.")
    if not recorded:
        raise CaseError(f"`{folder}` must hold cases, each a .json and a .safetensors file, but holds none.")
    return [_case(folder, name) for name in sorted(recorded)]


def _what_is(path: Path) -> str:
    return "a file" if path.exists() else "missing"


def _description(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CaseError(f"`{path}` must describe a case as JSON, but: {error}.") from None
    return found if isinstance(found, dict) else {}


def _case(folder: Path, name: str) -> Case:
    described, path = _description(folder / f"{name}.json"), folder / f"{name}.safetensors"
    for key, kind in _KEYS.items():
        if not isinstance(described.get(key), kind):
            raise CaseError(f"`{key}` in {folder / name}.json must be there, as a {kind.__name__}.")
    if described["modality"] not in KINDS:
        known = ", ".join(KINDS)
        raise CaseError(
            f"`modality` in {folder / name}.json must be one of {known}, but is {described['modality']!r} instead."
        )
    model = described["config"].get("model")
    if not isinstance(model, dict):
        raise CaseError(f"`config.model` in {folder / name}.json must be the configuration of the reference.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CaseError(f"`{path}` must be a safetensors file, but: {error}.") from None
    if missing := [one for one in _TENSORS if one not in tensors]:
        raise CaseError(f"`{path}` must hold the tensor `{missing[0]}`, but does not.")
    frozen = frozenset(map(str, described.get("parameters_without_gradient", [])))
    return Case(name, described["modality"], model, described["ema_decay_of_the_update"], frozen, tensors)
