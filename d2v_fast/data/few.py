"""Which labeled samples are held out, and which are trained on: functions of the labels and a seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from d2v_fast.data.files import NUM_NAMED
from d2v_fast.data.samples import SampleSource, digest_of
from d2v_fast.errors import DataError
from d2v_fast.files.reading import is_text, printable
from d2v_fast.masking.streams import FEW, SPLIT, permutation

__all__ = ["LabeledSubset", "classes_of", "few", "held_out", "held_out_classes", "require_trained"]

_log = logging.getLogger(__name__)


class LabeledSubset:
    """Some samples of a data set with their labels; see `SampleSource`.

    Args:
        source: the data set.
        positions: int64 `[S]`, of the samples in it.
        targets: of the samples, in values whose text is the same in every process.
    """

    def __init__(self, source: SampleSource, positions: npt.NDArray[np.int64], targets: Sequence[object]) -> None:
        self._source, self._positions, self._targets = source, positions, targets

    def names_digest(self) -> str:
        """Return a digest of the samples' names, and of which of them are used with which labels."""
        labels = "\n".join(map(repr, self._targets)).encode("utf-8", "surrogateescape")
        return digest_of(self._source.names_digest().encode(), self._positions, labels)

    def sizes_digest(self) -> str:
        """See `SampleSource`; of the whole data set."""
        return self._source.sizes_digest()


def held_out(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Hold out the same share of every class: at least one sample of a class that has several, and never all.

    Args:
        labels: int64 `[S]`.
        fraction: the share.
        seed: of the choice.
    Returns:
        bool `[S]`, True for samples that are held out.
    """
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        number = min(max(1, round(fraction * len(members))), len(members) - 1)
        chosen[members[permutation(seed, SPLIT, int(label), len(members))[:number]]] = True
    return chosen


def few(labels: npt.NDArray[np.int64], per_class: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Choose at most so many samples of every class.

    Args:
        labels: int64 `[S]`.
        per_class: largest number of samples of a class; None chooses all.
        seed: of the choice. With the same seed, the samples of a smaller number are among those of a larger one.
    Returns:
        int64, ascending positions in `labels`.
    """
    if per_class is None:
        return np.arange(len(labels), dtype=np.int64)
    chosen = [
        members[permutation(seed, FEW, int(label), len(members))[:per_class]]
        for label in np.unique(labels)
        for members in [np.flatnonzero(labels == label)]
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, dtype=np.int64)


def classes_of(names: Sequence[str], labels: Sequence[str], where: str) -> npt.NDArray[np.int64]:
    """Return the number of each sample's class, int64 `[S]`.

    Args:
        names: of the samples' classes.
        labels: the classes in order, `d2v.labels`.
        where: the setting that names the samples, such as "`d2v.valid.path`".
    Raises:
        DataError: a sample is of another class, or the name of a class is not UTF-8.
    """
    if strange := sorted({name for name in (*labels, *names) if not is_text(name)}):
        raise DataError(
            f"{where} must hold classes whose names are UTF-8 text, but has {_named(strange)}. Rename them: "
            "answers and pictures could not be written."
        )
    numbers = {label: number for number, label in enumerate(labels)}
    if unknown := sorted({name for name in names if name not in numbers}):
        raise DataError(
            f"{where} must hold samples of the classes that are trained on ({_named(labels)}), but has some of "
            f"{_named(unknown)}. Remove those, or add samples of that class to the training data."
        )
    return np.array([numbers[name] for name in names], dtype=np.int64)


def held_out_classes(names: Sequence[str], labels: Sequence[str], where: str) -> npt.NDArray[np.int64]:
    """Return the number of each held-out sample's class, int64 `[S]`, and log which classes have no sample.

    The arguments and errors are those of `classes_of`.
    """
    classes = classes_of(names, labels, where)
    found = set(names)
    if missing := [label for label in labels if label not in found]:
        _log.warning("%s has no held-out sample of %s: no answer of this kind is scored", where, _named(missing))
    return classes


def require_trained(classes: npt.NDArray[np.int64], labels: Sequence[str], where: str) -> None:
    """Refuse training data without any sample of a class.

    Args:
        classes: int64 `[S]`, of the training samples.
        labels: the classes in order, `d2v.labels`.
        where: the setting that names the samples.
    Raises:
        DataError: a class has none.
    """
    counts = np.bincount(classes, minlength=len(labels))
    if missing := [label for label, count in zip(labels, counts.tolist(), strict=True) if count == 0]:
        raise DataError(
            f"{where} must hold samples of every class in `d2v.labels`, but has none of {_named(missing)}. Add some, "
            "or remove the class from `d2v.labels`."
        )


def _named(names: Sequence[str]) -> str:
    shown = [f'"{printable(name)}"' for name in names[:NUM_NAMED]]
    return ", ".join(shown) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")
