"""Image formats and bit depths are decoded correctly, or refused with a reason."""

from __future__ import annotations

import io
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.interop.huggingface import export_model
from d2v_fast.modalities.vision.bit_depth import Dim
from d2v_fast.modalities.vision.decode import MAX_SCANS, Limits, UnreadableImage, center_box, read_square
from d2v_fast.objectives.build import build_model
from tests.helpers.image_datasets import LIMITS, encoded, expected_levels, levels, make_dataset, picture
from tests.helpers.image_files import blocks, chunk, png, tiff
from tests.helpers.runs import tiny_file

# squares of 20 x 20 equal pixels, so that resampling does not change the middle of a square
COLORS = np.array([[[200, 30, 60], [20, 160, 240]], [[250, 250, 5], [90, 90, 90]]], dtype=np.uint16)


def centers(content: bytes, tmp_path: Path, channels: int = 3, **options: Any) -> NDArray[np.int64]:
    """Return the values at the middles of the four squares, `[2, 2]` or `[2, 2, 3]`."""
    (tmp_path / "a").write_bytes(content)
    read = read_square(str(tmp_path / "a"), 40, channels, center_box, LIMITS, **options)
    return np.asarray(read).astype(int)[10::20, 10::20]


def reason(content: bytes, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(UnreadableImage) as caught:
        centers(content, tmp_path, **options)
    return str(caught.value)


GRAYS = COLORS[..., 0]


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("kind", [0, 2, 4, 6], ids=["gray", "rgb", "gray+alpha", "rgb+alpha"])
def test_values_of_fewer_bits_in_sixteen(kind: int, bits: int, tmp_path: Path) -> None:
    """The bit depth comes from the key or from the PNG; without either, a note is given."""
    white = 2**bits - 1
    source = GRAYS[..., None] if kind in (0, 4) else COLORS
    values = blocks(np.rint(source / 255 * white).astype(np.uint16))
    # the last bits vary, as a sensor's do
    values[::2] |= 1
    if kind in (4, 6):
        values = np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)
    expected = np.broadcast_to(source, COLORS.shape).astype(int)
    notes: list[Dim] = []
    dark = centers(png(values, kind), tmp_path, note=notes.append)
    assert dark.max() < 64
    assert [note.stored for note in notes] == [16]
    assert bits - 1 <= notes[0].used <= bits
    notes.clear()
    by_key = centers(png(values, kind), tmp_path, bit_depth=bits, note=notes.append)
    assert np.abs(by_key - expected).max() <= 1
    significant = chunk(b"sBIT", bytes([bits] * values.shape[2]))
    by_file = centers(png(values, kind, 16, significant), tmp_path, note=notes.append)
    assert np.array_equal(by_file, by_key)
    assert not notes
    kept = centers(png(values, kind), tmp_path, bit_depth=16, note=notes.append)
    assert np.array_equal(kept, dark)
    assert not notes
    if kind in (4, 6):
        # opacity with as many bits as the colors
        values[..., -1] = white
        assert np.array_equal(centers(png(values, kind), tmp_path, bit_depth=bits), by_key)
        assert np.array_equal(centers(png(values, kind, 16, significant), tmp_path), by_key)


@pytest.mark.parametrize("kind", [0, 2], ids=["gray", "rgb"])
def test_significant_bits_that_are_scaled_up(kind: int, tmp_path: Path) -> None:
    """12 significant bits scaled up to 16 bits, as the PNG specification demands, are read as 16 bits."""
    significant = chunk(b"sBIT", bytes([12] * (1 if kind == 0 else 3)))
    for brightness in (1.0, 0.05):
        twelve = np.rint(COLORS * brightness / 255 * 4095).astype(np.uint16)
        values = blocks((twelve << 4) | (twelve >> 8))
        values = values[..., 0] if kind == 0 else values
        notes: list[Dim] = []
        read = centers(png(values, kind, 16, significant), tmp_path, note=notes.append)
        expected = COLORS * brightness if kind == 2 else np.repeat(GRAYS[..., None] * brightness, 3, 2)
        assert np.abs(read - expected).max() <= 1.1
        assert not notes


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("stored", ["in as many bits", "in 8 bits"])
def test_values_of_one_to_four_bits(stored: str, bits: int, tmp_path: Path) -> None:
    values = blocks(np.array([[0, 2**bits - 1], [2 ** (bits - 1), 1]], dtype=np.uint16))
    expected = np.rint(values[10::20, 10::20] * 255 / (2**bits - 1)).astype(int)
    notes: list[Dim] = []
    if stored == "in as many bits":
        read = centers(png(values, 0, bits), tmp_path, channels=1, note=notes.append)
        assert not notes
    else:
        dark = centers(png(values, 0, 8), tmp_path, channels=1, note=notes.append)
        assert np.array_equal(dark, values[10::20, 10::20])
        assert notes == [Dim(8, bits)]
        read = centers(png(values, 0, 8), tmp_path, channels=1, bit_depth=bits)
        if bits > 1:
            said = png(values, 0, 8, chunk(b"sBIT", bytes([bits])))
            assert np.array_equal(centers(said, tmp_path, channels=1), read)
    assert np.abs(read - expected).max() <= 1


