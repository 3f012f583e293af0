"""Files that are written completely or not at all, with the permissions that the umask gives every new file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to, and rename that file to `path` when the block has ended.

    A reader, or a crash, sees the old file or the whole new one. If the block raises, or leaves no file there, `path`
    stays as it was.

    Args:
        path: its folder must exist.
    Yields:
        The path of an empty file, which the block may overwrite, replace or remove.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(exist_ok=False)
    # safetensors replaces it by a file that is closed to everybody else; asking for the umask instead would change it
    # for the other threads of this process
    permissions = part.stat().st_mode & 0o777
    try:
        yield part
        if part.exists():
            part.chmod(permissions)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole, in UTF-8."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file as a whole.

    Args:
        path: the file.
        tensors: in host memory, contiguous, by name.
    """
    from safetensors.torch import save_file

    with replaced(path) as part:
        save_file(dict(tensors), part, metadata={"format": "pt"})


def make_beside(folder: Path, name: str) -> Path:
    """Make a new folder `.NAME.tmp-*` in `folder`, to be filled and then renamed, and return its path."""
    while True:
        path = folder / f".{name}.tmp-{os.urandom(4).hex()}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
