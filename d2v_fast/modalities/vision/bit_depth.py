"""Images with more or fewer bits per value than 8: what their white is, and their pixels with 8 bits.

A file with 16 bits per value may hold values of 12 bits, as cameras and scanners write them; taken for 16, they are
almost black. What white is follows from the configuration, else from the file, where it says so, else from the bits in
which values are stored; then it is noted if the brightest value needs fewer of them.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from d2v_fast.data.files import UnreadableFile

__all__ = ["MAX_BITS", "Dim", "eight_bits"]

MAX_BITS = 16
Values = npt.NDArray[np.uint16]
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR = 258, 262, 284
# the largest value as TIFF has it: a statistic by its specification, unless it is exactly what a camera can give
_LARGEST = (281, 341)
_CAMERAS = {2**bits - 1: bits for bits in (9, 10, 11, 12, 13, 14, 15)}
_WHITE_IS_ZERO = 0


class Dim(NamedTuple):
    """An image whose brightest value needs fewer bits than its values are stored in.

    Attributes:
        stored: bits of a value in the file.
        used: bits that the brightest value needs.
    """

    stored: int
    used: int

    def __str__(self) -> str:
        common = next(bits for bits in (1, 2, 4, 8, 10, 12, 14, 15) if bits >= self.used)
        return (
            f"{self.stored} bits per value, of which the largest needs {self.used}. If they are values of {common} "
            f"bits, set `d2v.data.bit_depth` to {common}, or the images are almost black; {self.stored} takes them as "
            "they are, without this message"
        )


def eight_bits(
    image: Image.Image, content: bytes, bit_depth: int | None, note: Callable[[Dim], None] | None
) -> Image.Image:
    """The loaded image with 8 bits per value, in a mode whose white is 255.

    Args:
        image: as Pillow has decoded it.
        content: of the file, which is decoded again where Pillow keeps half of each value.
        bit_depth: bits of the values of PNG and TIFF files that are stored in more; None: what the file says, or all.
        note: called if the file does not say, and the image is dark.
    Raises:
        UnreadableFile: nothing tells what white is, or a value is beyond it.
    """
    if image.format == "PNG":
        stored, claimed = _png_bits(content)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        stored, claimed = _tiff_bits(image)
    else:
        return image
    if image.mode == "F":
        raise UnreadableFile("floating-point values, whose white is not known: save it with 8 or 16 bits per value")
    if image.mode == "I":
        return _from_integers(image, bit_depth or claimed)
    if image.mode in ("1", "P", "PA", "LAB", "YCbCr", "La", "RGBa") or stored < 8:
        # Pillow spreads the values of 1 to 4 bits over all 8
        return image
    if bit_depth is not None and bit_depth >= stored:
        # all bits count, whatever the file says of them
        bit_depth, claimed, note = None, None, None
    if stored == 8:
        return _from_bytes(image, bit_depth, claimed, note)
    is_gray = image.mode.startswith("I;16")
    # Pillow keeps the upper half of each color's value, which is enough where all bits count
    halves_do = not is_gray and claimed is None and bit_depth is None and "transparency" not in image.info
    if halves_do and stored == MAX_BITS:
        if note is not None and _is_below(128, image):
            largest = _largest(image)
            _note_dim(8 + largest.bit_length() if largest else 0, stored, note)
        return image
    channels = _sixteen_bits(image, content)
    largest = max((int(values.max()) for name, values in channels.items() if name != "A"), default=0)
    bits = stored if bit_depth is None else bit_depth
    if bit_depth is None and claimed is not None and _is_raw(channels, claimed, stored, image.format == "PNG"):
        bits = claimed
    elif bit_depth is None and claimed is None and stored == MAX_BITS:
        _note_dim(largest.bit_length(), stored, note)
    _require_within(largest, bits)
    if is_gray and isinstance(image, TiffImagePlugin.TiffImageFile) and _is_inverted(image):
        channels["L"] = np.uint16(2**bits - 1) - channels["L"]
    alpha = _alpha(image, channels, bits)
    colors = {name: _table(bits)[values] for name, values in channels.items() if name != "A"}
    joined = Image.merge("L" if len(colors) == 1 else "".join(colors), [*map(Image.fromarray, colors.values())])
    if alpha is not None:
        joined.putalpha(Image.fromarray(alpha))
    return joined


def _is_inverted(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether 0 is white, which Pillow turns around of 8 bits and fewer only."""
    return bool(image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _from_integers(image: Image.Image, bits: int | None) -> Image.Image:
    """Of signed or 32-bit values."""
    if bits is None:
        raise UnreadableFile(
            "signed or 32-bit values, whose white is not known: save it with 8 or 16 bits per value, or set "
            "`d2v.data.bit_depth`"
        )
    values = np.asarray(image)
    if int(values.min()) < 0:
        raise UnreadableFile(f"negative values, down to {int(values.min()):,}")
    _require_within(int(values.max()), bits)
    return Image.fromarray(_table(bits)[values.astype(np.uint16)])


def _from_bytes(
    image: Image.Image, bit_depth: int | None, claimed: int | None, note: Callable[[Dim], None] | None
) -> Image.Image:
    """Of bytes, which hold fewer bits where the file or the configuration says so."""
    if bit_depth is None and claimed is None:
        # a dark photograph is no reason to ask: sixteen levels are
        if note is not None and _is_below(16, image):
            _note_dim(_largest(image).bit_length(), 8, note)
        return image
    bands = dict(zip(image.getbands(), image.split(), strict=True))
    values = {name: np.asarray(band).astype(np.uint16) for name, band in bands.items()}
    if bit_depth is not None:
        bits = min(8, bit_depth)
    else:
        bits = claimed if claimed is not None and _is_raw(values, claimed, 8, True) else 8
    if bits == 8:
        return image
    _require_within(max(int(band.max()) for name, band in values.items() if name != "A"), bits)
    is_scaled = {name: name != "A" or int(band.max()) < 2**bits for name, band in values.items()}
    colors = [Image.fromarray(_table(bits)[band]) if is_scaled[name] else bands[name] for name, band in values.items()]
    scaled = Image.merge(image.mode, colors)
    if "transparency" in image.info:
        # the color that stands for transparent, among the scaled ones
        key = image.info["transparency"]
        table = _table(bits)
        scaled.info["transparency"] = tuple(int(table[v]) for v in key) if isinstance(key, tuple) else int(table[key])
    return scaled


def _require_within(largest: int, bits: int) -> None:
    if largest >= 2**bits:
        raise UnreadableFile(f"a value of {largest:,} is beyond the {bits} bits of `d2v.data.bit_depth`")


def _note_dim(used: int, stored: int, note: Callable[[Dim], None] | None) -> None:
    # a black image says nothing
    if note is not None and 0 < used < stored:
        note(Dim(stored, used))


def _largest(image: Image.Image) -> int:
    """The largest value of the colors."""
    bands = zip(image.getbands(), image.split(), strict=True)
    return max(int(np.asarray(band).max()) for name, band in bands if name != "A")


def _is_below(level: int, image: Image.Image) -> bool:
    """Whether no value of the colors reaches a level; a few pixels mostly show that one does."""
    few = image.resize((16, 16), Image.Resampling.NEAREST)
    return _largest(few) < level and _largest(image) < level


def _table(bits: int) -> npt.NDArray[np.uint8]:
    """From values of so many bits to 8."""
    if bits == MAX_BITS:
        return (np.arange(2**MAX_BITS, dtype=np.uint32) >> 8).astype(np.uint8)
    white = 2**bits - 1
    return ((np.arange(2**bits, dtype=np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _is_raw(channels: dict[str, Values], claimed: int, stored: int, may_be_scaled: bool) -> bool:
    """Whether values are so many bits as they came from the sensor, and not scaled up to what is stored.

    A PNG that says how many bits are significant should have scaled them up: then small values are multiples of the
    factor, or by rounding one more.
    """
    colors = [values for name, values in channels.items() if name != "A"]
    if any(int(values.max()) >= 2**claimed for values in colors):
        return False
    factor = 2 ** (stored - claimed)
    return not may_be_scaled or any(bool((values % factor > 1).any()) for values in colors)


def _png_bits(content: bytes) -> tuple[int, int | None]:
    """Bits in which the values of a PNG are stored, and how many are significant where the file says so."""
    stored, kind = 8, 0
    for name, body in _png_chunks(content):
        if name == b"IHDR":
            stored, kind = body[8], body[9]
        if name == b"sBIT" and kind != 3:
            # of each channel, alpha last
            colors = body[:-1] if kind in (4, 6) else body
            bits = max(colors, default=0)
            return stored, bits if 0 < bits < stored else None
        if name in (b"IDAT", b"PLTE"):
            break
    return stored, None


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        yield content[position + 4 : position + 8], content[position + 8 : position + 8 + min(size, 16)]
        position += 12 + size


def _tiff_bits(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int | None]:
    """Bits in which the values of a TIFF are stored, and how many they have where the file says so."""
    stored = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if stored == MAX_BITS and image.tag_v2.get(_PLANAR) == 2 and image.info.get("compression") == "raw":
        # Pillow would read every second byte of each plane
        raise UnreadableFile("planes of 16 bits one after the other: save it with its channels interleaved")
    for tag in _LARGEST:
        value = image.tag_v2.get(tag)
        largest = max(value) if isinstance(value, tuple) and value else value
        if isinstance(largest, (int, float)) and largest in _CAMERAS and _CAMERAS[int(largest)] < stored:
            return stored, _CAMERAS[int(largest)]
    return stored, None


def _sixteen_bits(image: Image.Image, content: bytes) -> dict[str, Values]:
    """All bits of every channel, by its letter."""
    if image.mode.startswith("I;16"):
        return {"L": np.asarray(image).astype(np.uint16)}
    if any(isinstance(tile.args, str) and tile.args.startswith("LA") for tile in _tiles(content)):
        # gray with alpha: its four bytes as four channels
        parts: Values = np.asarray(_decoded(content, lambda rawmode: "RGBA")).astype(np.uint16)
        joined: Values = parts[..., ::2] << np.uint16(8) | parts[..., 1::2]
        return {"L": joined[..., 0], "A": joined[..., 1]}
    lower = _decoded(content, _other_half)
    return {
        name: np.asarray(high).astype(np.uint16) << np.uint16(8) | np.asarray(low)
        for name, high, low in zip(image.getbands(), image.split(), lower.split(), strict=True)
    }


def _tiles(content: bytes) -> list[Any]:
    """How Pillow would decode the image."""
    with Image.open(io.BytesIO(content), formats=("PNG", "TIFF")) as image:
        return list(getattr(image, "tile", []))


def _decoded(content: bytes, change: Callable[[str], str]) -> Image.Image:
    """The image again, with other bytes of each value."""
    with Image.open(io.BytesIO(content), formats=("PNG", "TIFF")) as image:
        tiles = []
        for tile in _tiles(content):
            args = tile.args
            tiles.append(tile._replace(args=(change(args[0]), *args[1:]) if isinstance(args, tuple) else change(args)))
        image.tile = tiles
        image.load()
        return image


def _other_half(rawmode: str) -> str:
    """Pillow's name for the layout of 16-bit values with the order of their bytes turned around."""
    native = "L" if sys.byteorder == "little" else "B"
    order = native if rawmode.endswith("N") else rawmode[-1]
    if not rawmode.endswith((";16L", ";16B", ";16N")) or rawmode.startswith("RGBa"):
        raise UnreadableFile("16 bits per value in a layout of which Pillow reads the upper 8 only")
    return rawmode[:-1] + ("B" if order == "L" else "L")


def _alpha(image: Image.Image, channels: dict[str, Values], bits: int) -> npt.NDArray[np.uint8] | None:
    """Opacity, of a channel or where the color is not the transparent one.

    Args:
        bits: of the colors. A channel without a larger value has as many, or the image would be almost transparent.
    """
    if "A" in channels:
        opacity = channels["A"]
        return _table(bits if int(opacity.max()) < 2**bits else MAX_BITS)[opacity]
    key = image.info.get("transparency")
    if key is None or isinstance(key, bytes):
        return None
    colors = list(channels.values())
    keys = key if isinstance(key, tuple) else (key,) * len(colors)
    same = np.logical_and.reduce([values == one for values, one in zip(colors, keys, strict=True)])
    return np.where(same, 0, 255).astype(np.uint8)
