"""What pictures of images and of recordings share: which samples are shown, and where each stands on the sheet."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from d2v_fast.errors import DataError
from d2v_fast.files.atomic import replaced
from d2v_fast.files.reading import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_COUNT = 24
# samples beside each other
PER_ROW = 8
# letters of a line under a sample
MAX_LETTERS = 20
# samples that are tried for one that is shown
_TRIES = 64
# inches
_LEFT, _HEADER = 1.05, 0.5

_Sample = TypeVar("_Sample")


def choose_samples(num_samples: int, count: int, read: Callable[[int], _Sample]) -> dict[int, _Sample]:
    """Read samples spread evenly over a data set, in their order; each of those that cannot be shown is replaced by the
    next that can.

    Args:
        num_samples: In the data set.
        count: Samples to show.
        read: From a sample id to what is shown. A DataError says that the sample cannot be shown.
    Returns:
        What `read` returned by sample id; fewer than `count` where the data set has no more.
    Raises:
        DataError: No sample can be shown.
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
    """Print a line on the error stream if fewer samples than asked for are shown."""
    if num_shown < count:
        print(f"{num_shown} {what} are drawn: there are no {count} different ones that can be read", file=sys.stderr)


def label_of(name: str) -> str:
    """A file's name for its picture: its folder and its own name on a line each, with long ones shortened."""
    folder, own = os.path.split(name)
    return "\n".join(_shortened(printable(part)) for part in (os.path.basename(folder), own) if part)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; letters that the font lacks become boxes without a warning each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        with replaced(path) as part:
            kind = path.suffix.removeprefix(".") or "png"
            figure.savefig(part, format=kind, dpi=150, bbox_inches="tight", pad_inches=0.1)


class Sheet:
    """A figure with one column per sample and one row per view of it, wrapped into blocks of `PER_ROW` columns.

    Args:
        num_samples: How many.
        rows: The label of each row.
        cell: Width and height of a view, in inches.
        above, below: Space over and under a block, in inches.
        gap: Space between views, as a share of `cell`.
        beside: Space between the rows' labels and the first views, in inches.
        title, caption: Two lines above all.
    Attributes:
        figure: Matplotlib's figure.
    """

    def __init__(
        self,
        num_samples: int,
        rows: Sequence[str],
        *,
        cell: float,
        above: float = 0.0,
        below: float,
        gap: float = 0.06,
        beside: float = 0.12,
        title: str,
        caption: str,
    ) -> None:
        from matplotlib.figure import Figure

        self._columns = min(num_samples, PER_ROW)
        num_blocks = math.ceil(num_samples / PER_ROW)
        step = cell * (1 + gap)
        block = above + step * len(rows) + below
        left = _LEFT + beside
        width, height = left + step * self._columns, _HEADER + block * num_blocks
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self._axes: list[list[Axes]] = []
        for index in range(num_samples):
            number, column = divmod(index, PER_ROW)
            top = height - _HEADER - number * block - above
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
        """The views of a sample, from top to bottom."""
        return self._axes[index]


def _shortened(text: str) -> str:
    if len(text) <= MAX_LETTERS:
        return text
    tail = MAX_LETTERS // 2
    return f"{text[: MAX_LETTERS - tail - 1]}…{text[-tail:]}"
