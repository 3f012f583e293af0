"""What the commands that write a row per input share: the inputs left out, and the packages that write a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from d2v_fast.data.files import NUM_NAMED
from d2v_fast.data.listing import counted
from d2v_fast.errors import DataError, OptionError
from d2v_fast.evaluation.inputs import Source
from d2v_fast.files.reading import printable
from d2v_fast.packages import install_command

__all__ = ["import_arrow", "report_left_out", "require_folder", "require_some"]


def require_folder(to: Path) -> None:
    """Refuse an output file in a folder that does not exist.

    Raises:
        OptionError: There is no such folder.
    """
    if not to.absolute().parent.is_dir():
        raise OptionError(f"`--to` must be in a folder that exists, but {to.absolute().parent} does not.")


def require_some(count: int, source: Source, inputs: Path, bad: list[str]) -> None:
    """Refuse inputs none of which can be read.

    Args:
        count: Samples that could be read.
        source: The samples.
        inputs: Their path.
        bad: Those that could not be read, as `path: reason`.
    Raises:
        DataError: None could be read.
    """
    if count == 0:
        raise DataError(f"none of the {source.what}s in '{printable(str(inputs))}' can be read:{_named(bad)}")


def report_left_out(count: int, source: Source, bad: list[str]) -> None:
    """Print, on the error stream, what was left out of the samples of a source or looks wrong in them.

    Args:
        count: Samples that were written.
        source: The samples, which have all been read.
        bad: Those that could not be read, as `path: reason`.
    """
    if bad:
        what = f"{len(bad):,} of {count + len(bad):,} {source.what}s are unreadable and left out:{_named(bad)}"
        print(what, file=sys.stderr)
    if source.num_cut:
        lines = counted(source.num_cut, source.what)
        print(f"only the beginning is read of {lines} longer than the model reads", file=sys.stderr)
    if problem := source.problem():
        print(f"warning: {problem}", file=sys.stderr)


def import_arrow(instead: str) -> Any:
    """Import pyarrow.

    Args:
        instead: What can be written without it, such as "an .npy file".
    Raises:
        ValueError: It cannot be imported.
    """
    try:
        import pyarrow
        import pyarrow.parquet

        return pyarrow
    except Exception as error:
        raise ValueError(
            f"a .parquet file is written with pyarrow, which cannot be imported ({type(error).__name__}: {error}). "
            f"Install it with `{install_command('pyarrow')}`, or write {instead}."
        ) from None


def _named(bad: list[str]) -> str:
    more = len(bad) - NUM_NAMED
    return "".join(f"\n  {text}" for text in bad[:NUM_NAMED]) + (f"\n  and {more} more" if more > 0 else "")
