"""Decode an image file into a square of pixels.

The file may be damaged or hostile: every failure that it causes is an `UnreadableImage`.
"""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from d2v_fast.data.files import UnreadableFile, open_sample, refuse_system_error
from d2v_fast.modalities.vision.bit_depth import Dim, eight_bits

__all__ = ["Box", "Limits", "SmallImage", "UnreadableImage", "center_box", "check_header", "read_square"]

# only these decoders run, whatever the file's suffix
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
_NAMES = "JPEG, PNG, WebP, TIFF, BMP or GIF"
# Pillow's names of the accepted TIFF compressions; others are rare, and some of their decoders are old or memory-hungry
_COMPRESSIONS = (
    *("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg", "zstd", "webp"),
    *("tiff_ccitt", "group3", "group4"),
)
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIPS, _TILES, _TILE_WIDTH, _TILE_LENGTH = 273, 324, 322, 323
# enough for 16 x 16 tiles at the default pixel limit; Pillow keeps a list of them
MAX_STRIPS = 300_000
MAX_TAGS = 4096
# Pillow decodes run-length encoded bitmaps in Python, at worst pixel by pixel
MAX_RLE_BYTES = 4_000_000
# a progressive JPEG has about ten scans; a hostile one can demand a full pass over the pixels every 15 bytes
MAX_SCANS = 200

Box = tuple[int, int, int, int]

EXIF_ORIENTATION = 0x0112
Levels = npt.NDArray[np.uint8]
Resampler = Literal["torch", "pillow"]

