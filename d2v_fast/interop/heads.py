"""The head of a fine-tuned model in a Transformers folder, around an encoder that has a layout of its own."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from d2v_fast.interop.folders import read_model_config, read_weights
from d2v_fast.interop.layout import Layout

__all__ = ["HeadPart", "SavedHead", "class_keys", "read_head"]


@dataclass(frozen=True)
class HeadPart:
    """What a Transformers folder holds of a fine-tuned model beside its encoder.

    Attributes:
        prefix: In front of the encoder's names.
        tensors: The head's, by their names there.
        config: Keys of `config.json`, which replace those of the encoder.
        card: Arguments of `model_card`, which replace those of the encoder.
        code: Files of the model's code, where Transformers has no such head on the encoder.
    """

    prefix: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    card: Mapping[str, Any]
    code: tuple[Path, ...] = ()

    def around(self, layout: Layout, state: Mapping[str, Tensor]) -> tuple[Layout, Mapping[str, Tensor]]:
        """Return the layout and the state of the whole model, from those of its encoder."""

        def inside(name: str) -> str:
            return self.prefix + name

        own = {f"head of {name}": value for name, value in self.tensors.items()}
        names = {
            **{name: tuple(map(inside, theirs)) for name, theirs in layout.names.items()},
            **{f"head of {name}": (name,) for name in self.tensors},
        }
        shapes = {inside(name): shape for name, shape in layout.shapes.items()}
        whole = Layout(names, shapes, frozenset(map(inside, layout.swapped)))
        # the cast is safe: a ChainMap writes only to its first map
        return whole, ChainMap(own, cast("dict[str, Tensor]", state))


@dataclass(frozen=True)
class SavedHead:
    """The head of a fine-tuned model in a Transformers folder.

    Attributes:
        tensors: By our names.
        labels: Names of the classes in their order; None for a regression.
        keys: Keys of `d2v.head` that the tensors were trained with, such as the pooling, as far as they are known.
    """

    tensors: Mapping[str, Tensor]
    labels: tuple[str, ...] | None
    keys: Mapping[str, Any] = field(default_factory=dict)


def class_keys(labels: Sequence[str] | None) -> dict[str, Any]:
    """Return the keys of `config.json` for the classes of a head, or for a regression if `labels` is None."""
    names = ["score"] if labels is None else list(labels)
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "regression" if labels is None else "single_label_classification",
    }


def read_head(folder: Path, names: Mapping[str, str]) -> SavedHead | None:
    """Return the head of a Transformers folder; None if the folder does not hold all of its tensors.

    Args:
        folder: A folder with `config.json` and weights.
        names: Our names to theirs.
    Raises:
        ValueError: The folder cannot be read.
    """
    theirs, _ = read_weights(folder)
    if not set(names.values()) <= set(theirs):
        return None
    raw = read_model_config(folder)
    known, labels = raw.get("id2label"), None
    if raw.get("problem_type") != "regression" and isinstance(known, dict):
        labels = tuple(str(known.get(str(number), number)) for number in range(len(known)))
    return SavedHead({own: theirs[name].float() for own, name in names.items()}, labels)
