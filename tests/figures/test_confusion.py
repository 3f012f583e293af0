"""The picture of a confusion matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from d2v_fast.figures.confusion import confusion_figure, draw_confusion

COUNTS = np.array([[3, 1, 0], [0, 0, 0], [1, 0, 7]])
# letters that the font lacks, and a formula's mark
LABELS = ("猫", "$5", "dog")


def test_counts_stand_at_their_class_and_prediction() -> None:
    (axes,) = confusion_figure(COUNTS, LABELS, "title").axes
    written = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (0, 2): "1", (2, 2): "7"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["猫", r"\$5", "dog"]
    shares = axes.images[0].get_array()
    assert shares is not None
    assert np.allclose(shares, [[0.75, 0.25, 0], [0, 0, 0], [0.125, 0, 0.875]])


def test_any_name_of_a_class_is_drawn_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    draw_confusion(COUNTS, LABELS, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
