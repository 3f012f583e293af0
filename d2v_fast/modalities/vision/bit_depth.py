"""Convert images with more or fewer than 8 bits per value to 8 bits.

Cameras and scanners may store 12-bit values in a 16-bit file; read as 16-bit values they are almost black. The value of
white follows from `bit_depth` if it is set, else from the file if it records its bit depth, else from the number of
stored bits. In the last case the caller is notified if the brightest value needs fewer bits.
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
# TIFF tags of the largest value: a statistic, but a white level if it is the maximum of a camera's bit depth
_LARGEST = (281, 341)
_CAMERAS = {2**bits - 1: bits for bits in (9, 10, 11, 12, 13, 14, 15)}
_WHITE_IS_ZERO = 0


class Dim(NamedTuple):
    """A warning about an image whose brightest value needs fewer bits than are stored.

    Attributes:
        stored: Bits per value in the file.
        used: Bits that the brightest value needs.
    """

    stored: int
    used: int

    def __str__(self) -> str:
        common = next(bits for bits in (1, 2, 4, 8, 10, 12, 14, 15) if bits >= self.used)
        return (
            f"{self.stored} bits per value, of which the largest needs {self.used}. If these are {common}-bit values, "
            f"set `d2v.data.bit_depth` to {common}, or the images are almost black; {self.stored} keeps them as they "
            "are and silences this message"
        )


def eight_bits(
    image: Image.Image, content: bytes, bit_depth: int | None, note: Callable[[Dim], None] | None
) -> Image.Image:
    """Convert a loaded image to 8 bits per value, in a mode whose white is 255.

    Args:
        image: The image that Pillow decoded.
        content: The file's bytes, decoded again if Pillow keeps only the upper half of each value.
        bit_depth: Bits of values that PNG and TIFF files store in more. None uses the depth that the file records, or
            all stored bits.
        note: Called if the image is dark and the file does not record a bit depth.
    Raises:
        UnreadableFile: The value of white is unknown, or a value exceeds it.
    """
    if image.format == "PNG":
        stored, claimed = _png_bits(content)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        stored, claimed = _tiff_bits(image)
    else:
        return image
    if image.mode == "F":
        raise UnreadableFile("floating-point values, for which white is undefined: save it with 8 or 16 bits per value")
    if image.mode == "I":
        return _from_integers(image, bit_depth or claimed)
    if image.mode in ("1", "P", "PA", "LAB", "YCbCr", "La", "RGBa") or stored < 8:
        # Pillow spreads the values of 1 to 4 bits over all 8
        return image
    if bit_depth is not None and bit_depth >= stored:
        # all stored bits count, whatever depth the file records
        bit_depth, claimed, note = None, None, None
    if stored == 8:
        return _from_bytes(image, bit_depth, claimed, note)
    is_gray = image.mode.startswith("I;16")
    # Pillow keeps the upper half of each color value, which is enough if all bits count
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
    """Return whether 0 is white. Pillow inverts such images only up to 8 bits."""
    return bool(image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _from_integers(image: Image.Image, bits: int | None) -> Image.Image:
    """Convert an image of signed or 32-bit values to 8 bits."""
    if bits is None:
        raise UnreadableFile(
            "signed or 32-bit values, for which white is undefined: save it with 8 or 16 bits per value, or set "
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
    """Scale an image stored in bytes whose values have fewer bits, as the file or the configuration says."""
    if bit_depth is None and claimed is None:
        # a dark photograph needs no warning, but one of at most 16 levels does
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
        # scale the transparent color like the others
        key = image.info["transparency"]
        table = _table(bits)
        scaled.info["transparency"] = tuple(int(table[v]) for v in key) if isinstance(key, tuple) else int(table[key])
    return scaled


def _require_within(largest: int, bits: int) -> None:
    if largest >= 2**bits:
        raise UnreadableFile(f"a value of {largest:,} is beyond the {bits} bits of `d2v.data.bit_depth`")


def _note_dim(used: int, stored: int, note: Callable[[Dim], None] | None) -> None:
    # a black image gives no evidence
    if note is not None and 0 < used < stored:
        note(Dim(stored, used))


def _largest(image: Image.Image) -> int:
    """Return the largest value of the color channels."""
    bands = zip(image.getbands(), image.split(), strict=True)
    return max(int(np.asarray(band).max()) for name, band in bands if name != "A")


def _is_below(level: int, image: Image.Image) -> bool:
    """Return whether all color values are below a level. A few pixels usually show that one is not."""
    few = image.resize((16, 16), Image.Resampling.NEAREST)
    return _largest(few) < level and _largest(image) < level


def _table(bits: int) -> npt.NDArray[np.uint8]:
    """Return the lookup table from values of `bits` bits to 8 bits."""
    if bits == MAX_BITS:
        return (np.arange(2**MAX_BITS, dtype=np.uint32) >> 8).astype(np.uint8)
    white = 2**bits - 1
    return ((np.arange(2**bits, dtype=np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _is_raw(channels: dict[str, Values], claimed: int, stored: int, may_be_scaled: bool) -> bool:
    """Return whether values have `claimed` bits and were not scaled up to the stored bits.

    A PNG that records its significant bits should have scaled its values up. They are then multiples of the factor, or
    one more by rounding.
    """
    colors = [values for name, values in channels.items() if name != "A"]
    if any(int(values.max()) >= 2**claimed for values in colors):
        return False
    factor = 2 ** (stored - claimed)
    return not may_be_scaled or any(bool((values % factor > 1).any()) for values in colors)


def _png_bits(content: bytes) -> tuple[int, int | None]:
    """Return the stored bits per value of a PNG, and the significant bits if the file records fewer."""
    stored, kind = 8, 0
    for name, body in _png_chunks(content):
        if name == b"IHDR":
            stored, kind = body[8], body[9]
        if name == b"sBIT" and kind != 3:
            # one byte per channel, alpha last
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
    """Return the stored bits per value of a TIFF, and the used bits if the file records fewer."""
    stored = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if stored == MAX_BITS and image.tag_v2.get(_PLANAR) == 2 and image.info.get("compression") == "raw":
        # Pillow would read every second byte of each plane
        raise UnreadableFile("16-bit channels in separate planes: save it with interleaved channels")
    for tag in _LARGEST:
        value = image.tag_v2.get(tag)
        largest = max(value) if isinstance(value, tuple) and value else value
        if isinstance(largest, (int, float)) and largest in _CAMERAS and _CAMERAS[int(largest)] < stored:
            return stored, _CAMERAS[int(largest)]
    return stored, None


def _sixteen_bits(image: Image.Image, content: bytes) -> dict[str, Values]:
    """Return every channel with all 16 bits, keyed by its letter."""
    if image.mode.startswith("I;16"):
        return {"L": np.asarray(image).astype(np.uint16)}
    if any(isinstance(tile.args, str) and tile.args.startswith("LA") for tile in _tiles(content)):
        # read the four bytes of gray with alpha as four channels
        parts: Values = np.asarray(_decoded(content, lambda rawmode: "RGBA")).astype(np.uint16)
        joined: Values = parts[..., ::2] << np.uint16(8) | parts[..., 1::2]
        return {"L": joined[..., 0], "A": joined[..., 1]}
    lower = _decoded(content, _other_half)
    return {
        name: np.asarray(high).astype(np.uint16) << np.uint16(8) | np.asarray(low)
        for name, high, low in zip(image.getbands(), image.split(), lower.split(), strict=True)
    }


def _tiles(content: bytes) -> list[Any]:
    """Return the tiles of an image as Pillow describes them to its decoders."""
    with Image.open(io.BytesIO(content), formats=("PNG", "TIFF")) as image:
        return list(getattr(image, "tile", []))


def _decoded(content: bytes, change: Callable[[str], str]) -> Image.Image:
    """Decode an image with changed raw modes, so that other bytes of each value are kept."""
    with Image.open(io.BytesIO(content), formats=("PNG", "TIFF")) as image:
        tiles = []
        for tile in _tiles(content):
            args = tile.args
            tiles.append(tile._replace(args=(change(args[0]), *args[1:]) if isinstance(args, tuple) else change(args)))
        image.tile = tiles
        image.load()
        return image


def _other_half(rawmode: str) -> str:
    """Return Pillow's raw mode for 16-bit values with the opposite byte order, which keeps the lower bytes."""
    native = "L" if sys.byteorder == "little" else "B"
    order = native if rawmode.endswith("N") else rawmode[-1]
    if not rawmode.endswith((";16L", ";16B", ";16N")) or rawmode.startswith("RGBa"):
        raise UnreadableFile("16 bits per value in a layout of which Pillow reads only the upper 8")
    return rawmode[:-1] + ("B" if order == "L" else "L")


def _alpha(image: Image.Image, channels: dict[str, Values], bits: int) -> npt.NDArray[np.uint8] | None:
    """Return the opacity from the alpha channel or from the transparent color; None if there is neither.

    Args:
        image: The image that Pillow decoded.
        channels: Its channels with all 16 bits.
        bits: Bits of the color values. The alpha channel has as many if none of its values is larger; otherwise the
            image would be almost transparent.
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
