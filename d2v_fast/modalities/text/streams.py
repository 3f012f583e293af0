"""Bytes of text files as a stream, decompressed where their ending says so, and checked to be text."""

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

__all__ = ["COMPRESSED", "CHUNK", "MAX_LINE", "TextStream", "check_text", "not_utf8", "open_text", "text_ending"]

COMPRESSED = (".gz", ".zst")

# bytes that are looked at together, and the longest line
CHUNK = 1 << 20
MAX_LINE = 1 << 26
MAX_SIZE = 1 << 62
# no corpus is compressed more than so much; a text that repeats itself is, and 1 GiB of it does no harm
MAX_RATIO, MIN_LIMIT = 200, 1 << 30
# where zero bytes are replaced, a file is binary with more than one of so many bytes that no text holds
STRANGE = 20
_OF_TEXT = bytes({*range(32, 256), *b"\t\n\v\f\r\x1b"})

_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"))
UTF16_32_BOMS = (*_BOMS, (codecs.BOM_UTF16_BE, "UTF-16"))


class TextStream(NamedTuple):
    """An open file.

    Attributes:
        content: its bytes, decompressed.
        file: itself; its position shows how much of it has been read.
    """

    content: IO[bytes]
    file: IO[bytes]


def text_ending(path: str) -> str:
    """The ending of a file in lower case without that of a compression: `.jsonl` of `A.JSONL.gz`."""
    path = path.lower()
    for ending in COMPRESSED:
        path = path.removesuffix(ending)
    return os.path.splitext(path)[1]


@contextmanager
def open_text(path: str, inside: str | None, max_bytes: int = MAX_SIZE) -> Iterator[TextStream]:
    """Open a file, to be decompressed if its name ends with `.gz` or `.zst`.

    What is read of it raises UnreadableFile where the compressed data is damaged, ends too early, or is more than
    `MAX_RATIO` times the file.

    Args:
        inside, max_bytes: see `open_sample`.
    Raises:
        UnreadableFile: see `open_sample`.
        OSError: it cannot be opened.
        DataError: a package is missing.
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
    """The content of a compressed file.

    Args:
        file: at its beginning.
        ending: which compression.
        limit: bytes that it may have.
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
        file: read to its end.
        replaces: only if it is no text at all: wrong bytes, and zero bytes among text, will be replaced.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = strange = 0
    first_zero = -1
    while chunk := file.read(CHUNK):
        if position == 0:
            check_byte_order_mark(chunk)
        if first_zero < 0 and 0 in chunk:
            first_zero = position + chunk.find(0)
            if not replaces:
                raise UnreadableFile(
                    f'a binary file: byte {first_zero:,} is zero (`d2v.data.encoding_errors` "replace" would go on '
                    f"if the rest is text)"
                )
        if replaces:
            strange += len(chunk.translate(None, _OF_TEXT))
        else:
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise UnreadableFile(not_utf8(chunk, error.start, position - held)) from None
        position += len(chunk)
    if first_zero >= 0 and STRANGE * strange > position:
        share = f"{100 * strange / position:.0f} % of its bytes are no text"
        raise UnreadableFile(f"a binary file: byte {first_zero:,} is zero, and {share}")
    if not replaces:
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise UnreadableFile("cut off within a letter of UTF-8 at its end") from None


def check_byte_order_mark(start: bytes) -> None:
    """Raise UnreadableFile if the first bytes of a file name another encoding than UTF-8."""
    for mark, name in UTF16_32_BOMS:
        if start.startswith(mark):
            raise UnreadableFile(f"{name} instead of UTF-8: convert it")


def not_utf8(chunk: bytes, start: int, offset: int = 0) -> str:
    """The reason of an UnreadableFile: where some bytes are not UTF-8."""
    return f'not UTF-8 at byte {offset + start:,} (`d2v.data.encoding_errors` "replace" would go on)'
