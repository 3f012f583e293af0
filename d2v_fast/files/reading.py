"""Read untrusted files: regular files only, JSON with limits, text without control characters."""

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
# values of a JSON text; each takes up to 250 bytes of memory
MAX_VALUES = 1 << 20
# begins or separates values, delimits a string, or escapes a character in one
_MARK = re.compile(r'[,\[{"]|\\.', re.DOTALL)
# integers fit 64 bits, so that no number in a file makes a loop endless or a conversion fail
MAX_DIGITS = 18

# largest git-lfs pointer that its specification allows
MAX_POINTER_BYTES = 1023
_POINTER = re.compile(rb"version https?://[\w./-]+/spec/[\w.]+\n(?:ext-[^\n]*\n)*oid sha256:[0-9a-f]{64}\nsize \d+\n?")
POINTER = "a git-lfs pointer in place of the file: run `git lfs pull` in its repository"


_NOT_REGULAR = "not a regular file, but "
# kind of a path that is no regular file -> its test
_KINDS = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


class NotRegularError(OSError):
    """A path that is not a regular file: a folder, pipe, socket or device, or a link that must not be followed.

    Attributes:
        what: kind of the path, such as "a folder".
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

    Pipes and devices are not opened: a pipe without a writer would block the process, and opening a device can have
    side effects. The call never blocks, even if a pipe replaces the file meanwhile.

    Args:
        path: file to open. Links are followed unless `below` is given.
        below: folder that contains `path`. It may be a link, but no part of the path beneath it may be.
    Returns:
        The file, open in binary mode.
    Raises:
        NotRegularError: `path` is no regular file or, with `below`, a link or in a linked folder.
        OSError: the file cannot be opened.
        ValueError: `path` is not in `below`.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if below is not None:
        flags |= os.O_NOFOLLOW
        _refuse_links(path, below)
    _require_regular(os.stat(path), path)
    return open(_regular_handle(path, flags), "rb")


def append_regular(path: str | Path) -> BufferedWriter:
    """Open a regular file for appending; create it if it does not exist.

    Raises:
        NotRegularError: `path` exists and is no regular file.
        OSError: the file cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    if os.path.exists(path):
        _require_regular(os.stat(path), path)
    return open(_regular_handle(path, flags), "ab")


def _regular_handle(path: str | Path, flags: int) -> int:
    """Open `path` and return its descriptor, unless it is no regular file at that moment."""
    handle = os.open(path, flags, 0o666)
    try:
        _require_regular(os.fstat(handle), path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def require_regular(path: str | Path) -> None:
    """Raise the errors of `open_regular`, for a path that a library will open."""
    open_regular(path).close()


def printable(text: str) -> str:
    """Return `text` on one line; escape control characters and undecodable bytes of file names."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def is_path(text: str) -> bool:
    """Return whether system calls accept `text` as a path: it has no zero byte and can be encoded."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_text(text: str) -> bool:
    """Return whether `text` can be written in UTF-8: it has no undecodable byte of a file name or half of a pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_pointer(content: bytes) -> bool:
    """Return whether the content of a file is a git-lfs pointer, which stands for a file that was not fetched."""
    return len(content) <= MAX_POINTER_BYTES and _POINTER.fullmatch(content) is not None


def refuse_pointer(path: str | Path) -> None:
    """Refuse a git-lfs pointer.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is a git-lfs pointer.
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
        ValueError: as `open_regular`, or the file is longer than `max_bytes`.
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
        ValueError: as `read_bytes`, or the file is not UTF-8, or a git-lfs pointer.
    """
    content = read_bytes(path, max_bytes, below=below)
    if is_pointer(content):
        raise ValueError(f"{POINTER}.")
    return content.decode("utf-8")


def parse_json(text: str, *, max_values: int = MAX_VALUES, **hooks: Any) -> Any:
    """Return `json.loads(text)`, limited to `MAX_DEPTH` levels and integers of `MAX_DIGITS` digits.

    Args:
        text: JSON. Parsing takes up to 8 bytes of memory per character, beside those of the values.
        max_values: largest number of values: numbers, strings, lists and objects.
        hooks: passed to `json.loads`; `parse_int` replaces the limit on digits.
    Raises:
        ValueError: the text is no JSON or exceeds a limit; the message is one sentence.
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
    """Return the JSON of a file; see `read_text` and `parse_json` for arguments and errors."""
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
    # many of these may be inside strings
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
        # how Python represents a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")