def test_values_beyond_the_key(tmp_path: Path) -> None:
    values = blocks(np.array([[0, 5000], [1, 2]], dtype=np.uint16))
    assert reason(png(values, 0), tmp_path, bit_depth=12) == (
        "a value of 5,000 is beyond the 12 bits of `d2v.data.bit_depth`"
    )
    # a key above the stored bits has no effect
    eight = blocks(GRAYS)
    assert np.array_equal(centers(png(eight, 0, 8), tmp_path, bit_depth=12), centers(png(eight, 0, 8), tmp_path))


def test_transparent_color_of_sixteen_bits(tmp_path: Path) -> None:
    values = blocks(np.array([[100, 40_000], [30_000, 65_535]], dtype=np.uint16))
    gray = centers(png(values, 0, 16, chunk(b"tRNS", struct.pack(">H", 100))), tmp_path, channels=1)
    assert gray.tolist() == [[255, 40_000 >> 8], [30_000 >> 8, 255]]
    colors = np.stack([values] * 3, 2)
    # another color with the same upper bytes is not transparent
    colors[:20, 20:] = [100, 100, 101]
    key = chunk(b"tRNS", struct.pack(">HHH", 100, 100, 100))
    read = centers(png(colors, 2, 16, key), tmp_path)
    assert read[..., 0].tolist() == [[255, 0], [30_000 >> 8, 255]]


@pytest.mark.parametrize("order", ["<", ">"], ids=["II", "MM"])
@pytest.mark.parametrize("photometric", [0, 1, 2], ids=["white is zero", "gray", "rgb"])
@pytest.mark.parametrize("bits", [16, 12, 8])
def test_tiff_depths(bits: int, photometric: int, order: str, tmp_path: Path) -> None:
    white = 2**bits - 1
    source = COLORS if photometric == 2 else GRAYS
    values = blocks(np.rint(source / 255 * white).astype(np.uint8 if bits == 8 else np.uint16))
    if photometric == 0:
        values = white - values
    content = tiff(values, order, photometric, extra={281: white} if bits == 12 else None)
    expected = COLORS if photometric == 2 else np.repeat(GRAYS[..., None], 3, 2)
    if (bits, photometric, order) == (16, 0, ">"):
        # a layout that Pillow does not support
        assert "a TIFF that is damaged or has an unsupported layout" in reason(content, tmp_path)
        return
    if bits == 12 and photometric == 0:
        if order == "<":
            assert np.abs(centers(content, tmp_path) - expected).max() <= 1
        return
    assert np.abs(centers(content, tmp_path) - expected).max() <= 1
    if bits == 12:
        notes: list[Dim] = []
        dark = centers(tiff(values, order, photometric), tmp_path, note=notes.append)
        assert dark.max() < 16
        assert notes == [Dim(16, 12)]
        # a maximum that no sensor has is not a white level
        assert np.array_equal(centers(tiff(values, order, photometric, extra={281: 4000}), tmp_path), dark)
        by_key = centers(tiff(values, order, photometric), tmp_path, bit_depth=12)
        assert np.abs(by_key - expected).max() <= 1


