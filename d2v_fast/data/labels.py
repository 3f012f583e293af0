"""A user's labeled samples for a probe: a class per sub-folder, or per value of a field.

Which samples are used, and which are held out, is deterministic. Pre-training reads no labels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from d2v_fast.data.files import NUM_NAMED, find_files
from d2v_fast.data.listing import FileKinds, counted, describe_listing
from d2v_fast.errors import DataError
from d2v_fast.files.reading import printable

__all__ = [
    "MAX_CLASSES",
    "MIN_PER_CLASS",
    "PATH_KEY",
    "LabeledSample",
    "LabeledSet",
    "choose",
    "labeled_files",
    "split",
]

# one to train on and one to hold out
MIN_PER_CLASS = 2
MAX_CLASSES = 1000
# the setting that names the samples, in messages
PATH_KEY = "`d2v.probe.path`"
# folder names of data set splits, which are not classes
PARTS = {"dev", "eval", "evaluation", "test", "testing", "train", "training", "val", "valid", "validation"}

_Content = TypeVar("_Content")


class LabeledSample(NamedTuple):
    """A sample before it is read.

    Attributes:
        name: path below the data set.
        label: name of the class.
        text: the text; "" for a file.
    """

    name: str
    label: str
    text: str = ""


class Choice(NamedTuple):
    """Chosen samples.

    Attributes:
        samples: sorted by class, in pseudo-random order within a class.
        num_found: number of samples of these classes that were found.
        notes: a line for each kind of sample that is left out.
    """

    samples: list[LabeledSample]
    num_found: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LabeledSet:
    """The samples that a probe uses, class by class.

    Attributes:
        root: folder that file names are relative to; for text, the file or folder that was read.
        samples: at most `max_samples` samples.
        num_found: number of samples of these classes that were found, used or not.
        notes: a line for each kind of sample that is left out.
    """

    root: str
    samples: list[LabeledSample]
    num_found: int
    notes: tuple[str, ...]

    def describe(self, what: str) -> list[str]:
        """Describe the set. The first line says what is used, the others what is left out.

        Args:
            what: a noun for one sample.
        """
        num_classes = len({sample.label for sample in self.samples})
        used = counted(len(self.samples), what)
        of = f" of {self.num_found:,}" if self.num_found > len(self.samples) else ""
        return [f"{used}{of} in {_classes(num_classes)} in '{printable(self.root)}'", *self.notes]


def labeled_files(
    path: str, kinds: FileKinds, max_samples: int, *, follow_outside: bool, key: str = PATH_KEY
) -> LabeledSet:
    """Find the files of a folder whose sub-folders are classes: `path/CLASS/.../file`.

    Args:
        path: the folder.
        kinds: files that are read.
        max_samples: largest number of files to choose.
        follow_outside: follow links that lead out of `path`.
        key: the setting that named the folder, for messages.
    Raises:
        DataError: `path` is not a folder, or holds fewer than two classes.
    """
    root = os.path.abspath(path)
    try:
        paths, listing = find_files(root, None if follow_outside else os.path.realpath(root), kinds)
    except DataError as error:
        raise DataError(str(error).replace("`d2v.data.path`", key)) from None
    inside = [path for path in paths if os.sep in path]
    refuse_parts(root, {class_of(path) for path in inside}, key)
    samples = (LabeledSample(path, class_of(path)) for path in inside)
    chosen, num_found, notes = choose(
        samples, max_samples, kinds.what, key, root, f"Every sub-folder that holds {kinds.what} is a class."
    )
    if len(inside) < len(paths):
        notes = (f"left out: {counted(len(paths) - len(inside), 'file')} in no sub-folder", *notes)
    return LabeledSet(root, chosen, num_found, (*describe_listing(listing, "")[1:], *notes))


def class_of(path: str) -> str:
    """Return the first folder of a relative path, or "" for a file that lies in none."""
    return path.partition(os.sep)[0] if os.sep in path else ""


def refuse_parts(root: str, folders: set[str], key: str) -> None:
    """Raise a DataError if the sub-folders look like splits of a data set instead of classes."""
    if folders and {folder.lower() for folder in folders} <= PARTS:
        first = sorted(folders)[0]
        raise DataError(
            f"{key} must be a folder whose sub-folders are classes, but those of '{printable(root)}' "
            f"({', '.join(sorted(folders))}) look like splits of a data set. Name one of them, such as "
            f"'{printable(os.path.join(root, first))}'."
        )


def choose(samples: Iterable[LabeledSample], max_samples: int, what: str, key: str, root: str, source: str) -> Choice:
    """Choose at most `max_samples` samples, divided over the classes as evenly as their sizes allow.

    The choice depends only on the content or name of each sample, so another order or more samples change little.

    Args:
        samples: any number of samples; only about `max_samples` are held in memory.
        max_samples: at least 2 per class.
        what: the samples in the plural, for messages.
        key: the setting that named the data set, for messages.
        root: the data set.
        source: a sentence that says what a class is.
    Raises:
        DataError: there are fewer than two classes, too many classes, or too few samples per class.
    """
    kept = _Kept[LabeledSample](max_samples)
    for sample in samples:
        kept.add(sample.label, _rank(sample), sample)
        if len(kept.counts) > MAX_CLASSES:
            some = ", ".join(printable(label[:40]) for label in list(kept.counts)[:5])
            raise DataError(
                f"{key} must hold at most {MAX_CLASSES:,} classes, but '{printable(root)}' has more (such as {some}). "
                f"Are these labels?"
            )
    small = {label: count for label, count in kept.counts.items() if count < MIN_PER_CLASS}
    if len(kept.counts) - len(small) < 2:
        found = [f"{printable(label)} ({count:,})" for label, count in sorted(kept.counts.items())]
        named = ", ".join(found[:NUM_NAMED]) + (", ..." if len(found) > NUM_NAMED else "")
        raise DataError(
            f"{key} must hold at least 2 classes of {MIN_PER_CLASS} or more {what}, but '{printable(root)}' has "
            f"{_classes(len(found))}{f': {named}' if found else ''}. {source}"
        )
    notes = []
    if small:
        named = ", ".join(f"{printable(label)}" for label in sorted(small)[:NUM_NAMED])
        more = ", ..." if len(small) > NUM_NAMED else ""
        notes.append(f"left out: {_classes(len(small))} with fewer than {MIN_PER_CLASS} {what} ({named}{more})")
    if 2 * (len(kept.counts) - len(small)) > max_samples:
        raise DataError(
            f"`d2v.probe.max_samples` must be >= {2 * (len(kept.counts) - len(small)):,}, 2 for each of the classes in "
            f"'{printable(root)}', but is {max_samples:,} instead."
        )
    for label in small:
        kept.drop(label)
    return Choice(list(kept.samples()), sum(kept.counts.values()), tuple(notes))


def split(labels: npt.NDArray[np.int64], test_fraction: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Hold out the same fraction of every class, at least one sample, and leave at least one.

    Args:
        labels: int64 `[S]`, each value at least twice.
        test_fraction: fraction to hold out.
    Returns:
        Positions of the training and of the held-out samples, int64, ascending.
    """
    held_out = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        num_test = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        # samples of a class are in pseudo-random order
        held_out[members[:num_test]] = True
    return np.flatnonzero(~held_out).astype(np.int64), np.flatnonzero(held_out).astype(np.int64)


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count:,} classes"


