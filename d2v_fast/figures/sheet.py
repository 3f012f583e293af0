"""Sheets of samples: which samples a picture shows, and where each stands. Images and recordings share it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from d2v_fast.errors import DataError
from d2v_fast.figures.saving import write_figure
from d2v_fast.files.reading import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COUNT = 24
# samples side by side
PER_ROW = 8
# letters of a line under a sample
MAX_LETTERS = 20
# consecutive samples to try in place of one that cannot be shown
_TRIES = 64
# inches
_LEFT, _HEADER = 1.05, 0.5

_Sample = TypeVar("_Sample")


def choose_samples(num_samples: int, count: int, read: Callable[[int], _Sample]) -> dict[int, _Sample]:
    """Read samples that are spread evenly over a data set. An unreadable sample is replaced by the next readable one.

    Args:
        num_samples: size of the data set.
        count: number of samples to read.
        read: returns the sample of an id, or raises DataError if it cannot be shown.
    Returns:
        What `read` returned, by sample id in ascending order; fewer than `count` if the data set has no more.
    Raises:
        DataError: no sample can be shown.
    """
    found: dict[int, _Sample] = {}
    tried: set[int] = set()
    last = DataError("there is no sample to show")
    for start in np.unique(np.linspace(0, num_samples - 1, count, dtype=np.int64)).tolist():
        for sample_id in range(start, start + min(_TRIES, num_samples)):
            sample_id %= num_samples
            if sample_id in tried:
                continue
            tried.add(sample_id)
            try:
                found[sample_id] = read(sample_id)
                break
            except DataError as error:
                last = error
    if not found:
        raise last
    return dict(sorted(found.items()))


def say_if_fewer(num_shown: int, count: int, what: str) -> None:
    """Warn on stderr if the data set has fewer samples than the user asked for.

    Args:
        num_shown: samples in the picture.
        count: samples asked for.
        what: plural of a sample, such as "images".
    """
    if num_shown < count:
        print(f"only {num_shown} {what} are drawn: the data set has no {count} readable ones", file=sys.stderr)


def label_of(name: str) -> str:
    """Return the label of a file: its folder and its name, on one line each, shortened if they are long."""
    folder, own = os.path.split(name)
    return "\n".join(_shortened(printable(part)) for part in (os.path.basename(folder), own) if part)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure that is cut to its content; see `write_figure`."""
    write_figure(figure, path, dpi=150, bbox_inches="tight", pad_inches=0.1)


@dataclass(frozen=True)
class Spacing:
    """Sizes in a `Sheet`, in inches.

    Attributes:
        cell: width and height of a view.
        above, below: space over and under a block.
        gap: space between views, as a fraction of `cell`.
        beside: space between the labels of the rows and the first views.
    """

    cell: float
    below: float
    above: float = 0.0
    gap: float = 0.06
    beside: float = 0.12


# of the masks of a sample; the others are alike
MAX_MASKS = 3


class Sheet:
    """A figure with one column per sample and one row per view of it, wrapped into blocks of `PER_ROW` columns.

    Args:
        num_samples: number of columns.
        rows: label of each row.
        spacing: sizes of the views and of the space between them.
        title, caption: two lines at the top.
    Attributes:
        figure: matplotlib's figure.
    """

    def __init__(self, num_samples: int, rows: Sequence[str], spacing: Spacing, *, title: str, caption: str) -> None:
        from matplotlib.figure import Figure

        cell, beside = spacing.cell, spacing.beside
        columns = min(num_samples, PER_ROW)
        num_blocks = math.ceil(num_samples / PER_ROW)
        step = cell * (1 + spacing.gap)
        block = spacing.above + step * len(rows) + spacing.below
        left = _LEFT + beside
        width, height = left + step * columns, _HEADER + block * num_blocks
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self._axes: list[list[Axes]] = []
        for index in range(num_samples):
            number, column = divmod(index, PER_ROW)
            top = height - _HEADER - number * block - spacing.above
            places = [(left + column * step, top - cell - row * step, cell, cell) for row in range(len(rows))]
            self._axes.append(
                [self.figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in places]
            )
            if column == 0:
                for axis, name in zip(self._axes[-1], rows, strict=True):
                    x, y = axis.get_position().x0 - beside / width, axis.get_position().y0 + cell / 2 / height
                    self.figure.text(x, y, name, fontsize=9, ha="right", va="center", parse_math=False)
        self.figure.text(0, 1, title, fontsize=11, fontweight="bold", va="top", parse_math=False)
        self.figure.text(0, 1 - 0.22 / height, caption, fontsize=8, color="0.4", va="top")

    def axes(self, index: int) -> list[Axes]:
        """Return the views of a sample, from top to bottom."""
        return self._axes[index]


def _shortened(text: str) -> str:
    if len(text) <= MAX_LETTERS:
        return text
    tail = MAX_LETTERS // 2
    return f"{text[: MAX_LETTERS - tail - 1]}…{text[-tail:]}"