def test_tiff_of_twelve_packed_bits(tmp_path: Path) -> None:
    values = blocks(np.rint(GRAYS / 255 * 4095).astype(np.uint16))
    content = tiff(values, bits=12)
    notes: list[Dim] = []
    assert np.abs(centers(content, tmp_path, channels=1, note=notes.append) - GRAYS).max() <= 1
    assert not notes


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1", "YCbCr", "I;16"])
def test_tiff_modes(mode: str, compression: str, tmp_path: Path) -> None:
    if compression == "jpeg" and mode not in ("RGB", "L"):
        pytest.skip("not a kind that is written")
    colors = Image.fromarray(blocks(COLORS).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(blocks(GRAYS).astype(np.uint16) * 257)
        expected = np.repeat(GRAYS[..., None], 3, 2).astype(int)
    else:
        image = colors.quantize(16) if mode == "P" else colors.convert(mode)
        expected = np.asarray(image.convert("RGB")).astype(int)[10::20, 10::20]
    stream = io.BytesIO()
    image.save(stream, "TIFF", compression=compression)
    notes: list[Dim] = []
    tolerance = 6 if mode == "YCbCr" or compression == "jpeg" else 1
    difference = centers(stream.getvalue(), tmp_path, note=notes.append) - expected
    assert np.abs(difference).max() <= tolerance
    assert not notes


def test_transparent_tiff_is_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 40), (10, 20, 30, 0))
    image.paste((10, 20, 30, 255), (20, 0, 40, 40))
    read = centers(encoded(image, "TIFF"), tmp_path)
    assert read.tolist() == [[[255] * 3, [10, 20, 30]]] * 2


BITMAP_HEADER = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 54, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0)


def compressed_as(number: int) -> bytes:
    """Return a TIFF that claims compression `number`."""
    tag = struct.pack("<HHI", 259, 3, 1)
    return encoded(picture(), "TIFF", compression="tiff_lzw").replace(
        tag + struct.pack("<I", 5), tag + struct.pack("<I", number)
    )


def with_tag(content: bytes, tag: int, number: int, count: int, value: int) -> bytes:
    """Return a TIFF with one directory entry replaced."""
    start = int.from_bytes(content[4:8], "little")
    for index in range(int.from_bytes(content[start : start + 2], "little")):
        entry = start + 2 + 12 * index
        if int.from_bytes(content[entry : entry + 2], "little") == tag:
            return content[:entry] + struct.pack("<HHII", number, 4, count, value) + content[entry + 12 :]
    raise AssertionError(tag)


def huge_tile() -> bytes:
    """Return a TIFF with a small image in one tile of 16 GB."""
    content = encoded(picture(), "TIFF", compression="tiff_adobe_deflate")
    content = with_tag(content, 278, 322, 1, 70_000)
    for tag, number in ((284, 323), (273, 324), (279, 325)):
        start = int.from_bytes(content[4:8], "little")
        value = 70_000
        for index in range(int.from_bytes(content[start : start + 2], "little")):
            entry = start + 2 + 12 * index
            if int.from_bytes(content[entry : entry + 2], "little") == tag and tag != 284:
                value = int.from_bytes(content[entry + 8 : entry + 12], "little")
        content = with_tag(content, tag, number, 1, value)
    return content


def rle_bitmap() -> bytes:
    header = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 0, 0, 54 + 1024, 40, 3000, 3000, 1, 8, 1, 0, 0, 0, 256, 0)
    return header + bytes(1024) + b"\1\7" * 2_500_000 + b"\0\1"


UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "float": (
        lambda: tiff(blocks(GRAYS).astype(np.float32) / 255, sample_format=3),
        "floating-point values, for which white is undefined",
    ),
    "signed": (
        lambda: tiff(blocks(GRAYS).astype(np.int16), sample_format=2),
        "signed or 32-bit values, for which white is undefined",
    ),
    "32 bits": (lambda: tiff(blocks(GRAYS).astype(np.uint32)), "signed or 32-bit values, for which white is undefined"),
    "float64": (
        lambda: tiff(blocks(GRAYS).astype(np.float64), sample_format=3),
        "a TIFF that is damaged or has an unsupported layout",
    ),
    "CIELAB": (
        lambda: tiff(blocks(COLORS).astype(np.uint8), photometric=8),
        "CIELAB colors with an unknown white point",
    ),
    "planes": (
        lambda: tiff(blocks(COLORS).astype(np.uint16) * 257, photometric=2, planar=True),
        "16-bit channels in separate planes",
    ),
    "cut": (lambda: encoded(picture(60, 50), "GIF")[:1500], "truncated"),
    "text": (lambda: b"II*\0 is how a TIFF begins, and this is none", "a TIFF that is damaged"),
    "bomb": (lambda: encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"), "9000x9000 is more than"),
    "gif bomb": (
        lambda: encoded(Image.new("P", (4, 4)), "GIF").replace(b"\x04\0\x04\0", b"\xff\xff\xff\xff", 1),
        "more than 64,000,000 pixels",
    ),
    "bmp bomb": (lambda: BITMAP_HEADER, "more than 64,000,000 pixels"),
    "lzma": (lambda: compressed_as(34925), "TIFF compression lzma is not supported"),
    "old JPEG": (lambda: compressed_as(6), "TIFF compression tiff_jpeg is not supported"),
    "many strips": (
        lambda: with_tag(encoded(picture(), "TIFF"), 273, 273, 50_000_000, 8),
        "more than 300,000 strips or tiles",
    ),
    "many tags": (lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(100), "a TIFF directory of more than 4,096 entries"),
    "huge tile": (huge_tile, "a tile of 70000x70000 is more than 64,000,000 pixels"),
    "run lengths": (rle_bitmap, "a run-length encoded bitmap of more than 4,000,000 bytes"),
    "ico": (lambda: encoded(picture(32, 32), "ICO"), "not a JPEG, PNG, WebP, TIFF, BMP or GIF image"),
    "ppm": (lambda: encoded(picture(), "PPM"), "not a JPEG, PNG, WebP, TIFF, BMP or GIF image"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    make, expected = UNREADABLE[name]
    assert expected in reason(make(), tmp_path)


def test_a_key_tells_the_white_of_integers(tmp_path: Path) -> None:
    """Scanners and microscopes write signed and 32-bit values."""
    twelve = blocks(np.rint(GRAYS / 255 * 4095))
    for kind, sample_format in ((np.int16, 2), (np.uint32, 1), (np.int32, 2)):
        content = tiff(twelve.astype(kind), sample_format=sample_format)
        assert np.abs(centers(content, tmp_path, channels=1, bit_depth=12) - GRAYS).max() <= 1
        assert "beyond the 10 bits" in reason(content, tmp_path, bit_depth=10)
    negative = tiff((twelve - 1024).astype(np.int16), sample_format=2)
    assert "negative values, down to -" in reason(negative, tmp_path, bit_depth=12)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_orientation_of_a_tiff(orientation: int, compression: str, tmp_path: Path) -> None:
    path = tmp_path / "turned.tif"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(40, 30).save(path, exif=exif, compression=compression)
    with Image.open(io.BytesIO(encoded(picture(40, 30), "PNG", exif=exif))) as image:
        expected = expected_levels(ImageOps.exif_transpose(image))
    assert np.abs(levels(path) - expected).mean() < 1


def test_first_page_and_first_frame(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (20, 20), color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for form in ("TIFF", "GIF"):
        content = encoded(pages[0], form, save_all=True, append_images=pages[1:])
        assert centers(content, tmp_path)[0, 0].tolist() == [250, 0, 0]
    clear = Image.new("P", (20, 20))
    clear.putpalette([250, 0, 0, 0, 0, 250])
    content = encoded(clear, "GIF", transparency=0)
    assert centers(content, tmp_path)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_bitmaps(mode: str, tmp_path: Path) -> None:
    image = picture().quantize(16) if mode == "P" else picture().convert(mode)
    image.save(tmp_path / "a.bmp")
    assert np.abs(levels(tmp_path / "a.bmp") - expected_levels(image)).mean() < 1


def test_a_bitmap_whose_opacity_was_never_filled(tmp_path: Path) -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.bmp")
    assert np.abs(levels(tmp_path / "a.bmp") - expected_levels(picture())).mean() < 1


NAMES = ["a.jfif", "b.JPE", "c.bmp", "d.tif", "e.TIFF", "f.gif"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name, form in zip(NAMES, ("JPEG", "JPEG", "BMP", "TIFF", "TIFF", "GIF"), strict=True):
        (images / name).write_bytes(encoded(picture(), form))
    return images


def test_they_are_found_and_read(folder: Path) -> None:
    dataset = make_dataset(folder)
    assert sorted(Path(dataset.path(i)).name for i in range(len(dataset))) == sorted(NAMES)
    pixels, bad = dataset.augmented(np.arange(6), 0, 0)
    assert bad == ()
    assert pixels.shape == (6, 3, 16, 16)
    assert (dataset.plain(np.arange(6)) - dataset.plain(np.array([2]))).abs().mean() < 0.2


def test_dark_images_are_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = blocks(np.rint(GRAYS / 255 * 4095).astype(np.uint16)) | 1
    for index in range(5):
        (folder / f"{index}.png").write_bytes(png(values, 0))
    with caplog.at_level(logging.WARNING):
        dataset = make_dataset(folder)
        dataset.augmented(np.arange(len(dataset)), 0, 0)
    [told] = caplog.messages
    assert told.startswith(f"{folder}/0.png: 16 bits per value, of which the largest needs 12")
    assert "set `d2v.data.bit_depth` to 12" in told
    dark = dataset.plain(np.arange(5))
    caplog.clear()
    bright = make_dataset(folder, bit_depth=12).plain(np.arange(5))
    assert not caplog.messages
    assert dark.max() < bright.max() - 3
    caplog.clear()
    make_dataset(folder, bit_depth=16)
    assert not caplog.messages


def test_embed_tells_it_too(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in folder.iterdir():
        path.unlink()
    values = blocks(np.rint(GRAYS / 255 * 4095).astype(np.uint16)) | 1
    (folder / "a.png").write_bytes(png(values, 0))
    (folder / "b.tif").write_bytes(tiff(values))
    config = load_config(tiny_file(tmp_path)).d2v
    export_model(build_model(config).student, config, tmp_path / "model")
    arguments = ["embed", str(tmp_path / "model"), str(folder), "--to"]
    assert main([*arguments, str(tmp_path / "dark.npy")]) == 0
    assert "`bit_depth` in its preprocessor_config.json" in caplog.text
    caplog.clear()
    path = tmp_path / "model" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bit_depth": 12}))
    assert main([*arguments, str(tmp_path / "bright.npy")]) == 0
    assert not caplog.messages
    dark, bright = (np.load(tmp_path / f"{name}.npy") for name in ("dark", "bright"))
    assert np.abs(bright[0] - bright[1]).max() < 1e-5
    assert np.abs(bright - dark).max() > 1e-3


def test_damaged_files_never_escape(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    deep = blocks(np.rint(COLORS / 255 * 4095).astype(np.uint16)) | 1
    sources = [
        *(encoded(picture(60, 50), form) for form in ("BMP", "GIF", "TIFF")),
        encoded(picture(60, 50), "TIFF", compression="tiff_lzw"),
        encoded(picture(60, 50), "TIFF", compression="jpeg"),
        tiff(deep, photometric=2, extra={281: 4095}),
        png(deep, 2, 16, chunk(b"sBIT", b"\x0c\x0c\x0c")),
    ]
    outcomes = []
    for trial in range(700):
        content = np.frombuffer(sources[trial % len(sources)], dtype=np.uint8).copy()
        # most fields that can go wrong are at the start, or in a TIFF's directory
        places = generator.integers(0, len(content), 3)
        places[0] = generator.integers(0, 60) if trial % 2 else len(content) - 1 - generator.integers(0, 200)
        content[places] = generator.integers(0, 256, 3)
        try:
            outcomes.append(centers(content.tobytes(), tmp_path).shape == (2, 2, 3))
        except UnreadableImage as error:
            outcomes.append(str(error) != "")
    assert all(outcomes)


def test_scans_within_a_tiff_are_counted(tmp_path: Path) -> None:
    content = encoded(picture(64, 64), "TIFF", compression="jpeg")
    assert centers(content, tmp_path).shape == (2, 2, 3)
    assert reason(content + b"\xff\xda" * (MAX_SCANS + 5), tmp_path) == f"more than {MAX_SCANS} scans"


def test_limits_hold_for_them(folder: Path) -> None:
    small = Limits(max_pixels=1199, max_bytes=100_000, min_side=2)
    for name in NAMES:
        with pytest.raises(UnreadableImage, match="40x30 is more than 1,199 pixels"):
            read_square(str(folder / name), 16, 3, center_box, small)