# of [H, W, ...]; each is its own inverse or turns by a quarter
_TURNS: dict[int, Callable[[Levels], Levels]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@dataclass(frozen=True)
class Limits:
    """Limits on image files.

    Attributes:
        max_pixels: Largest width times height, checked in the header before anything is decoded.
        max_bytes: Largest file size.
        min_side: Smallest width and height in pixels.
        root: Absolute path, without links, of the folder that must contain the file; None allows any place.
    """

    max_pixels: int
    max_bytes: int
    min_side: int
    root: str | None = None


class UnreadableImage(UnreadableFile):
    """A file that cannot be used as an image. The message is a short reason."""


class SmallImage(UnreadableImage):
    """An image with a side below the limit."""


def read_square(
    path: str,
    size: int,
    channels: int,
    choose_box: Callable[[int, int], Box],
    limits: Limits,
    *,
    bit_depth: int | None = None,
    note: Callable[[Dim], None] | None = None,
    resampler: Resampler = "pillow",
) -> Levels:
    """Decode a file, crop it, and resize the crop (cubic, antialiased).

    Args:
        path: A JPEG, PNG, WebP, TIFF, BMP or GIF file of any mode: gray, color, palette, CMYK, 16 bit, or with alpha,
            which is composited on white. Only the first page or frame is read.
        size: Width and height of the result in pixels.
        channels: 1 (gray) or 3 (RGB).
        choose_box: Maps the image's width and height to the crop (left, top, width, height). The EXIF orientation is
            applied after the crop.
        limits: Files beyond them are not decoded.
        bit_depth, note: See `eight_bits`.
        resampler: See `VisionDataConfig`.
    Returns:
        uint8 `[size, size]`, or `[size, size, 3]` with three channels. The strides are arbitrary.
    Raises:
        UnreadableImage: The file is damaged, of another format, or beyond the limits.
    """
    with _reasons(path, limits):
        return _read_square(path, size, channels, choose_box, limits, bit_depth, note, resampler)


def check_header(path: str, limits: Limits) -> None:
    """Raise UnreadableImage if a file's header is not that of an image within the limits."""
    with _reasons(path, limits), _open(path, limits) as file, Image.open(file, formats=FORMATS) as image:
        _check_size(image, limits)


def _open(path: str, limits: Limits) -> BinaryIO:
    """Open an image file for reading."""
    file = open_sample(path, limits.root, limits.max_bytes)
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise UnreadableImage("an empty file")
    return file


@contextmanager
def _reasons(path: str, limits: Limits) -> Iterator[None]:
    """Turn every exception that a file causes in the block into an UnreadableImage with a reason."""
    try:
        with warnings.catch_warnings():
            # Pillow's warnings about damaged metadata are harmless here
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
        raise
    except UnreadableFile as error:
        raise UnreadableImage(str(error)) from None
    except Image.DecompressionBombError:
        # Pillow's own limit, which it checks before ours
        raise UnreadableImage(f"more than {limits.max_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImage(_unidentified(path, limits)) from None
    except Exception as error:
        refuse_system_error(error, path)
        # decoders raise nearly every type of exception on damaged files
        raise UnreadableImage(f"{type(error).__name__}: {str(error)[:200]}") from None


def center_box(width: int, height: int) -> Box:
    """Return the largest centered square as (left, top, width, height)."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _read_square(
    path: str,
    size: int,
    channels: int,
    choose_box: Callable[[int, int], Box],
    limits: Limits,
    bit_depth: int | None,
    note: Callable[[Dim], None] | None,
    resampler: Resampler,
) -> Levels:
    with _open(path, limits) as file:
        content = file.read(os.fstat(file.fileno()).st_size)
    if content.startswith(_TIFF_STARTS):
        _check_directory(content)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = _check_size(image, limits)
        if image.format in ("JPEG", "MPO") and _has_too_many_scans(content):
            raise UnreadableImage(f"more than {MAX_SCANS} scans")
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image, content, limits)
        if image.format == "BMP" and len(content) > MAX_RLE_BYTES and _is_run_length_encoded(image):
            raise UnreadableImage(f"a run-length encoded bitmap of more than {MAX_RLE_BYTES:,} bytes")
        left, top, crop_width, crop_height = choose_box(width, height)
        # decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop stays at least as large as the result
        wanted = math.ceil(width * size / crop_width), math.ceil(height * size / crop_height)
        image.draft("L" if channels == 1 else "RGB", wanted)
        image.load()
        right, bottom = left + crop_width, top + crop_height
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, right * across, bottom * down)
        levels = eight_bits(image, content, bit_depth, note)
        square = _resized(_plain_mode(levels, channels), size, box, resampler)
        turn = _TURNS.get(_orientation(image))
    return square if turn is None else turn(square)


def _resized(image: Image.Image, size: int, box: tuple[float, float, float, float], resampler: Resampler) -> Levels:
    # after a reduced decoding, the box has fractions, which torch does not know
    if resampler == "pillow" or any(edge != int(edge) for edge in box):
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    # a copy, because torch warns of memory that cannot be written
    crop = np.array(image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3]))))
    planes = torch.from_numpy(crop[..., None] if crop.ndim == 2 else crop).permute(2, 0, 1)[None]
    out = F.interpolate(planes, (size, size), mode="bicubic", antialias=True)[0].numpy()
    return out[0] if crop.ndim == 2 else out.transpose(1, 2, 0)


def _check_size(image: Image.Image, limits: Limits) -> tuple[int, int]:
    """Return an image's width and height, or raise UnreadableImage if they are beyond the limits."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise UnreadableImage(f"{width}x{height} is more than {limits.max_pixels:,} pixels")
    if min(width, height) < limits.min_side:
        raise SmallImage(f"{width}x{height} is smaller than {limits.min_side} pixels")
    return width, height


# a JPEG marker of a segment or of the image's end; not stuffed bytes, fill bytes, or markers without content
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


def _has_too_many_scans(content: bytes) -> bool:
    """Return whether the first image of a JPEG file has too many scans. Cameras append thumbnails and videos to it."""
    scans, position = 0, 2
    while scans <= MAX_SCANS and (match := _MARKER.search(content, position)):
        marker = match[1][0]
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        position = match.end() + int.from_bytes(content[match.end() : match.end() + 2], "big")
    return scans > MAX_SCANS


def _plain_mode(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to mode "L" or "RGB"."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        raise UnreadableImage("CIELAB colors with an unknown white point: save it as RGB")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        # an all-zero fourth byte is padding, not opacity
        image = image.convert("RGB")
    elif image.has_transparency_data:
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert(mode)


def _is_run_length_encoded(image: Image.Image) -> bool:
    return any("rle" in tile.codec_name for tile in getattr(image, "tile", []))


def _check_directory(content: bytes) -> None:
    """Check the number of strips or tiles in a TIFF's first directory before Pillow allocates a list of them."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"
    is_big = content[2:4] in (b"+\0", b"\0+")

    def number(position: int, size: int) -> int:
        return int.from_bytes(content[position : position + size], order)

    start, size = (number(8, 8), 8) if is_big else (number(4, 4), 2)
    num_tags, width = number(start, size), 20 if is_big else 12
    if num_tags > MAX_TAGS:
        raise UnreadableImage(f"a TIFF directory of more than {MAX_TAGS:,} entries")
    for index in range(num_tags):
        entry = start + size + index * width
        if number(entry, 2) in (_STRIPS, _TILES) and number(entry + 4, 8 if is_big else 4) > MAX_STRIPS:
            raise UnreadableImage(f"more than {MAX_STRIPS:,} strips or tiles")


def _check_tiff(image: TiffImagePlugin.TiffImageFile, content: bytes, limits: Limits) -> None:
    compression = image.info.get("compression")
    if compression not in _COMPRESSIONS:
        raise UnreadableImage(f"TIFF compression {compression} is not supported: save it uncompressed, or as PNG")
    tile_width, tile_length = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if tile_width * tile_length > limits.max_pixels:
        # a tile may be larger than the image
        raise UnreadableImage(f"a tile of {tile_width}x{tile_length} is more than {limits.max_pixels:,} pixels")
    strips = sum(len(image.tag_v2.get(tag, ())) for tag in (_STRIPS, _TILES))
    # the marker does not occur inside compressed data
    if compression == "jpeg" and content.count(bytes((0xFF, _START_OF_SCAN))) > MAX_SCANS + 4 * strips:
        raise UnreadableImage(f"more than {MAX_SCANS} scans")


def _unidentified(path: str, limits: Limits) -> str:
    """Return why Pillow does not identify a file."""
    try:
        with _open(path, limits) as file:
            start = file.read(4)
    except (OSError, UnreadableFile):
        start = b""
    if start in _TIFF_STARTS:
        return (
            "a TIFF that is damaged or has an unsupported layout: save it as gray, RGB or RGBA with 8 or 16 bits per "
            "value"
        )
    return f"not a {_NAMES} image"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # a damaged tag does not make the image unreadable
        return 1
