"""Count the samples of a FLAC stream whose header lacks the number, as when a program wrote it into a pipe."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

from d2v_fast.data.files import UnreadableFile

__all__ = ["flac_length"]

# bytes at the end to search for the last frame; larger than the largest possible frame
TAIL = 1 << 20
_ID3V1_BYTES = 128
# samples of a frame by the code in its header; with code 6 or 7 the number follows in one or two bytes
_BLOCKS = (
    {1: 192} | {code: 576 << (code - 2) for code in range(2, 6)} | {code: 256 << (code - 8) for code in range(8, 16)}
)


class _Frame(NamedTuple):
    """The index of a frame's first sample, and its number of samples."""

    first: int
    num_samples: int


def flac_length(handle: int, size: int, start: int) -> int:
    """Compute the number of samples per channel from the last complete frame.

    Args:
        handle: File descriptor.
        size: Size of the file in bytes.
        start: Offset of the stream in bytes.

    Raises:
        UnreadableFile: There is no frame near the end of the file.
    """
    if size > _ID3V1_BYTES and os.pread(handle, 3, size - _ID3V1_BYTES) == b"TAG":
        size -= _ID3V1_BYTES
    begin = min(size, max(start + 42, size - TAIL))
    tail = os.pread(handle, size - begin, begin)
    block = int.from_bytes(os.pread(handle, 2, start + 10), "big")
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        frame = _frame(tail, position, block)
        if frame is not None:
            is_whole = _crc(tail[position:-2], 16, 0x8005) == int.from_bytes(tail[-2:], "big")
            # libsndfile decodes nothing of a truncated frame
            length = frame.first + frame.num_samples if is_whole else frame.first
            if length == 0:
                break
            return length
    raise UnreadableFile("a FLAC file of unknown length without a whole frame at its end")


def _frame(data: bytes, position: int, block: int) -> _Frame | None:
    """Parse the header of a frame at `position`. Return `None` if there is none.

    Args:
        data: Bytes of the stream.
        position: Offset in `data`.
        block: Samples per frame, for streams that number frames instead of samples.
    """
    head = data[position : position + 16]
    if len(head) < 6 or head[1] & 0xFE != 0xF8:
        return None
    size_code, rate_code = head[2] >> 4, head[2] & 15
    if size_code == 0 or rate_code == 15 or head[3] >> 4 > 10 or head[3] >> 1 & 7 == 3 or head[3] & 1:
        return None
    number, at = _coded_number(head, 4)
    width = {6: 1, 7: 2}.get(size_code, 0)
    count = _BLOCKS[size_code] if not width else int.from_bytes(head[at : at + width], "big") + 1
    at += width + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if number is None or at >= len(head) or _crc(head[:at], 8, 0x07) != head[at]:
        return None
    return _Frame(number if head[1] & 1 else number * block, count)


def _coded_number(head: bytes, at: int) -> tuple[int | None, int]:
    """Decode a number of up to 36 bits in extended UTF-8, and return it with the position after it."""
    first = head[at]
    num_more = 0
    while num_more < 7 and first << num_more & 0x80:
        num_more += 1
    if num_more == 1 or (num_more == 7 and first != 0xFE):
        return None, at
    number = first & (0x7F >> num_more)
    for byte in head[at + 1 : at + max(1, num_more)]:
        if byte & 0xC0 != 0x80:
            return None, at
        number = number << 6 | byte & 0x3F
    return number, at + max(1, num_more)


@functools.cache
def _table(bits: int, polynomial: int) -> tuple[int, ...]:
    """Return the CRC of each byte value."""
    table = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) & 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return tuple(table)


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Return the CRC of `bits` bits, most significant bit first, with initial value 0."""
    table = _table(bits, polynomial)
    shift, mask, value = bits - 8, (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 & mask) ^ table[value >> shift ^ byte]
    return value
