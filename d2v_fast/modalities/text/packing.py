"""Documents in blocks of at most so many tokens, special tokens included.

All documents, each followed by its end token, are one long row; a block is a part of it, with a begin token in front
(`separate`: in front of every document in it). So an index is two arrays of positions in that row, and a block is read
as one range of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.masking import compiled

__all__ = ["Blocks", "Part", "pack"]


class Part(NamedTuple):
    """A block, by tokens.

    Attributes:
        start, stop: range of the tokens of all documents, end tokens not counted.
        begin, end: positions in the row, end tokens counted.
        document: the one it begins in.
    """

    start: int
    stop: int
    begin: int
    end: int
    document: int


class Blocks:
    """Which tokens every block holds.

    Attributes:
        lengths: int64 `[S]`, tokens of every block, special ones included.
        starts: int64 `[D + 1]`, where documents start in the row.
        bounds: int64 `[S + 1]`, where blocks start in the row.
    """

    def __init__(
        self, lengths: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]
    ) -> None:
        self.lengths, self.starts, self.bounds = lengths, starts, bounds

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, block: int) -> Part:
        """What a block holds."""
        begin, end = int(self.bounds[block]), int(self.bounds[block + 1])
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        # the document behind the last one that ends in it: so many end tokens are before that
        last = int(np.searchsorted(self.starts, end, side="right")) - 1
        return Part(begin - first, end - last, begin, end, first)

    def fill(
        self,
        row: npt.NDArray[np.int64],
        part: Part,
        tokens: npt.NDArray[np.int64],
        bos: int,
        eos: int,
        separate: bool,
    ) -> npt.NDArray[np.int64]:
        """Write a block to the beginning of `row`; return the lengths of its segments, one per document, int64.

        Args:
            tokens: int64, those of `part`.
        """
        last = int(np.searchsorted(self.starts, part.end, side="left"))
        segments = np.zeros(last - part.document, dtype=np.int64)
        _fill(row, segments, tokens, self.starts, part.document, part.begin, part.end, bos, eos, separate)
        return segments


def pack(lengths: npt.NDArray[np.int64], block_size: int, *, whole: bool, separate: bool) -> Blocks:
    """Divide documents into blocks, in their order.

    Args:
        lengths: int64 `[D]`, tokens of every document, >= 1.
        block_size: >= 3.
        whole: begin another block rather than cut a document that fits into one; a longer one begins a block, and what
            is left of it may share one with those behind it. Otherwise every block is filled to its end; with
            `separate` to one token less where a begin token would be left alone.
        separate: every document has a begin token.
    """
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths + 1, out=starts[1:])
    nothing = np.empty(0, dtype=np.int64)
    num = _pack(nothing, nothing, starts, block_size, whole, separate)
    bounds, sizes = np.empty(num + 1, dtype=np.int64), np.empty(num, dtype=np.int64)
    _pack(bounds, sizes, starts, block_size, whole, separate)
    return Blocks(sizes, starts, bounds)


@compiled
def _pack(
    bounds: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    block_size: int,
    whole: bool,
    separate: bool,
) -> int:
    """Write where blocks start and what they hold, unless the arrays are empty; return how many there are."""
    writes = len(bounds) > 0
    num = 0
    used = 0
    for document in range(len(starts) - 1):
        position, stop = starts[document], starts[document + 1]
        while position < stop:
            extra = 1 if separate or used == 0 else 0
            room = block_size - used - extra
            left = stop - position
            # where a document may not be cut, it is only at the beginning of a block that it does not fit
            if used > 0 and (room < 1 or (whole and left > room)):
                if writes:
                    sizes[num] = used
                num += 1
                used = 0
                continue
            if writes and used == 0:
                bounds[num] = position
            taken = min(left, room)
            position += taken
            used += extra + taken
    if used > 0:
        if writes:
            sizes[num] = used
        num += 1
    if writes:
        bounds[num] = starts[-1]
    return num


@compiled
def _fill(
    row: npt.NDArray[np.int64],
    segments: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    document: int,
    begin: int,
    end: int,
    bos: int,
    eos: int,
    separate: bool,
) -> None:
    position = begin
    read = written = 0
    for segment in range(len(segments)):
        before = written
        if separate or segment == 0:
            row[written] = bos
            written += 1
        stop = min(starts[document + segment + 1], end)
        ends = stop == starts[document + segment + 1]
        for _ in range(stop - position - ends):
            row[written] = tokens[read]
            read += 1
            written += 1
        if ends:
            row[written] = eos
            written += 1
        position = stop
        segments[segment] = written - before
