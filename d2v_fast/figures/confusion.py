"""`confusion.png`: how often each class was taken for each other one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from d2v_fast.figures.saving import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# most classes whose names and counts are written
_MAX_NAMED, _MAX_COUNTED = 60, 25
# letters of a class's name
_MAX_LETTERS = 24
# inches
_MIN_SIZE, _MAX_SIZE, _PER_CLASS = 4.5, 16.0, 0.35


def draw_confusion(counts: npt.NDArray[np.int64], labels: Sequence[str], path: Path, title: str) -> None:
    """Write `confusion_figure` to the PNG file `path`."""
    write_figure(confusion_figure(counts, labels, title), path, dpi=100)


def confusion_figure(counts: npt.NDArray[np.int64], labels: Sequence[str], title: str) -> Figure:
    """Draw a confusion matrix; the color is the share of a row.

    Args:
        counts: int64 `[C, C]`, samples by class (row) and prediction (column).
        labels: names of the C classes.
        title: of the picture.
    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    size = min(_MAX_SIZE, max(_MIN_SIZE, _PER_CLASS * len(labels) + 1.5))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
    if len(labels) <= _MAX_NAMED:
        # a dollar sign would begin a formula
        names = [label[:_MAX_LETTERS].replace("$", r"\$") for label in labels]
        axes.set_xticks(range(len(labels)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), names, fontsize=8)
    if len(labels) <= _MAX_COUNTED:
        for row, column in np.argwhere(counts > 0).tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=color)
    return figure
