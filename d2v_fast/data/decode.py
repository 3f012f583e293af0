"""One image file to a square of pixels. The file may be damaged or hostile: whatever it does,
`UnreadableImage`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

__all__ = ["Box", "UnreadableImage", "centre_box", "read_square"]

# only these decoders run, whatever the file is called
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
MIN_SIDE = 2

Box = tuple[int, int, int, int]

EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A file that cannot be used as an image; the message is the reason in a few words."""


def read_square(path: str, size: int, channels: int, choose_box: Callable[[int, int], Box]) -> Image.Image:
    """Decode a file, crop it, and resize the crop (cubic, antialiased).

    Args:
        path: a JPEG, PNG or WebP file of any mode: grey, colour, palette, CMYK, 16 bit, with alpha (laid on
        white). size: width and height of the result in pixels. channels: 1 (grey) or 3 (RGB). choose_box:
        from width and height of the file's image to the crop, (left, top, width, height). The camera's
            orientation tag is obeyed after the crop.
    Returns:
        An image of mode "L" or "RGB".
    Raises:
        UnreadableImage: for anything that is wrong with the file.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of much that is harmless here
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _read_square(path, size, channels, choose_box)
    except UnreadableImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(f"more than {MAX_PIXELS // 1_000_000} million pixels") from None
    except UnidentifiedImageError:
        raise UnreadableImage("not a JPEG, PNG or WebP image") from None
    except Exception as error:
        # decoders let nearly every type of exception escape from damaged files
        raise UnreadableImage(f"{type(error).__name__}: {str(error)[:200]}") from None


def centre_box(width: int, height: int) -> Box:
    """The largest square in the middle."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def _read_square(path: str, size: int, channels: int, choose_box: Callable[[int, int], Box]) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"{width}x{height} is more than {MAX_PIXELS // 1_000_000} million pixels")
        if min(width, height) < MIN_SIDE:
            raise UnreadableImage(f"{width}x{height} is smaller than {MIN_SIDE} pixels")
        left, top, crop_width, crop_height = choose_box(width, height)
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size: as small as leaves the crop no smaller than
        # wanted
        wanted = math.ceil(width * size / crop_width), math.ceil(height * size / crop_height)
        image.draft("L" if channels == 1 else "RGB", wanted)
        image.load()
        right, bottom = left + crop_width, top + crop_height
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, right * across, bottom * down)
        square = _plain_mode(image, channels).resize((size, size), Image.Resampling.BICUBIC, box)
        turn = _TURNS.get(_orientation(image))
    return square if turn is None else square.transpose(turn)


def _plain_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode "L" or "RGB"."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # 16-bit grey; Pillow's own conversion would clip at 255
        grey: npt.NDArray[np.integer] = np.clip(np.asarray(image), 0, 0xFFFF)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert(mode)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        # a damaged tag does not make the picture unreadable
        return 1
