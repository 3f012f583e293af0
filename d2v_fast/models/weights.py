"""Checks of weights that were read from a file."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from d2v_fast.files.reading import printable

# problems that one error lists
MAX_SHOWN = 10


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuse weights that are NaN or infinite.

    Args:
        tensors: Names and values; each pair is read once, so a generator keeps one tensor in memory at a time.
        source: Where they come from, such as "`x.pt`".
    Raises:
        ValueError: Some values are not finite. The message names and counts them.
    """
    counts = {}
    for name, value in tensors:
        finite = int(value.isfinite().sum())
        if finite < value.numel():
            counts[name] = f"{value.numel() - finite:,} of {value.numel():,} values of `{printable(name)}`"
    if counts:
        shown = list(counts.values())[:MAX_SHOWN]
        if len(counts) > MAX_SHOWN:
            shown.append(f"and values of {len(counts) - MAX_SHOWN} more tensors")
        raise ValueError(
            f"{source} must hold finite weights, but some are NaN or infinite. The run that made them has failed: "
            "use weights that it saved earlier.\n  " + "\n  ".join(shown)
        )
