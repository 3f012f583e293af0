"""Check files of `torch.save` before torch reads them, so that a small file cannot take much memory.

`weights_only=True` keeps a pickle from executing code, but not from expanding a few bytes to gigabytes: by compressed
entries, by functions that allocate, and by values that refer to one another.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Collection
from io import BufferedReader
from typing import IO, Any

import torch
from torch import Tensor

from d2v_fast.files.reading import printable

__all__ = ["NeededClass", "RefusedPickle", "check_pickles", "check_values"]

# first bytes of the files of torch.save, since torch 1.6 and before
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# bytes and operations of a pickle without its tensors; fairseq's have 1 MB and 100,000
MAX_PICKLE_BYTES = 64_000_000
MAX_OPERATIONS = 1_000_000
MAX_ENTRIES = 100_000
# values besides tensors, each counted once for every reference to it
MAX_VALUES, MAX_DEPTH = 2_000_000, 64
# size of all tensors over size of the file: a tensor may have several names
MAX_RATIO, MIN_LIMIT = 4, 1 << 26
# pickles in a file from before torch 1.6: magic number, version, system, content, keys of storages
NUM_LEGACY = 5
# functions that make weights; others that torch allows allocate as much as their arguments say
_HARMLESS = re.compile(
    r"collections\.OrderedDict|builtins\.(?:set|complex)|torch\.(?:\w+Storage|Size|device)|torch\.storage\.UntypedStorage|torch\.nn\.parameter\.Parameter"
    r"|torch\._utils\._rebuild_(?:tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
)


class RefusedPickle(ValueError):
    """A file is refused; the message ends a sentence that begins with the file's name."""


class NeededClass(RefusedPickle):
    """A pickle needs a class or function that is not known to be harmless.

    Attributes:
        name: Of the class or function, with its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"needs {printable(name)}")
        self.name = name


def check_pickles(file: BufferedReader, size: int, allowed: Collection[str]) -> None:
    """Check what `torch.load` would read, without unpickling it.

    Args:
        file: At its beginning, to which it is reset.
        size: Of the file in bytes.
        allowed: Names of classes that the file may need, besides those of weights.
    Raises:
        NeededClass: The file needs another class.
        RefusedPickle: The file is not one of `torch.save`, or could take much more memory than its size.
        Exception: The file is damaged: any error of the standard library's parsers.
    """
    start = file.peek(len(_ZIP))[: len(_ZIP)]
    if start.startswith(_ZIP):
        with zipfile.ZipFile(file) as archive:
            for entry in _stored(archive, file, size):
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as content:
                        _check_pickle(content, allowed)
    elif start and not start.startswith(_PICKLE):
        raise RefusedPickle("is a file of another kind")
    else:
        for _ in range(NUM_LEGACY):
            _check_pickle(file, allowed)
    file.seek(0)


def check_values(value: Any, size: int) -> None:
    """Refuse values that would take far more memory than their file of `size` bytes once they are copied.

    A tensor may repeat one number many times; a list may hold another list twice, which holds a third one twice.

    Raises:
        RefusedPickle: There are too many values, or the tensors are too large.
    """
    counts: dict[int, int] = {}
    tensors: dict[int, int] = {}

    def count(one: Any, depth: int) -> int:
        if isinstance(one, Tensor):
            tensors[id(one)] = one.numel() * one.element_size()
        if not isinstance(one, (dict, list, tuple, set)):
            return 1
        if id(one) not in counts:
            if depth > MAX_DEPTH:
                raise RefusedPickle(f"is nested more than {MAX_DEPTH} levels deep")
            # a list that contains itself is infinitely deep
            held = [*one, *one.values()] if isinstance(one, dict) else one
            counts[id(one)] = 1 + sum(count(item, depth + 1) for item in held)
        return counts[id(one)]

    if count(value, 0) > MAX_VALUES:
        raise RefusedPickle(f"holds more than {MAX_VALUES:,} values")
    limit = max(MIN_LIMIT, MAX_RATIO * size)
    if (total := sum(tensors.values())) > limit:
        raise RefusedPickle(f"holds tensors of {total:,} bytes, more than the {limit:,} allowed for its {size:,} bytes")


def _stored(archive: zipfile.ZipFile, file: BufferedReader, size: int) -> list[zipfile.ZipInfo]:
    """Return the entries of an archive whose entries are uncompressed and do not overlap; refuse any other."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if archive.comment or len(entries) > MAX_ENTRIES:
        raise RefusedPickle(f"is an archive with a comment, or of more than {MAX_ENTRIES:,} entries")
    if len({entry.filename for entry in entries}) < len(entries):
        raise RefusedPickle("holds two entries of one name")
    ends = [*(entry.header_offset for entry in entries[1:]), size]
    for entry, end in zip(entries, ends, strict=True):
        name = printable(entry.filename)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise RefusedPickle(f"holds `{name}` compressed, which torch.save never does: unpack it and save it again")
        if entry.header_offset + entry.file_size > end:
            raise RefusedPickle(f"holds `{name}` where another entry is")
    return entries


def _check_pickle(file: IO[bytes], allowed: Collection[str]) -> None:
    """Check the operations of one pickle; the file is left behind its end."""
    begin = file.tell()
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".").replace("__builtin__.", "builtins.")
            is_dtype = isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)
            if not is_dtype and not _HARMLESS.fullmatch(name) and name not in allowed:
                raise NeededClass(name)
        if number > MAX_OPERATIONS or file.tell() - begin > MAX_PICKLE_BYTES:
            raise RefusedPickle(f"is a pickle of more than {MAX_OPERATIONS:,} operations or {MAX_PICKLE_BYTES:,} bytes")
