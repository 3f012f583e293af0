"""A recording's file with edits, such as a corrected header, presented to libsndfile as one file."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterable
from itertools import accumulate

__all__ = ["FileView", "Piece", "edited"]

Piece = bytes | tuple[int, int]
"""Literal bytes, or a range of a file as offset and length in bytes."""


class FileView(io.RawIOBase):
    """Concatenated pieces as a readable file.

    Args:
        handle: File descriptor that ranges refer to. It is not closed.
        pieces: Contents of the file, in order.
    """

    def __init__(self, handle: int, pieces: Iterable[Piece]) -> None:
        self._handle = handle
        self._pieces = [piece for piece in pieces if _length(piece)]
        self._starts = [0, *accumulate(map(_length, self._pieces))]
        self._position = 0

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def readinto(self, buffer: object) -> int:
        """See `io.RawIOBase`. It fills the buffer unless the file ends."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(view) and self._position < self._starts[-1]:
            index = bisect.bisect_right(self._starts, self._position) - 1
            inside = self._position - self._starts[index]
            wanted = min(len(view) - done, self._starts[index + 1] - self._position)
            piece = self._pieces[index]
            if isinstance(piece, bytes):
                found = piece[inside : inside + wanted]
            else:
                found = os.pread(self._handle, wanted, piece[0] + inside)
            if not found:
                break
            view[done : done + len(found)] = found
            done += len(found)
            self._position += len(found)
        return done


def edited(size: int, edits: Iterable[tuple[int, int, bytes]], start: int = 0) -> list[Piece]:
    """Return the pieces of a file with some bytes replaced.

    Args:
        size: Size of the file in bytes.
        edits: Offset, number of bytes to remove, and bytes to insert in their place; in ascending order of offset.
        start: Offset of the first byte to include.
    """
    pieces: list[Piece] = []
    for offset, num_out, new in edits:
        pieces += [(start, offset - start), new]
        start = offset + num_out
    return [*pieces, (start, size - start)]


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else max(0, piece[1])
