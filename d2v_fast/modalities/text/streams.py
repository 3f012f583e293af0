"""Text files as byte streams, decompressed according to their ending, and checks that they hold text."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from d2v_fast.data.files import UnreadableFile, open_sample
from d2v_fast.errors import DataError
from d2v_fast.packages import install_command

__all__ = [
    "COMPRESSED",
    "CHUNK",
    "MAX_LINE",
    "TextStream",
    "check_text",
    "checked_text",
    "not_utf8",
    "open_text",
    "reason_of",
    "text_ending",
    "whole_line",
]

COMPRESSED = (".gz", ".zst")

# bytes that are checked at a time, and the longest line
CHUNK = 1 << 20
MAX_LINE = 1 << 26
MAX_SIZE = 1 << 62
# no real corpus compresses by more than MAX_RATIO; repetitive text does, and 1 GiB of it is harmless
MAX_RATIO, MIN_LIMIT = 200, 1 << 30
# a file with zero bytes is binary if more than one in so many of its bytes never occurs in text
BINARY_SHARE = 20
_OF_TEXT = bytes({*range(32, 256), *b"\t\n\v\f\r\x1b"})

_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"))
UTF16_32_BOMS = (*_BOMS, (codecs.BOM_UTF16_BE, "UTF-16"))


class TextStream(NamedTuple):
    """An open file.

    Attributes:
        content: The decompressed bytes.
        file: The file as stored; its position shows how much of it has been read.
    """

    content: IO[bytes]
    file: IO[bytes]


def text_ending(path: str) -> str:
    """Return the ending of a path in lower case, ignoring that of a compression: `.jsonl` for `A.JSONL.gz`."""
    path = path.lower()
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    return os.path.splitext(path)[1]


@contextmanager
def open_text(path: str, inside: str | None, max_bytes: int = MAX_SIZE) -> Iterator[TextStream]:
    """Open a file, and decompress it if its name ends with `.gz` or `.zst`.

    Reading raises UnreadableFile if the compressed data is damaged, ends too early, or decompresses to more than
    `MAX_RATIO` times the size of the file.

    Args:
        path: The file.
        inside, max_bytes: See `open_sample`.
    Raises:
        UnreadableFile: See `open_sample`.
        OSError: The file cannot be opened.
        DataError: A package for decompression is missing.
    """
    with io.BufferedReader(open_sample(path, inside, max_bytes).detach(), CHUNK) as file:
        ending = os.path.splitext(path)[1].lower()
        if ending not in COMPRESSED:
            yield TextStream(file, file)
            return
        limit = max(MIN_LIMIT, MAX_RATIO * os.fstat(file.fileno()).st_size)
        with io.BufferedReader(_Decompressed(file, ending, limit), CHUNK) as stream:
            yield TextStream(stream, file)


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file.

    Args:
        file: The compressed file, at its beginning.
        ending: Its ending, which names the compression.
        limit: Most bytes of the content.
    """

    def __init__(self, file: IO[bytes], ending: str, limit: int) -> None:
        self._kind = {".gz": "gzip", ".zst": "zstd"}[ending]
        self._inner: Any = gzip.GzipFile(fileobj=file) if ending == ".gz" else _zstd(file)
        self._left = self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._inner.read(len(buffer))
        except EOFError:
            raise UnreadableFile(f"the {self._kind} data is cut off") from None
        except (OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            cut = "truncated" in str(error).lower()
            raise UnreadableFile(f"the {self._kind} data is {'cut off' if cut else f'damaged ({error})'}") from None
        self._left -= len(content)
        if self._left < 0:
            raise UnreadableFile(f"decompresses to more than {self._limit:,} bytes, {MAX_RATIO} times its size")
        buffer[: len(content)] = content
        return len(content)


def _zstd(file: IO[bytes]) -> Any:
    try:
        import pyarrow
    except Exception as error:
        raise DataError(
            f".zst files are read with pyarrow, which cannot be imported ({type(error).__name__}: {error}): "
            f"{install_command('pyarrow')}"
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


def check_text(file: IO[bytes], replaces: bool) -> None:
    """Raise UnreadableFile if a file is not text in UTF-8.

    Args:
        file: The file, which is read to its end.
        replaces: Raise only for a binary file: invalid bytes, and zero bytes within text, will be replaced.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = num_not_text = 0
    first_zero = -1
    while chunk := file.read(CHUNK):
        if position == 0:
            check_byte_order_mark(chunk)
        if first_zero < 0 and 0 in chunk:
            first_zero = position + chunk.find(0)
            if not replaces:
                raise UnreadableFile(
                    f"a binary file: byte {first_zero:,} is zero (if the rest is text, set "
                    f'`d2v.data.encoding_errors` to "replace")'
                )
        if replaces:
            num_not_text += len(chunk.translate(None, _OF_TEXT))
        else:
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise UnreadableFile(not_utf8(chunk, error.start, position - held)) from None
        position += len(chunk)
    if first_zero >= 0 and BINARY_SHARE * num_not_text > position:
        share = f"{100 * num_not_text / position:.0f} % of its bytes do not occur in text"
        raise UnreadableFile(f"a binary file: byte {first_zero:,} is zero, and {share}")
    if not replaces:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise UnreadableFile("cut off within a UTF-8 character at its end") from None


def check_byte_order_mark(start: bytes) -> None:
    """Raise UnreadableFile if a file starts with the byte order mark of an encoding other than UTF-8."""
    for mark, name in UTF16_32_BOMS:
        if start.startswith(mark):
            raise UnreadableFile(f"{name} instead of UTF-8: convert it")


def not_utf8(chunk: bytes, start: int, offset: int = 0) -> str:
    """Return the text of an UnreadableFile that says where bytes are not UTF-8.

    Args:
        chunk: The bytes.
        start: Index in `chunk` of the first invalid byte.
        offset: Position of `chunk` in the file.
    """
    return f'not UTF-8 at byte {offset + start:,} (to read it, set `d2v.data.encoding_errors` to "replace")'


def whole_line(line: bytes, file: IO[bytes]) -> bytes:
    """Return a line that was read with at most `MAX_LINE` + 1 bytes; skip the rest of a longer one.

    Raises:
        UnreadableFile: The line is longer than `MAX_LINE` bytes.
    """
    if len(line) <= MAX_LINE:
        return line
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)
    raise UnreadableFile(f"a line of more than {MAX_LINE:,} bytes")


def checked_text(value: Any, where: str, replaces: bool) -> str:
    """Return a value of a JSON line or of a .parquet row as text.

    Args:
        value: A string, or bytes that are UTF-8.
        where: Name of the value, for messages.
        replaces: Replace invalid bytes and unpaired surrogates instead of refusing them.
    Raises:
        UnreadableFile: It is no text.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8", "replace" if replaces else "strict")
        except UnicodeDecodeError as error:
            raise UnreadableFile(f"{where} is {not_utf8(value, error.start)}") from None
    if not isinstance(value, str):
        what = "null" if value is None else type(value).__name__
        raise UnreadableFile(f"{where} holds {what} instead of text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if not replaces:
            raise UnreadableFile(f"{where} holds an unpaired surrogate at character {error.start}") from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def reason_of(error: Exception) -> str:
    """Return why text cannot be read, on one line without its period."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
