"""Write files completely or not at all, with the permissions that the umask gives every new file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_fast.processes.idle import alive

if TYPE_CHECKING:
    from torch import Tensor

# bytes flushed at a time; each part counts as progress
_PART = 64 << 20
# flags of Linux' sync_file_range: wait for pending writes, write the rest, wait for that
_WRITE_AND_WAIT = 7


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` at the end of the block.

    Readers see the old file or the complete new one, also after a crash. If the block raises or removes the temporary
    file, `path` does not change.

    Args:
        path: file to replace; its folder must exist.
    Yields:
        Path of an empty file, which the block may overwrite, replace or remove.
    """
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(exist_ok=False)
    # safetensors replaces it with a private file; reading the umask would change it for the other threads
    permissions = part.stat().st_mode & 0o777
    try:
        yield part
        if part.exists():
            part.chmod(permissions)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, in UTF-8."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace a safetensors file atomically.

    Args:
        path: file to replace.
        tensors: contiguous tensors in host memory, by name.
    """
    from safetensors.torch import save_file

    with replaced(path) as part:
        save_file(dict(tensors), part, metadata={"format": "pt"})


def make_beside(folder: Path, name: str) -> Path:
    """Create a folder `.NAME.tmp-*` in `folder`, to fill and rename later, and return its path."""
    while True:
        path = folder / f".{name}.tmp-{os.urandom(4).hex()}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def flush(path: str | Path) -> None:
    """Flush a file, or the entries of a folder, to the disk.

    A large file is flushed in parts, each of which counts as progress for `IdleWatch`: a slow disk makes progress, a
    dead disk does not.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        write_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
        size = os.fstat(handle).st_size
        if write_range is not None and size > _PART:
            for start in range(0, size, _PART):
                offset, length = ctypes.c_int64(start), ctypes.c_int64(_PART)
                if write_range(handle, offset, length, ctypes.c_uint(_WRITE_AND_WAIT)) != 0:
                    # the file system lacks it, or failed; fsync reports errors
                    break
                alive()
        os.fsync(handle)
    finally:
        os.close(handle)
    alive()
