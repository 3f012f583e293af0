"""What somebody else wrote: JSON read with limits, text shown without what a terminal or a log would obey."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

MAX_DEPTH = 32
# what 64 bits hold: no number of a file can make a loop endless, or a conversion fail
MAX_DIGITS = 18

# all of a file that git-lfs leaves in the place of a large one; the specification allows no more bytes
MAX_POINTER_BYTES = 1023
_POINTER = re.compile(rb"version https?://[\w./-]+/spec/[\w.]+\n(?:ext-[^\n]*\n)*oid sha256:[0-9a-f]{64}\nsize \d+\n?")
POINTER = "a git-lfs pointer in the place of the file: run `git lfs pull` in its repository"


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
    with open(path, "rb") as file:
        if is_pointer(file.read(MAX_POINTER_BYTES + 1)):
            raise ValueError(f"`{printable(str(path))}` is {POINTER}.")


def read_text(path: str | Path, max_bytes: int) -> str:
    """The UTF-8 text of a file, of which no more than the limit is read, whatever it is.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than `max_bytes`, not UTF-8, or a git-lfs pointer.
    """
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"longer than {max_bytes:,} bytes.")
    if is_pointer(content):
        raise ValueError(f"{POINTER}.")
    return content.decode("utf-8")


def parse_json(text: str, **hooks: Any) -> Any:
    """What `json.loads` returns, for at most `MAX_DEPTH` levels and integers of at most `MAX_DIGITS` digits.

    Args:
        hooks: handed to `json.loads`; `parse_int` replaces the limit on digits.
    Raises:
        ValueError: what is wrong, in one sentence.
    """
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


def read_json(path: str | Path, max_bytes: int, **hooks: Any) -> Any:
    """`parse_json` of `read_text`, with the errors of both."""
    return parse_json(read_text(path, max_bytes), **hooks)


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
