"""List the files of a data folder and open them safely."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader

import numpy as np
import numpy.typing as npt

from d2v_fast.data.listing import FileKinds, Listing, count_endings, describe_listing, ending_of
from d2v_fast.errors import DataError
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
    "require_readable",
    "spread",
]

# files read before training starts, and neighbors tried in place of an unreadable file
NUM_CHECKED = 16
NUM_NEIGHBORS = 64
NUM_NAMED = 10
# examples that a message names; the rest is only counted
NUM_EXAMPLES = 3
# hidden entries that desktops and tools create, never samples; macOS puts a `._x` beside every `x`
_NOISE = (".ds_store", "._", ".git", ".ipynb_checkpoints", ".trash", ".spotlight-", ".fseventsd", ".thumb", ".nfs")


class UnreadableFile(ValueError):
    """A file that cannot be used. The message gives the reason in a few words."""


class PathList:
    """A list of strings in two arrays.

    Worker processes share the memory of arrays; of a list of strings, reference counting would copy every page.
    """

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
        """Return all strings joined, in the file system's encoding, uint8; and the end of each, int64."""
        return self._bytes, self._ends


def find_files(root: str, inside: str | None, kinds: FileKinds) -> tuple[list[str], Listing]:
    """Find all files below a folder that a modality reads, without hidden ones.

    Args:
        root: the folder.
        inside: absolute folder without links in it. Links to folders outside of it are left out; None follows all.
        kinds: files to find, and files to count by their ending.
    Returns:
        Paths relative to `root`, sorted, and the listing of the folder.
    Raises:
        DataError: `root` is not a folder, or holds no file of these kinds.
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


def tried_in_order(count: int) -> Iterator[int]:
    """Yield the offsets, modulo `count`, at which to look for a replacement of an unreadable file.

    Half of the at most `NUM_NEIGHBORS` offsets are the next files and the others are spread over the rest, because
    unreadable files often lie side by side.
    """
    near = min(count, NUM_NEIGHBORS // 2)
    yield from range(near)
    # computed only if needed, because this is called once per image
    yield from np.linspace(near, count - 1, min(count, NUM_NEIGHBORS) - near, dtype=np.int64).tolist()


def spread(num: int, count: int) -> list[int]:
    """Return up to `count` evenly spaced positions below `num`, including the first and the last."""
    return np.unique(np.linspace(0, num - 1, count, dtype=np.int64)).tolist()


def require_readable(
    sample_ids: Iterable[int], read: Callable[[int], object], paths: Callable[[int], str], in_words: str, what: str
) -> None:
    """Raise before training starts if none of a few samples is readable.

    Args:
        sample_ids: samples to try, until one is readable.
        read: reads a sample, or raises UnreadableFile.
        paths: returns the path of a sample.
        in_words: number and folder of all samples, such as "13 in '/my/images'".
        what: the samples in the plural.
    Raises:
        DataError: every sample is unreadable.
    """
    failures = []
    for sample_id in sample_ids:
        try:
            read(sample_id)
            return
        except UnreadableFile as error:
            failures.append(printable(f"{paths(sample_id)}: {error}"))
    raise DataError(
        f"`d2v.data.path` must hold readable {what}, but of {in_words} {len(failures)} were tried and none can be "
        f"read:\n  " + "\n  ".join(failures)
    )


def open_sample(path: str, inside: str | None, max_bytes: int) -> BufferedReader:
    """Open a file of a data set for reading.

    Args:
        path: the file.
        inside: absolute folder without links in it that must contain the file; None allows any place.
        max_bytes: largest size.
    Returns:
        The file, open in binary mode.
    Raises:
        UnreadableFile: the file lies outside, is a dead link, is not a regular file, is larger than `max_bytes`, or
            is a git-lfs pointer.
        OSError: the file cannot be opened.
    """
    real = os.path.realpath(path)
    if inside is not None and not real.startswith(os.path.join(inside, "")):
        raise UnreadableFile(f"a link out of the folder, to {real} (allow it with `d2v.data.follow_outside`)")
    if not os.path.exists(real) and os.path.islink(path):
        raise UnreadableFile(f"a link to a file that does not exist, {real}")
    try:
        # do not follow a link that replaces the file meanwhile
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
    """Raise a DataError for an error of the system, so that a good file is not counted as unreadable.

    Args:
        error: raised while `path` was read.
        path: the file.
        is_lasting: the decision to leave the file out is permanent, so refuse disk errors as well, which may pass.
    """
    if is_of_system(error) or (is_lasting and error_number(error) == errno.EIO):
        remedy = advice(error, printable(os.path.dirname(path)))
        raise DataError(
            f"'{printable(path)}' could not be read because of a system error that may be temporary: "
            f"{printable(getattr(error, 'strerror', None) or str(error))}." + (f" {remedy}." if remedy else "")
        ) from error


@dataclass
class _Skipped:
    """Paths that a walk leaves out. Those of hidden folders end with a slash."""

    hidden: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def _walk(root: str, inside: str | None, skipped: _Skipped) -> Iterator[str]:
    """Yield everything below `root` that is not a folder. Each folder is listed once, even if links form a cycle.

    Links to folders outside of `inside`, hidden entries, and folders that cannot be listed are added to `skipped`.
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
                # includes dead links and pipes: reading them reports the reason and counts them
                yield entry.path


def _is_known(ending: str, endings: Container[str]) -> bool:
    """Return whether an ending, or its last part (`.gz` of `.wav.gz`), is among `endings`."""
    return ending in endings or "." + ending.rpartition(".")[2] in endings


def _examples(paths: list[str], root: str) -> str:
    """Return the first paths, relative to `root`, for messages."""
    names = [printable(os.path.relpath(path, root)) for path in sorted(paths)[:NUM_EXAMPLES]]
    return ", ".join([*names, *(["..."] if len(paths) > NUM_EXAMPLES else [])])
