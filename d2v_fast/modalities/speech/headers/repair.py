"""Parse headers of recordings, and edit those that make libsndfile refuse a file or read only a part of it.

A program that writes into a pipe does not know the length and writes a placeholder instead: all bytes up to the end of
the file are then samples. A file much shorter than its header says is truncated, which libsndfile does not notice.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Literal

from d2v_fast.data.files import UnreadableFile
from d2v_fast.modalities.speech.headers.flac_length import flac_length
from d2v_fast.modalities.speech.headers.mp3 import is_mpeg_start, mp3_pieces, skip_id3v2
from d2v_fast.modalities.speech.headers.view import Piece, edited

__all__ = ["NOT_AUDIO", "pieces_of_file"]

NOT_AUDIO = "not a file of a kind that is read (WAV, RF64, W64, AIFF, AU, CAF, NIST, FLAC, Ogg, MP3)"
# far more chunks than recorders write before the samples
MAX_CHUNKS = 256
# share of the samples that a file may lack
MAX_MISSING = 0.01
# placeholders for an unknown length are just below the largest number, signed or not, or in sox's range
_NEAR = 1 << 16
_MAX_OGG_PAGE = 27 + 255 + 255 * 255
_SOX_AIFF = range(0x7F000000, 0x7F000000 + 64)

# format tags of WAV and W64; with `_EXTENSIBLE` the actual tag follows 24 bytes later; a GSM 6.10 block has 65 bytes
_EXTENSIBLE, _GSM, _GSM_BLOCK, _MP3 = b"\xfe\xff", b"\x31\0", 65, b"\x55\0"

Order = Literal["little", "big"]
Pieces = list[Piece] | None


def pieces_of_file(handle: int, size: int) -> Pieces:
    """Return the pieces of a file that libsndfile should read, or `None` for the unchanged file.

    Args:
        handle: File descriptor of a regular file.
        size: Size of the file in bytes.

    Raises:
        UnreadableFile: The file is not of a supported audio format, holds no samples, or is truncated.
    """
    head = os.pread(handle, 16, 0)
    if not head:
        raise UnreadableFile("an empty file")
    for matches, read in _KINDS:
        if matches(head):
            return read(handle, size)
    if not is_mpeg_start(handle):
        raise UnreadableFile(NOT_AUDIO)
    start = skip_id3v2(handle)
    if os.pread(handle, 4, start) == b"fLaC":
        return _flac(handle, size, start)
    return mp3_pieces(handle, size, start)


def _riff(handle: int, size: int) -> Pieces:
    """Edit WAV, RF64 and BW64."""
    head = os.pread(handle, 4, 0)
    order: Order = "big" if head == b"RIFX" else "little"
    # libsndfile only knows the older name of BW64
    edits = [(0, 4, b"RF64")] if head == b"BW64" else []
    position, ds64, tag = 12, 0, b""
    for _ in range(MAX_CHUNKS):
        name, length = _chunk(handle, position, order)
        position += 8
        if name == b"data":
            break
        if name == b"ds64":
            ds64 = position
        if name == b"fmt ":
            tag = os.pread(handle, 2, position)
        after = position + length
        if length % 2:
            if _is_name(os.pread(handle, 4, after)) and not _is_name(os.pread(handle, 4, after + 1)):
                # the writer omitted the byte that pads the chunk to an even length
                edits.append((after, 0, b"\0"))
            else:
                after += 1
        if not name or after >= size:
            # libsndfile reports what is wrong
            return edited(size, edits) if edits else None
        position = after
    available = size - position
    if ds64 and length == 0xFFFFFFFF:
        length = int.from_bytes(os.pread(handle, 8, ds64 + 8), "little")
        if _is_unknown(length) and available > 0:
            # fill in the byte count; a sample count of 0 makes libsndfile compute it
            edits += [(ds64 + 8, 8, available.to_bytes(8, "little")), (ds64 + 16, 8, bytes(8))]
    elif length == 0 and available > 0 and not _ends_with_chunks(handle, position, size, order):
        edits.append((position - 4, 4, min(available, 0xFFFFFFFE).to_bytes(4, order)))
    elif tag == _GSM and length % _GSM_BLOCK == 1 - length % 2 and length <= available:
        # libsndfile would count the padding byte as one more block; a length of one less gives the right count
        edits.append((position - 4, 4, (length // _GSM_BLOCK * _GSM_BLOCK - 1).to_bytes(4, order)))
    if not _is_unknown(length):
        _refuse_cut(length, available)
    if tag == _MP3:
        # libsndfile would guess the number of frames
        end = size if _is_unknown(length) else min(size, position + length)
        return mp3_pieces(handle, end, position) or [(position, end - position)]
    edits.sort()
    return edited(size, edits) if edits else None


def _aiff(handle: int, size: int) -> Pieces:
    """Refuse truncated AIFF and AIFF-C files."""
    position = 12
    for _ in range(MAX_CHUNKS):
        name, length = _chunk(handle, position, "big")
        position += 8
        if name == b"SSND":
            if not _is_unknown(length) and length not in _SOX_AIFF:
                _refuse_cut(length, size - position)
            break
        position += length + length % 2
        if not name:
            break
    return None


def _au(handle: int, size: int) -> Pieces:
    start, length = (int.from_bytes(os.pread(handle, 4, at), "big") for at in (4, 8))
    if not _is_unknown(length):
        _refuse_cut(length, size - start)
    return None


def _caf(handle: int, size: int) -> Pieces:
    position = 8
    for _ in range(MAX_CHUNKS):
        header = os.pread(handle, 12, position)
        name, length = header[:4], int.from_bytes(header[4:], "big")
        position += 12
        if name == b"data":
            available = size - position
            if _is_unknown(length) and available > 4:
                return edited(size, [(position - 8, 8, available.to_bytes(8, "big"))])
            _refuse_cut(length, available)
            break
        position += length
        if len(header) < 12 or position >= size:
            break
    return None


def _w64(handle: int, size: int) -> Pieces:
    position = 40
    edits: list[tuple[int, int, bytes]] = []
    for _ in range(MAX_CHUNKS):
        header = os.pread(handle, 24, position)
        # the length includes this header
        length = int.from_bytes(header[16:], "little")
        if header[:4] == b"data":
            if not _is_unknown(length):
                _refuse_cut(length - 24, size - position - 24)
            elif edits:
                # in an edited file, libsndfile takes the placeholder for a length and seeks past it
                edits = [(16, 8, size.to_bytes(8, "little")), *edits]
                edits.append((position + 16, 8, (size - position).to_bytes(8, "little")))
            break
        if header[:4] == b"fmt " and os.pread(handle, 2, position + 24) == _EXTENSIBLE:
            # libsndfile reads extensible samples as integers and ignores the sub-format
            edits = [(position + 24, 2, os.pread(handle, 2, position + 48))]
        if length < 24:
            break
        position += length + -length % 8
    return edited(size, edits) if edits else None


def _flac(handle: int, size: int, start: int = 0) -> Pieces:
    # the 36 bits of the stream information block that hold the number of samples
    at = start + 21
    field = os.pread(handle, 5, at)
    edits = []
    if len(field) == 5 and field[0] & 0x0F == 0 and not any(field[1:]):
        length = flac_length(handle, size, start)
        edits = [(at, 5, bytes([field[0] | length >> 32]) + (length & 0xFFFFFFFF).to_bytes(4, "big"))]
    return edited(size, edits, start) if edits or start else None


def _ogg(handle: int, size: int) -> Pieces:
    """Refuse files with several consecutive streams, of which libsndfile would read only the first."""
    serials: set[bytes] = set()
    position = 0
    while True:
        header = os.pread(handle, 27, position)
        is_first = len(header) == 27 and header[:4] == b"OggS" and bool(header[5] & 2)
        if not is_first or len(serials) == MAX_CHUNKS:
            break
        serials.add(header[14:18])
        position += 27 + header[26] + sum(os.pread(handle, header[26], position + 27))
    tail = os.pread(handle, _MAX_OGG_PAGE, max(0, size - _MAX_OGG_PAGE))
    last = tail.rfind(b"OggS")
    if last >= 0 and len(tail) >= last + 18 and serials and tail[last + 14 : last + 18] not in serials:
        raise UnreadableFile(
            "an Ogg file of several recordings one after the other, of which only the first would be read: "
            "convert it, for example with `ffmpeg -i FILE FILE.flac`"
        )
    return None


def _nist(handle: int, size: int) -> Pieces:
    header = os.pread(handle, 1024, 0)
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    found = [re.search(rb"\n%s -i (\d{1,12})\s" % name, header) for name in names]
    # compressed samples take fewer bytes
    if b"embedded" not in header:
        length = math.prod(int(match[1]) if match else 0 for match in found)
        _refuse_cut(length, size - len(header))
    return None


_KINDS: tuple[tuple[Callable[[bytes], bool], Callable[[int, int], Pieces]], ...] = (
    (lambda head: head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE", _riff),
    (lambda head: head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"), _aiff),
    (lambda head: head[:4] == b".snd", _au),
    (lambda head: head[:6] == b"caff\0\1", _caf),
    (lambda head: head == b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0", _w64),
    (lambda head: head[:4] == b"fLaC", _flac),
    (lambda head: head[:4] == b"OggS", _ogg),
    (lambda head: head[:7] == b"NIST_1A", _nist),
)


def _chunk(handle: int, position: int, order: Order) -> tuple[bytes, int]:
    """Read the name and length of a chunk. The name is empty past the end of the file."""
    header = os.pread(handle, 8, position)
    return (header[:4], int.from_bytes(header[4:], order)) if len(header) == 8 else (b"", 0)


def _is_name(text: bytes) -> bool:
    return len(text) == 4 and all(0x20 <= byte < 0x7F for byte in text)


def _ends_with_chunks(handle: int, position: int, size: int, order: Order) -> bool:
    """Return whether the bytes from `position` to the end of the file are whole chunks."""
    for _ in range(MAX_CHUNKS):
        if position >= size:
            return position <= size + 1
        name, length = _chunk(handle, position, order)
        if not _is_name(name):
            return False
        position += 8 + length + length % 2
    return False


def _is_unknown(length: int) -> bool:
    """Return whether a length of 32 or 64 bits is a placeholder."""
    return length == 0 or any(top - _NEAR <= length <= top for top in (1 << 31, 1 << 32, 1 << 63, 1 << 64))


def _refuse_cut(length: int, available: int) -> None:
    if available < (1 - MAX_MISSING) * length:
        raise UnreadableFile(f"cut: {max(0, available):,} of {length:,} bytes of samples are there")
