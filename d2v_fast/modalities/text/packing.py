"""Packing of documents into blocks of at most `block_size` tokens, special tokens included.

All documents, each followed by its end token, form one long row. A block is a range of that row with a begin token in
front (with `separate`, in front of each of its documents). The index is therefore two arrays of positions in the row,
and a block is read as one range of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.masking import compiled

__all__ = ["Blocks", "Part", "pack"]


class Part(NamedTuple):
    """The tokens of one block.

    Attributes:
        start, stop: Range among the tokens of all documents, not counting end tokens.
        begin, end: Range in the row, which counts end tokens.
        document: Index of the document in which the block begins.
    """

    start: int
    stop: int
    begin: int
    end: int
    document: int


class Blocks:
    """The index of the blocks.

    Attributes:
        lengths: int64 `[S]`, tokens of each block, special tokens included.
        starts: int64 `[D + 1]`, positions in the row where documents start.
        bounds: int64 `[S + 1]`, positions in the row where blocks start.
    """

    def __init__(
        self, lengths: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]
    ) -> None:
        self.lengths, self.starts, self.bounds = lengths, starts, bounds

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, block: int) -> Part:
        """Return the token ranges of a block."""
        begin, end = int(self.bounds[block]), int(self.bounds[block + 1])
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        # `last` documents end at or before `end`, so `last` end tokens precede it
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
        """Write a block to the beginning of `row`.

        Args:
            row: int64, at least as long as the block.
            part: The block.
            tokens: int64, the tokens of `part`.
            bos, eos: Ids of the begin and the end token.
            separate: Put a begin token in front of each document, not only of the block.
        Returns:
            int64 `[segments]`, the length of the segment of each document.
        """
        last = int(np.searchsorted(self.starts, part.end, side="left"))
        segments = np.zeros(last - part.document, dtype=np.int64)
        _fill(row, segments, tokens, self.starts, part.document, part.begin, part.end, bos, eos, separate)
        return segments


def pack(lengths: npt.NDArray[np.int64], block_size: int, *, whole: bool, separate: bool) -> Blocks:
    """Divide documents into blocks, keeping their order.

    Args:
        lengths: int64 `[D]`, tokens of each document, >= 1.
        block_size: Most tokens of a block, >= 3.
        whole: Start a new block rather than cut a document that fits into one block. A longer document starts a block,
            and its remainder may share a block with the next documents. If false, fill every block, except that with
            `separate` a block ends one token early rather than with a lone begin token.
        separate: Give each document a begin token.
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
    """Return the number of blocks; write their starts and sizes unless the arrays are empty."""
    writes = len(bounds) > 0
    num = 0
    used = 0
    for document in range(len(starts) - 1):
        position, stop = starts[document], starts[document + 1]
        while position < stop:
            extra = 1 if separate or used == 0 else 0
            room = block_size - used - extra
            left = stop - position
            # with `whole`, only a document at the beginning of a block is cut
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
    """Write a block to `row` and the lengths of its segments to `segments`; see `Blocks.fill`."""
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
