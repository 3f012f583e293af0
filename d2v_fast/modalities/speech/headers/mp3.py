"""Find and count the frames of an MPEG audio file, because libsndfile guesses their number if no header states it.

For a file without a Xing, Info or VBRI header, the frames are counted once. Bytes between frames (tags, zeros, junk)
are removed, and a header with the number of frames is prepended, so that libsndfile's decoder need not guess. Both the
number of frames and the number of bytes searched are bounded.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass

from d2v_fast.data.files import UnreadableFile
from d2v_fast.modalities.speech.headers.view import Piece

__all__ = ["is_mpeg_start", "mp3_pieces", "skip_id3v2"]

# 30 hours at 44.1 kHz; counting them takes seconds
MAX_FRAMES = 1 << 22
# limits of a search for frames: bytes skipped, positions tried, and gaps between frames
MAX_JUNK, MAX_TRIES, MAX_GAPS = 1 << 22, 1 << 17, 4096
MAX_TAGS = 16
CHUNK = 1 << 20
# a file with a smaller share of the frames that its header states is truncated
MIN_SHARE = 0.9
# range of frame sizes in free format, where a frame ends at the next header of its kind
MIN_FREE, MAX_FREE = 1 << 7, 1 << 13
# a file that starts inside a frame, as recorded broadcasts do, is MP3 if 8 consecutive frames begin soon
MAX_REST, NUM_CERTAIN = 1 << 12, 8
MAX_CACHED = 1 << 16

# kbit/s by index 1 to 14: MPEG 1 layers I, II, III; MPEG 2 and 2.5 layers I, II and III
_RATES_1 = {
    3: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    1: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_LOW = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES_2 = {3: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256), 2: _LOW, 1: _LOW}
# Hz of MPEG 1; MPEG 2 has half of it, MPEG 2.5 a quarter
_HERTZ = (44_100, 48_000, 32_000)
# bits of a header that are equal in all frames of a file: sync, version, layer and sample rate
_CONSTANT_BITS = 0xFFFE0C00
_LAYER_3 = 1
# the first three bytes of a header
_SYNC = re.compile(
    b"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff][%s]"
    % b"".join(re.escape(bytes([byte])) for byte in range(0xF0) if byte >> 2 & 3 != 3)
)


@dataclass(frozen=True)
class _Frames:
    """The frames of a file.

    Attributes:
        runs: Offset and length in bytes of each range of consecutive frames.
        count: Number of frames.
        has_header: Whether the first frame states the right number of frames, or no such header is needed.
        first: Header of the first frame.
    """

    runs: tuple[tuple[int, int], ...]
    count: int
    has_header: bool
    first: int


_cache: dict[tuple[int, ...], _Frames] = {}


def is_mpeg_start(handle: int) -> bool:
    """Return whether a file may be MPEG audio: it starts with a frame, a tag, zeros, or the rest of a frame."""
    head = os.pread(handle, 8, 0)
    is_frame = _size_of(int.from_bytes(head[:4], "big")) is not None
    if is_frame or head[:3] == b"ID3" or head == b"APETAGEX":
        return True
    reader = _Reader(handle)
    position = _next_frame(reader, 0, MAX_JUNK if head[:4] == bytes(4) else MAX_REST, None)
    for _ in range(NUM_CERTAIN):
        length = _frame_size(reader, position, reader.word(position)) if position >= 0 else 0
        if not length:
            return False
        position += length
    return True


def skip_id3v2(handle: int) -> int:
    """Return the offset after the ID3v2 tags at the start of a file."""
    position = 0
    for _ in range(MAX_TAGS):
        tag = os.pread(handle, 10, position)
        if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:]) >= 0x80:
            break
        size = 0
        for byte in tag[6:]:
            size = size << 7 | byte
        position += 10 + size + (10 if tag[5] & 0x10 else 0)
    return position


def mp3_pieces(handle: int, size: int, start: int) -> list[Piece] | None:
    """Return the pieces of a file that libsndfile should read, or `None` for the unchanged file.

    Args:
        handle: File descriptor.
        size: Size of the file in bytes.
        start: Offset after the tags at its start.

    Raises:
        UnreadableFile: The file has no frames, too many, or far fewer than its header states.
    """
    status = os.fstat(handle)
    key = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
    if key not in _cache:
        found = _find_frames(handle, size, start)
        if len(_cache) >= MAX_CACHED:
            _cache.clear()
        _cache[key] = found
    found = _cache[key]
    if not found.has_header:
        return [_info_frame(found.first, found.count, sum(length for _, length in found.runs)), *found.runs]
    return None if len(found.runs) == 1 and found.runs[0][0] == start else list(found.runs)


class _Reader:
    """Read bytes of a file at ascending offsets, in chunks."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._base, self._chunk = 0, b""
        self._tries = MAX_TRIES

    def at(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on, or fewer at the end of the file."""
        inside = offset - self._base
        if inside < 0 or inside + count > len(self._chunk):
            self._base, self._chunk, inside = offset, os.pread(self._handle, CHUNK, offset), 0
        return self._chunk[inside : inside + count]

    def word(self, offset: int) -> int:
        """Return the big-endian number in four bytes, or -1 past the end of the file."""
        found = self.at(offset, 4)
        return int.from_bytes(found, "big") if len(found) == 4 else -1

    def find_sync(self, offset: int, most: int) -> int:
        """Return the next offset within `most` bytes where a frame may begin, or -1 if none is left to try."""
        end = offset + most
        while offset < end and self._tries > 0:
            window = self.at(offset, 4096)
            if len(window) < 3:
                break
            if match := _SYNC.search(window):
                self._tries -= 1
                return offset + match.start() if offset + match.start() < end else -1
            # the start of a frame may cross the end of the window
            offset += len(window) - 2
        return -1


def _find_frames(handle: int, size: int, start: int) -> _Frames:
    reader = _Reader(handle)
    position = _next_frame(reader, start, MAX_JUNK, None)
    if position < 0:
        raise UnreadableFile("no MP3 frame was found")
    first = reader.word(position)
    stated = _stated_counts(reader, position, first)
    first_size = _frame_size(reader, position, first)
    if stated is not None:
        count, num_bytes = stated
        if count and num_bytes and _ends_at(reader, position + num_bytes, size):
            return _Frames(((position, size - position),), count, has_header=True, first=first)
        # the header is itself a frame, without sound
        position += first_size
    runs, count = _runs(reader, position, size, first)
    if stated is not None and count == stated[0] and len(runs) == 1:
        # the count is right, and the header also says how much of the first and last frame is sound
        run = (position - first_size, runs[0][1] + first_size)
        return _Frames((run,), count, has_header=True, first=first)
    if not count:
        raise UnreadableFile("holds no samples")
    if stated is not None and count < MIN_SHARE * stated[0]:
        raise UnreadableFile(f"cut: {count:,} of {stated[0]:,} MP3 frames are there")
    # layers I and II have no such header
    return _Frames(tuple(runs), count, has_header=first >> 17 & 3 != _LAYER_3, first=first)


def _ends_at(reader: _Reader, end: int, size: int) -> bool:
    """Return whether the file, apart from tags, ends where its header says that the frames end."""
    return end == size or (end < size and reader.at(end, 8).startswith((b"TAG", b"APETAGEX", b"LYRICSBE", b"ID3")))


def _runs(reader: _Reader, position: int, size: int, first: int) -> tuple[list[tuple[int, int]], int]:
    """Return the ranges of consecutive frames, and the total number of frames."""
    runs: list[tuple[int, int]] = []
    count, begin, junk = 0, position, MAX_JUNK
    free = _free_size(reader, position, first) if first >> 12 & 15 == 0 else 0
    while count <= MAX_FRAMES:
        word = reader.word(position)
        length = _size_of(word) if word >= 0 and (word ^ first) & _CONSTANT_BITS == 0 else None
        if length == 0:
            length = free + (word >> 9 & 1) if free else None
        # a truncated frame at the end of the file is not decoded
        if length and position + length <= size:
            count += 1
            position += length
            continue
        if position > begin:
            runs.append((begin, position - begin))
        if length or word < 0 or len(runs) > MAX_GAPS:
            break
        begin = _next_frame(reader, position, junk, first)
        if begin < 0:
            break
        junk -= begin - position
        position = begin
    else:
        raise UnreadableFile(f"more than {MAX_FRAMES:,} MP3 frames")
    return runs, count


def _next_frame(reader: _Reader, position: int, most: int, first: int | None) -> int:
    """Return the offset of the next header followed by another of its kind or the end of the file, or -1."""
    end = position + most
    while (position := reader.find_sync(position, end - position)) >= 0:
        word = reader.word(position)
        kind = word if first is None else first
        length = _frame_size(reader, position, word) if word >= 0 and (word ^ kind) & _CONSTANT_BITS == 0 else 0
        if length:
            after = reader.word(position + length)
            if after >= 0 and (after ^ word) & _CONSTANT_BITS == 0 and _size_of(after) is not None:
                return position
            # the last frame, or one before a tag
            if len(reader.at(position, length)) == length and (first is not None or after < 0):
                return position
        position += 1
    return -1


@functools.lru_cache(4096)
def _size_of(word: int) -> int | None:
    """Return the size in bytes of a header's frame, 0 for free format, or `None` if the bits are not a header."""
    version, layer = word >> 19 & 3, word >> 17 & 3
    rate, hertz, padding = word >> 12 & 15, word >> 10 & 3, word >> 9 & 1
    if word >> 21 != 0x7FF or version == 1 or layer == 0 or rate == 15 or hertz == 3:
        return None
    if rate == 0:
        return 0
    bits = 1000 * (_RATES_1 if version == 3 else _RATES_2)[layer][rate - 1]
    per_second = _HERTZ[hertz] >> {3: 0, 2: 1, 0: 2}[version]
    if layer == 3:
        return 4 * (12 * bits // per_second + padding)
    return (72 if layer == _LAYER_3 and version != 3 else 144) * bits // per_second + padding


def _frame_size(reader: _Reader, position: int, word: int) -> int:
    """Return the size of a frame in bytes, searching for its end in free format. Return 0 if there is no frame."""
    length = _size_of(word)
    if length is None:
        return 0
    return length or (_free_size(reader, position, word) + (word >> 9 & 1))


def _free_size(reader: _Reader, position: int, word: int) -> int:
    """Return the unpadded size of free-format frames that begin at `position`, or 0 if no other follows."""
    offset = position + 4
    while (offset := reader.find_sync(offset, position + MAX_FREE - offset)) >= 0:
        other = reader.word(offset)
        if other >= 0 and (other ^ word) & _CONSTANT_BITS == 0 and _size_of(other) == 0:
            length = offset - position - (word >> 9 & 1)
            third = reader.word(offset + length + (other >> 9 & 1))
            if third < 0 or ((third ^ word) & _CONSTANT_BITS == 0 and _size_of(third) == 0):
                return length if length >= MIN_FREE else 0
        offset += 1
    return 0


def _side_info(word: int) -> int:
    """Return the bytes of side information, after which a layer III frame may hold a Xing header."""
    is_mono, is_first = word >> 6 & 3 == 3, word >> 19 & 3 == 3
    return {(True, True): 17, (False, True): 32, (True, False): 9, (False, False): 17}[is_mono, is_first]


def _stated_counts(reader: _Reader, position: int, word: int) -> tuple[int, int] | None:
    """Read the frames and bytes (0 if not stated) of a Xing, Info or VBRI header, or `None` if there is none."""
    offset = position + 4 + _side_info(word)
    tag = reader.at(offset, 16)
    if tag[:4] in (b"Xing", b"Info") and len(tag) == 16:
        flags = int.from_bytes(tag[4:8], "big")
        count = int.from_bytes(tag[8:12], "big") if flags & 1 else 0
        after = tag[12:16] if flags & 1 else tag[8:12]
        return count, int.from_bytes(after, "big") if flags & 2 else 0
    tag = reader.at(position + 36, 18)
    if tag[:4] == b"VBRI" and len(tag) == 18:
        return int.from_bytes(tag[14:18], "big"), int.from_bytes(tag[10:14], "big")
    return None


def _info_frame(first: int, count: int, num_bytes: int) -> bytes:
    """Return a silent frame that states how many frames follow, or no bytes for layers I and II."""
    if first >> 17 & 3 != _LAYER_3:
        return b""
    side = _side_info(first)
    for rate in range(1, 15):
        # without checksum and padding
        word = first & ~0xF200 | 0x10000 | rate << 12
        length = _size_of(word)
        if length is not None and length >= 4 + side + 16:
            tag = b"Xing" + (3).to_bytes(4, "big") + count.to_bytes(4, "big") + (num_bytes + length).to_bytes(4, "big")
            return (word.to_bytes(4, "big") + bytes(side) + tag).ljust(length, b"\0")
    raise AssertionError("every version of layer III has a sufficient bit rate")
