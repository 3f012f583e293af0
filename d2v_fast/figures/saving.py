"""Write figures to files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_fast.files.atomic import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Replace a picture; letters that the font lacks become boxes, without one warning each.

    Args:
        figure: the figure.
        path: the file; its suffix is the format, PNG if it has none.
        options: of matplotlib's `savefig`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        with replaced(path) as part:
            figure.savefig(part, format=path.suffix.removeprefix(".") or "png", **options)