def _rank(sample: LabeledSample) -> int:
    """Return a pseudo-random number that depends on the content, so that duplicates fall on one side of the split."""
    content = sample.text or sample.name
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big")


@dataclass
class _Kept(Generic[_Content]):
    """The samples with the lowest ranks of each class, together at most `limit`.

    Up to twice as many are held until `samples` is called.
    """

    limit: int
    counts: dict[str, int] = field(default_factory=dict)
    _ranked: dict[str, list[tuple[int, int, _Content]]] = field(default_factory=dict)
    _num_held: int = 0

    def add(self, label: str, rank: int, content: _Content) -> None:
        """Add a sample. `rank` decides whether it stays."""
        self.counts[label] = number = self.counts.get(label, 0) + 1
        # the number breaks ties between equal ranks
        self._ranked.setdefault(label, []).append((rank, number, content))
        self._num_held += 1
        # at least one sample of each class is held
        if self._num_held > 2 * max(self.limit, len(self.counts)):
            self._trim()

    def drop(self, label: str) -> None:
        """Remove a class."""
        self._num_held -= len(self._ranked.pop(label))
        del self.counts[label]

    def samples(self) -> Iterator[_Content]:
        """Yield the samples with the lowest ranks, by class and rank."""
        self._trim()
        for label in sorted(self._ranked):
            yield from (content for _, _, content in self._ranked[label])

    def _trim(self) -> None:
        most = _share(list(self.counts.values()), self.limit)
        for ranked in self._ranked.values():
            ranked.sort(key=lambda entry: entry[:2])
            del ranked[most:]
        self._num_held = sum(map(len, self._ranked.values()))


def _share(counts: list[int], limit: int) -> int:
    """Return the largest m >= 1 such that the counts, each cut to m, sum to at most `limit`."""
    low, high = 1, max(counts, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(count, middle) for count in counts) <= limit:
            low = middle
        else:
            high = middle - 1
    return low
