"""Image files written by hand, of depths and layouts that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def blocks(values: NDArray[Any]) -> NDArray[Any]:
    return values.repeat(20, 0).repeat(20, 1)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: NDArray[Any], kind: int, depth: int = 16, *chunks: bytes) -> bytes:
    """Return a PNG of `values` `[H, W]` or `[H, W, C]`, with bit depths that Pillow does not write."""
    height, width = values.shape[:2]
    rows = values.astype(">u2" if depth == 16 else np.uint8).reshape(height, -1)
    if depth < 8:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = b"".join([header, *chunks, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    values: NDArray[Any],
    order: str = "<",
    photometric: int = 1,
    bits: int | None = None,
    sample_format: int = 1,
    extra: dict[int, int] | None = None,
    planar: bool = False,
) -> bytes:
    """Return an uncompressed TIFF with one strip, or one strip per plane."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    stored = values.astype(values.dtype.newbyteorder(order))
    bits = values.dtype.itemsize * 8 if bits is None else bits
    planes = [stored[..., index] for index in range(channels)] if planar else [stored]
    data = b"".join(plane.tobytes() for plane in planes)
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        data = b"".join(int(value).to_bytes(3, "big") for value in packed)
    count = len(planes)
    offsets = [8 + index * (len(data) // count) for index in range(count)]
    tags: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [1]),
        262: (3, [photometric]),
        273: (4, offsets),
        277: (3, [channels]),
        278: (4, [height]),
        279: (4, [len(data) // count] * count),
        284: (3, [2 if planar else 1]),
        339: (3, [sample_format] * channels),
        **{tag: (3, [value]) for tag, value in (extra or {}).items()},
    }
    start = 8 + len(data)
    later, entries = start + 2 + 12 * len(tags) + 4, b""
    heap = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(content) > 4:
            value = struct.pack(f"{order}I", later + len(heap))
            heap += content
        else:
            value = content.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + value
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return mark + struct.pack(f"{order}I", start) + data + directory + heap
