"""Files that are written completely or not at all, with the permissions that the umask gives every new file."""

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

# so much is written to the disk at a time, and counts as progress
_PART = 64 << 20
# of Linux' sync_file_range: wait for what is being written, write the rest, wait for that
_WRITE_AND_WAIT = 7


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


def flush(path: str | Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk, a part of a large file at a time.

    So a large file on a slow disk makes progress, which a dead disk does not; see `idle`.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        write_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
        size = os.fstat(handle).st_size
        if write_range is not None and size > _PART:
            for start in range(0, size, _PART):
                offset, length = ctypes.c_int64(start), ctypes.c_int64(_PART)
                if write_range(handle, offset, length, ctypes.c_uint(_WRITE_AND_WAIT)) != 0:
                    # not on this file system, or an error, which the call below reports
                    break
                alive()
        os.fsync(handle)
    finally:
        os.close(handle)
    alive()
