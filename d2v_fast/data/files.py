"""Folders that others filled: what is in them, listed once, and files opened without harm."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator

import numpy as np

from d2v_fast.data.batch import DataError
from d2v_fast.untrusted import printable

__all__ = ["NUM_CHECKED", "NUM_NAMED", "NUM_NEIGHBOURS", "PathList", "UnreadableFile", "find_files", "open_regular"]

# files looked at before training starts, and neighbours tried in place of an unreadable file
NUM_CHECKED = 16
NUM_NEIGHBOURS = 64
NUM_NAMED = 10

_log = logging.getLogger(__name__)


class UnreadableFile(ValueError):
    """A file that cannot be used; the message is the reason in a few words."""


class PathList:
    """Texts in two arrays. A list of a million strings would be copied into every worker as it is touched."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start : self._ends[index]].tobytes())


def find_files(root: str, inside: str | None, suffixes: tuple[str, ...], what: str) -> list[str]:
    """Paths of all files below `root` with one of the suffixes, relative to it and sorted; hidden ones are left out.

    Args:
        inside: absolute folder without links in it: links to folders outside of it are left out, with a warning. None
            follows all.
        what: the files in the plural, for messages.
    Raises:
        DataError: if there is no such folder, or no such file in it.
    """
    if not os.path.isdir(root):
        problem = "is a file" if os.path.exists(root) else "does not exist"
        raise DataError(f"`d2v.data.path` must be a folder, but '{printable(root)}' {problem}.")
    found: list[str] = []
    others: list[str] = []
    outside: list[str] = []
    for path in _walk(root, inside, outside):
        (found if path.lower().endswith(suffixes) else others).append(os.path.relpath(path, root))
    if outside:
        named = printable(", ".join(sorted(outside)[:NUM_NAMED]))
        _log.warning(
            "left out %d links to folders outside of '%s' (%s); `d2v.data.follow_outside` would follow them",
            len(outside),
            printable(root),
            named + (", ..." if len(outside) > NUM_NAMED else ""),
        )
    if not found:
        raise DataError(
            f"`d2v.data.path` must hold {what} ({', '.join(suffixes)}), but '{printable(root)}' has none "
            f"({len(others)} other files, {len(outside)} links to folders outside)."
        )
    return sorted(found)


def open_regular(path: str, inside: str | None, max_bytes: int) -> tuple[int, int]:
    """An open file descriptor of a regular file, and the file's size in bytes.

    Args:
        inside: absolute folder without links in it, which the file may not lie outside of; None for any place.
    Raises:
        UnreadableFile: if it lies outside, is no regular file, or is larger than `max_bytes`.
        OSError: if it cannot be opened.
    """
    real = os.path.realpath(path)
    if inside is not None and not real.startswith(os.path.join(inside, "")):
        raise UnreadableFile(f"a link out of the folder, to {real} (`d2v.data.follow_outside` would allow it)")
    # looked at before it is opened: that alone may do something to a device
    status = os.stat(real)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableFile("not a regular file")
    if status.st_size > max_bytes:
        raise UnreadableFile(f"{status.st_size:,} bytes are more than {max_bytes:,}")
    # whoever puts a link or a pipe in its place meanwhile is neither followed nor waited for
    return os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), status.st_size


def _walk(root: str, inside: str | None, outside: list[str]) -> Iterator[str]:
    """Everything below `root` that is no folder; each folder once, also where links lead in circles.

    Links to folders that lie outside of `inside` are added to `outside` instead.
    """
    seen = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            _log.warning("skipped a folder that cannot be listed: %s", error)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_symlink():
                is_folder = entry.is_dir()
            elif is_folder := os.path.isdir(entry.path):
                real = os.path.realpath(entry.path)
                if inside is not None and real != inside and not real.startswith(os.path.join(inside, "")):
                    outside.append(entry.path)
                    continue
            if is_folder:
                folders.append(entry.path)
            else:
                # also what cannot be read, such as dead links and pipes: whoever reads it says why, and it is counted
                yield entry.path
