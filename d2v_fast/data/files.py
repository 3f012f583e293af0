"""Folders that others filled: what is in them, listed once, and files opened without harm."""

from __future__ import annotations

import errno
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader

import numpy as np
import numpy.typing as npt

from d2v_fast.data.batch import DataError
from d2v_fast.data.listing import FileKinds, Listing, count_endings, describe_listing, ending_of
from d2v_fast.files.io_errors import advice, error_number, is_of_system
from d2v_fast.files.reading import MAX_POINTER_BYTES, POINTER, NotRegularError, is_pointer, open_regular, printable

__all__ = [
    "NUM_CHECKED",
    "NUM_NAMED",
    "NUM_NEIGHBORS",
    "PathList",
    "UnreadableFile",
    "find_files",
    "open_sample",
    "refuse_system_error",
]

# files looked at before training starts, and neighbors tried in place of an unreadable file
NUM_CHECKED = 16
NUM_NEIGHBORS = 64
NUM_NAMED = 10
# of what is left out of a folder, so many are named where the rest is only counted
NUM_EXAMPLES = 3
# hidden entries that desktops and tools make, never a user's samples; also `._x`, which macOS puts beside every `x`
_NOISE = (".ds_store", "._", ".git", ".ipynb_checkpoints", ".trash", ".spotlight-", ".fseventsd", ".thumb", ".nfs")


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

    @property
    def content(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """All texts one after the other, in the system's encoding of file names, and where each ends."""
        return self._bytes, self._ends


def find_files(root: str, inside: str | None, kinds: FileKinds) -> tuple[list[str], Listing]:
    """Find all files below a folder that a modality reads; hidden ones are left out.

    Args:
        root: the folder.
        inside: absolute folder without links in it; links to folders outside of it are left out. None follows all.
        kinds: which files to find, and which others to count by their ending.
    Returns:
        Paths relative to `root`, sorted; and what was found in the folder.
    Raises:
        DataError: if there is no such folder, or no such file in it.
    """
    if not os.path.isdir(root):
        problem = "is neither a file nor a folder" if os.path.exists(root) else "does not exist"
        problem = "is a file" if os.path.isfile(root) else problem
        raise DataError(f"`d2v.data.path` must be a folder, but '{printable(root)}' {problem}.")
    found: list[str] = []
    unread: dict[str, int] = {}
    others: dict[str, int] = {}
    skipped = _Skipped()
    for path in _walk(root, inside, skipped):
        if path.lower().endswith(kinds.read):
            found.append(os.path.relpath(path, root))
            continue
        ending = ending_of(path)
        counts = unread if _is_known(ending, kinds.unread) else others
        counts[ending] = counts.get(ending, 0) + 1
    advice = {ending: kinds.unread.get(ending) or kinds.unread["." + ending.rpartition(".")[2]] for ending in unread}
    listing = Listing(count_endings(found), unread, advice, others)
    known = (os.sep, *kinds.read, *kinds.unread)
    hidden = [path for path in skipped.hidden if path.lower().endswith(known)]
    for names, what, why in (
        (hidden, "hidden path", "(the name begins with a dot)"),
        (skipped.outside, "link", "to a folder outside (`d2v.data.follow_outside` would follow it)"),
        (skipped.unlisted, "folder", "that cannot be listed"),
    ):
        listing = listing.without(len(names), what, f"{why}: {_examples(names, root)}")
    if not found:
        raise DataError(
            f"`d2v.data.path` must hold {kinds.what} ({', '.join(kinds.read)}), but '{printable(root)}' has none"
            + "".join(f"\n  {line}" for line in describe_listing(listing, "")[1:])
        )
    return sorted(found), listing


def tried_in_order(count: int) -> list[int]:
    """Return the distances at which a readable file is looked for, from a file on, in a circle of `count` files.

    Of at most `NUM_NEIGHBORS`, half are the next ones, and the others are spread over the rest: unreadable files often
    lie side by side.
    """
    near = min(count, NUM_NEIGHBORS // 2)
    far = np.linspace(near, count - 1, min(count, NUM_NEIGHBORS) - near, dtype=np.int64)
    return [*range(near), *far.tolist()]


def open_sample(path: str, inside: str | None, max_bytes: int) -> BufferedReader:
    """Open a file of a data set for reading.

    Args:
        path: the file.
        inside: absolute folder without links in it, which the file may not lie outside of; None for any place.
        max_bytes: largest size.
    Returns:
        The file, open in binary mode.
    Raises:
        UnreadableFile: if it lies outside, is a link to nothing, is no regular file, is larger than `max_bytes`, or
            is a git-lfs pointer.
        OSError: if it cannot be opened.
    """
    real = os.path.realpath(path)
    if inside is not None and not real.startswith(os.path.join(inside, "")):
        raise UnreadableFile(f"a link out of the folder, to {real} (`d2v.data.follow_outside` would allow it)")
    if not os.path.exists(real) and os.path.islink(path):
        raise UnreadableFile(f"a link to a file that does not exist, {real}")
    try:
        # whoever puts a link in its place meanwhile is not followed
        file = open_regular(real, below=os.path.dirname(real))
    except NotRegularError as error:
        raise UnreadableFile(str(error.strerror)) from None
    try:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UnreadableFile(f"{size:,} bytes are more than {max_bytes:,}")
        if size <= MAX_POINTER_BYTES and is_pointer(os.pread(file.fileno(), MAX_POINTER_BYTES + 1, 0)):
            raise UnreadableFile(POINTER)
    except BaseException:
        file.close()
        raise
    return file


def refuse_system_error(error: BaseException, path: str, *, is_lasting: bool = False) -> None:
    """DataError for an error that says nothing about the file: a good file is not to be counted as unreadable.

    Args:
        error: raised while `path` was read.
        path: the file.
        is_lasting: what is left out now stays left out, so that a fault of the disk, which may pass, is refused too.
    """
    if is_of_system(error) or (is_lasting and error_number(error) == errno.EIO):
        remedy = advice(error, printable(os.path.dirname(path)))
        raise DataError(
            f"'{printable(path)}' could not be read, for a reason that may pass and is not the file's: "
            f"{printable(getattr(error, 'strerror', None) or str(error))}." + (f" {remedy}." if remedy else "")
        ) from error


@dataclass
class _Skipped:
    """Entries that a walk does not enter or list: their paths; those of hidden folders end with a slash."""

    hidden: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def _walk(root: str, inside: str | None, skipped: _Skipped) -> Iterator[str]:
    """Everything below `root` that is no folder; each folder once, also where links lead in circles.

    What is left out is added to `skipped`: links to folders that lie outside of `inside`, hidden entries, and folders
    that cannot be listed.
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
            skipped.unlisted.append(f"{folder} ({error.strerror or type(error).__name__})")
            continue
        for entry in entries:
            if entry.name.startswith("."):
                if not entry.name.lower().startswith(_NOISE):
                    skipped.hidden.append(entry.path + (os.sep if os.path.isdir(entry.path) else ""))
                continue
            if not entry.is_symlink():
                is_folder = entry.is_dir()
            elif is_folder := os.path.isdir(entry.path):
                real = os.path.realpath(entry.path)
                if inside is not None and real != inside and not real.startswith(os.path.join(inside, "")):
                    skipped.outside.append(entry.path)
                    continue
            if is_folder:
                folders.append(entry.path)
            else:
                # also what cannot be read, such as dead links and pipes: whoever reads it says why, and it is counted
                yield entry.path


def _is_known(ending: str, endings: Container[str]) -> bool:
    """Whether an ending, or the last part of one such as `.wav.gz`, is among `endings`."""
    return ending in endings or "." + ending.rpartition(".")[2] in endings


def _examples(paths: list[str], root: str) -> str:
    """The first of some paths below `root`, for messages."""
    names = [printable(os.path.relpath(path, root)) for path in sorted(paths)[:NUM_EXAMPLES]]
    return ", ".join([*names, *(["..."] if len(paths) > NUM_EXAMPLES else [])])
