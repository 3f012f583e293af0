"""Read what somebody else wrote: regular files, JSON with limits, text without what a terminal or a log would obey."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

MAX_DEPTH = 32
# values of a JSON text, each of which takes up to 250 bytes of memory
MAX_VALUES = 1 << 20
# what begins or separates values, what begins and ends a string, and what stands in a string for another letter
_MARK = re.compile(r'[,\[{"]|\\.', re.DOTALL)
# what 64 bits hold: no number of a file can make a loop endless, or a conversion fail
MAX_DIGITS = 18

# all of a file that git-lfs leaves in the place of a large one; the specification allows no more bytes
MAX_POINTER_BYTES = 1023
_POINTER = re.compile(rb"version https?://[\w./-]+/spec/[\w.]+\n(?:ext-[^\n]*\n)*oid sha256:[0-9a-f]{64}\nsize \d+\n?")
POINTER = "a git-lfs pointer in the place of the file: run `git lfs pull` in its repository"


_NOT_REGULAR = "not a regular file, but "
# what lies at a path where a file was expected, by the test that recognizes it
_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class NotRegularError(OSError):
    """There is no regular file at a path, but a folder, a pipe, a socket, a device, or a link that is not followed.

    Attributes:
        what: there is instead.
    """

    def __init__(self, path: str | Path, what: str) -> None:
        self.what = what
        super().__init__(errno.EINVAL, f"{_NOT_REGULAR}{what}", os.fspath(path))

    def __reduce__(self) -> tuple[type[NotRegularError], tuple[str, str]]:
        return type(self), (self.filename, self.what)

    def __str__(self) -> str:
        return f"'{printable(self.filename)}' is {self.strerror}"


def open_regular(path: str | Path, *, below: str | Path | None = None) -> BufferedReader:
    """Open a regular file for reading.

    A pipe without a writer would block the process, signals included, and opening a device can have effects of its own:
    neither is opened. Whatever replaces the file meanwhile is not waited for.

    Args:
        path: the file. Links are followed unless `below` is given.
        below: a folder that `path` lies in. The folder itself may be a link, but no part of the path beneath it.
    Returns:
        The file, open in binary mode.
    Raises:
        NotRegularError: it is no regular file or, with `below`, it is a link or lies in a linked folder.
        OSError: it cannot be opened.
        ValueError: it does not lie in `below`.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if below is not None:
        flags |= os.O_NOFOLLOW
        _refuse_links(path, below)
    _require_regular(os.stat(path), path)
    return open(_regular_handle(path, flags), "rb")


def append_regular(path: str | Path) -> BufferedWriter:
    """Open a regular file, which is made where there is none, to write behind its end.

    Raises:
        NotRegularError: it is no regular file.
        OSError: it cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    if os.path.exists(path):
        _require_regular(os.stat(path), path)
    return open(_regular_handle(path, flags), "ab")


def _regular_handle(path: str | Path, flags: int) -> int:
    """Return a descriptor of what lies at `path` at the moment at which it is opened."""
    handle = os.open(path, flags, 0o666)
    try:
        _require_regular(os.fstat(handle), path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def require_regular(path: str | Path, *, below: str | Path | None = None) -> None:
    """Raise what `open_regular` raises, for a library that opens the path itself."""
    open_regular(path, below=below).close()


def printable(text: str) -> str:
    """`text` on one line, with escapes for control characters and for bytes of a file name that are no text."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def is_path(text: str) -> bool:
    """False for what no system call takes for a path: with a zero byte, or letters that have no encoding."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_pointer(content: bytes) -> bool:
    """Whether the content of a file is that of a git-lfs pointer, which stands for a file that was not fetched."""
    return len(content) <= MAX_POINTER_BYTES and _POINTER.fullmatch(content) is not None


def refuse_pointer(path: str | Path) -> None:
    """ValueError if a file is a git-lfs pointer.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        if is_pointer(file.read(MAX_POINTER_BYTES + 1)):
            raise ValueError(f"`{printable(str(path))}` is {POINTER}.")


def read_bytes(path: str | Path, max_bytes: int, *, below: str | Path | None = None) -> bytes:
    """Return the content of a regular file of at most `max_bytes`.

    Args:
        path, below: as for `open_regular`.
    Raises:
        OSError: as `open_regular`.
        ValueError: as `open_regular`, or it is longer than `max_bytes`.
    """
    with open_regular(path, below=below) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes.")
    return content


def read_text(path: str | Path, max_bytes: int, *, below: str | Path | None = None) -> str:
    """Return the text of a regular UTF-8 file of at most `max_bytes`.

    Args:
        path, below: as for `open_regular`.
    Raises:
        OSError: as `open_regular`.
        ValueError: as `read_bytes`, or it is not UTF-8, or a git-lfs pointer.
    """
    content = read_bytes(path, max_bytes, below=below)
    if is_pointer(content):
        raise ValueError(f"{POINTER}.")
    return content.decode("utf-8")


def parse_json(text: str, *, max_values: int = MAX_VALUES, **hooks: Any) -> Any:
    """What `json.loads` returns, for at most `MAX_DEPTH` levels and integers of at most `MAX_DIGITS` digits.

    Args:
        text: its memory is four bytes per letter at most, and that of the strings in it as much again.
        max_values: numbers, strings, lists and sections in it.
        hooks: handed to `json.loads`; `parse_int` replaces the limit on digits.
    Raises:
        ValueError: what is wrong, in one sentence.
    """
    _refuse_many(text, max_values)
    try:
        value = json.loads(text, **{"parse_int": _integer, **hooks})
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise ValueError(f"nested too deeply: more than {MAX_DEPTH} levels.") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for holder in level if isinstance(holder, (dict, list)) for item in _items(holder)]
        if not level:
            return value
    raise ValueError(f"nested too deeply: more than {MAX_DEPTH} levels.")


def read_json(path: str | Path, max_bytes: int, *, below: str | Path | None = None, **hooks: Any) -> Any:
    """`parse_json` of `read_text`, with the errors of both."""
    return parse_json(read_text(path, max_bytes, below=below), **hooks)


def _require_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = next((kind for kind, holds in _KINDS.items() if holds(status.st_mode)), "a special file")
        raise NotRegularError(path, what)


def _refuse_links(path: str | Path, below: str | Path) -> None:
    """Raise NotRegularError if a part of `path` beneath the folder `below` is a link."""
    parts = Path(os.path.abspath(path)).relative_to(os.path.abspath(below)).parts
    place = Path(below)
    for number, part in enumerate(parts, 1):
        place /= part
        if stat.S_ISLNK(os.lstat(place).st_mode):
            raise NotRegularError(path, "a link" if number == len(parts) else f"in '{printable(str(place))}', a link")


def _refuse_many(text: str, max_values: int) -> None:
    """Raise ValueError if a JSON text holds more values than `max_values`."""
    if sum(text.count(mark) for mark in ",[{") <= max_values:
        return
    # most may be commas in strings
    count, inside = 0, False
    for match in _MARK.finditer(text):
        mark = match[0]
        if mark == '"':
            inside = not inside
        elif not inside and mark in ",[{":
            count += 1
            if count > max_values:
                raise ValueError(f"holds more than {max_values:,} values.")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"holds {digits[:MAX_DIGITS]}..., an integer of more than {MAX_DIGITS} digits.")
    return int(digits)


def _items(holder: dict[str, Any] | list[Any]) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else holder


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        # how Python keeps a byte that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
