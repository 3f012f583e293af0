from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from d2v_fast.data import Batch
from d2v_fast.errors import DataError
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.decode import UnreadableImage, read_square
from d2v_fast.modalities.vision.images import random_box
from d2v_fast.modalities.vision.jitter import jitter_
from tests.helpers.image_datasets import (
    LIMITS,
    encoded,
    expected_levels,
    levels,
    make_config,
    make_dataset,
    picture,
    png_header,
)

UNREADABLE: dict[str, tuple[bytes, str]] = {
    "cut.jpg": (encoded(picture(200, 200), "JPEG")[:2000], "OSError: .*truncated"),
    "cut.png": (encoded(picture(200, 200), "PNG")[:5000], "truncated"),
    "cut.webp": (encoded(picture(200, 200), "WEBP", lossless=True)[:3000], "."),
    "text.jpg": (b"not an image at all\n" * 50, "not a JPEG, PNG, WebP, TIFF, BMP or GIF"),
    "page.png": (b"<!DOCTYPE html><html><body>404</body></html>", "not a JPEG, PNG, WebP, TIFF, BMP or GIF"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a JPEG, PNG, WebP, TIFF, BMP or GIF"),
    "renamed_icon.jpg": (encoded(picture(), "ICO"), "not a JPEG, PNG, WebP, TIFF, BMP or GIF"),
    "empty.jpeg": (b"", "an empty file"),
    "dot.png": (encoded(picture(1, 1), "PNG"), "1x1 is smaller than 2 pixels"),
    "line.png": (encoded(picture(500, 1), "PNG"), "500x1 is smaller than 2 pixels"),
    "bomb.png": (png_header(20_000, 20_000), "more than 64,000,000 pixels"),
    "bomb_with_warning.png": (png_header(10_000, 10_000), "more than 64,000,000 pixels"),
    "small_bomb.png": (png_header(8001, 8000), "8001x8000 is more than 64,000,000 pixels"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    content, reason = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        levels(tmp_path / name)
    with warnings.catch_warnings():
        # warnings are not errors in a user's process
        warnings.simplefilter("default")
        with pytest.raises(UnreadableImage, match=reason):
            levels(tmp_path / name)


def test_damaged_files_never_escape(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    sources = [encoded(picture(60, 50), kind) for kind in ("JPEG", "PNG", "WEBP")]
    outcomes = []
    for trial in range(300):
        content = np.frombuffer(sources[trial % 3], dtype=np.uint8).copy()
        content[generator.integers(0, len(content), 3)] = generator.integers(0, 256, 3)
        path = tmp_path / "damaged.jpg"
        path.write_bytes(content.tobytes())
        try:
            outcomes.append(levels(path).shape == (16, 16, 3))
        except UnreadableImage as error:
            outcomes.append(str(error) != "")
    assert all(outcomes)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="FileNotFoundError"):
        levels(tmp_path / "gone.jpg")


READABLE: dict[str, Callable[[Image.Image], Image.Image]] = {
    "color.png": lambda image: image,
    "alpha.png": lambda image: image.convert("RGBA"),
    "palette.png": lambda image: image.quantize(256),
    "gray.png": lambda image: image.convert("L"),
    "gray_alpha.png": lambda image: image.convert("LA"),
    "black_white.png": lambda image: image.convert("1"),
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    "color.jpg": lambda image: image,
    "gray.JPG": lambda image: image.convert("L"),
    "color.webp": lambda image: image,
    "alpha.webp": lambda image: image.convert("RGBA"),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_mode(tmp_path: Path, name: str) -> None:
    image = READABLE[name](picture())
    image.save(tmp_path / name, **({} if name.endswith("png") else {"quality": 98}))
    actual = levels(tmp_path / name)
    assert actual.shape == (16, 16, 3)
    assert np.abs(actual - expected_levels(image)).mean() < 4
    gray = levels(tmp_path / name, channels=1)
    assert gray.shape == (16, 16)
    assert np.abs(gray - np.asarray(Image.fromarray(actual.astype(np.uint8)).convert("L"))).mean() < 4


@pytest.mark.parametrize("mode", ["palette", "RGBA", "LA", "key"])
def test_transparent_is_white(tmp_path: Path, mode: str) -> None:
    half = np.zeros((20, 20), dtype=np.uint8)
    half[:, 10:] = 255
    path = tmp_path / "half.png"
    if mode == "palette":
        image = Image.fromarray(half // 255)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.save(path, transparency=b"\x00\xff")
    elif mode == "key":
        Image.fromarray(half // 255 * 60).convert("RGB").save(path, transparency=(0, 0, 0))
    else:
        image = Image.new("RGB" if mode == "RGBA" else "L", (20, 20))
        image.putalpha(Image.fromarray(half))
        image.save(path)
    ink = 60 if mode == "key" else 0
    actual = levels(path)
    assert (actual[:, :6] == 255).all()
    assert (actual[:, 10:] == ink).all()


def test_sixteen_bit_gray_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    actual = levels(tmp_path / "deep.png", 32)
    np.testing.assert_allclose(actual[0, :, 0], ramp[0] // 256, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientation_tag(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif, quality=98)
    with Image.open(path) as image:
        expected = expected_levels(ImageOps.exif_transpose(image))
    assert np.abs(levels(path) - expected).mean() < 1


def test_damaged_orientation_tag_is_no_reason_to_drop_an_image(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0broken", quality=98)
    assert np.abs(levels(tmp_path / "a.jpg") - expected_levels(picture())).mean() < 3


def test_reduced_decoding_is_as_good(tmp_path: Path) -> None:
    large = picture(1601, 1207, seed=5)
    large.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as image:
        expected = expected_levels(image, 64)
    assert np.abs(levels(tmp_path / "large.jpg", 64) - expected).mean() < 1
    # a small crop must not be decoded at a size that needs enlarging
    box = (800, 600, 70, 70)
    small = np.asarray(read_square(str(tmp_path / "large.jpg"), 64, 3, lambda *_: box, LIMITS)).astype(int)
    with Image.open(tmp_path / "large.jpg") as image:
        corner = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC, (800, 600, 870, 670))
    assert np.abs(small - np.asarray(corner)).mean() < 1


def test_random_boxes() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(generator.random(40), (0.2, 0.5), 200, 100) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width).max() == 200
    assert (top + height).max() == 100
    shares, aspects = width * height / 20_000, width / height
    assert 0.19 < shares.min() < 0.22
    assert 0.48 < shares.max() < 0.51
    assert 0.72 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.36
    assert np.median(aspects) == pytest.approx(1, abs=0.03)
    # a very long image never has an allowed aspect: the largest centered crop that has one is used
    assert random_box(generator.random(40), (1, 1), 1000, 10) == (493, 0, 13, 10)
    assert random_box(generator.random(40), (1, 1), 3, 900) == (0, 448, 3, 4)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve images of three formats in folders."""
    for i in range(12):
        folder = tmp_path / "images" / f"class {i % 3}" / ("deep" if i % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        picture(30 + i, 41 - i, seed=i).save(folder / f"{i:02d}.{('jpg', 'PNG', 'webp')[i % 3]}")
    return tmp_path / "images"


def test_finds_images_sorted(tree: Path) -> None:
    (tree / "notes.txt").write_text("no image")
    (tree / ".hidden.jpg").write_bytes(b"resource fork")
    (tree / ".thumbnails").mkdir()
    picture().save(tree / ".thumbnails" / "small.jpg")
    dataset = make_dataset(tree)
    paths = [dataset.path(i) for i in range(len(dataset))]
    assert len(paths) == 12
    assert paths == sorted(paths)
    assert {os.path.basename(path)[:2] for path in paths} == {f"{i:02d}" for i in range(12)}


def test_links_and_odd_names(tree: Path, tmp_path: Path) -> None:
    (tree / "class 0" / "up").symlink_to(tree)
    (tree / "itself").symlink_to("itself")
    elsewhere = tmp_path / "else where\nünïcode"
    elsewhere.mkdir()
    picture().save(elsewhere / "far.jpg")
    (tree / "linked").symlink_to(elsewhere)
    (tree / "linked again").symlink_to(elsewhere)
    os.mkfifo(tree / "pipe.jpg")
    odd = os.fsencode(tree) + b"/\xff\xfe.png"
    with open(odd, "wb") as file:
        file.write(encoded(picture(), "PNG"))
    (tree / "dead.jpg").symlink_to("nowhere.jpg")
    dataset = make_dataset(tree, follow_outside=True)
    names = [os.path.basename(dataset.path(i)) for i in range(len(dataset))]
    assert len(names) == 12 + 1 + 1 + 2
    assert names.count("far.jpg") == 1
    _, bad = dataset.augmented(np.arange(len(dataset)), 0, 0)
    assert sorted(os.path.relpath(text, tree) for text in bad) == [
        f"dead.jpg: a link to a file that does not exist, {tree}/nowhere.jpg",
        "pipe.jpg: not a regular file, but a pipe",
    ]


def test_plain_pixels(tree: Path) -> None:
    dataset = make_dataset(tree, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    expected = []
    for i in range(len(dataset)):
        scaled = torch.from_numpy(levels(Path(dataset.path(i)))).permute(2, 0, 1) / 255
        mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
        expected.append((scaled - mean[:, None, None]) / std[:, None, None])
    pixels = dataset.plain(np.arange(12))
    assert pixels.is_contiguous()
    torch.testing.assert_close(pixels, torch.stack(expected), rtol=0, atol=1e-5)
    assert torch.equal(dataset[3], pixels[3])
    assert make_dataset(tree, channels=1).plain(np.arange(4)).shape == (4, 1, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_pixels(tree: Path, channels: int) -> None:
    dataset = make_dataset(tree, channels, color_jitter=0.4)
    ids = np.array([3, 0, 11, 7])
    pixels, bad = dataset.augmented(ids, seed=1, epoch=2)
    assert bad == ()
    assert pixels.shape == (4, channels, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.isfinite().all()
    alone = torch.cat([dataset.augmented(ids[i : i + 1], 1, 2)[0] for i in range(4)])
    assert torch.equal(pixels, alone)
    for seed, epoch in ((2, 2), (1, 3)):
        assert (dataset.augmented(ids, seed, epoch)[0] != pixels).flatten(1).any(dim=1).all()


def test_flip_and_jitter_do_what_they_say(tree: Path) -> None:
    ids = np.arange(12)
    options = {"crop_scale": [1.0, 1.0], "mean": [0.0], "std": [1.0]}
    never = make_dataset(tree, flip_prob=0.0, **options).augmented(ids, 0, 0)[0]
    always = make_dataset(tree, flip_prob=1.0, **options).augmented(ids, 0, 0)[0]
    assert torch.equal(always, never.flip(3))
    often = make_dataset(tree, flip_prob=0.5, **options)
    flips = [(often.augmented(ids, 0, epoch)[0] != never).flatten(1).any(dim=1) for epoch in range(40)]
    assert torch.stack(flips).float().mean() == pytest.approx(0.5, abs=0.1)

    jittered = make_dataset(tree, flip_prob=0.0, color_jitter=0.5, **options)
    means = torch.stack([jittered.augmented(ids, 0, epoch)[0].mean(dim=(1, 2, 3)) for epoch in range(40)])
    ratios = means / never.mean(dim=(1, 2, 3))
    assert 0.45 < ratios.min() < 0.6
    assert 1.1 < ratios.max() < 1.55


def test_unreadable_file_is_replaced_by_the_next(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tree)
    before = [dataset.augmented(np.array([i]), 0, 0)[0] for i in range(12)]
    spoilt = [dataset.path(i) for i in (4, 5, 11)]
    for path in spoilt:
        Path(path).write_bytes(b"junk")
    pixels, bad = dataset.augmented(np.arange(12), 0, 0)
    assert sorted({text.split(": ")[0] for text in bad}) == sorted(spoilt)
    assert torch.equal(pixels[[0, 6]], torch.cat([before[0], before[6]]))
    assert torch.equal(pixels, dataset.augmented(np.arange(12), 0, 0)[0])
    assert pixels.isfinite().all()
    # the last one wraps around to the first
    whole = make_dataset(tree, crop_scale=[1.0, 1.0], flip_prob=0.0)
    square = whole.augmented(np.array([11, 0]), 0, 0)[0]
    assert torch.allclose(square[0], square[1])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(dataset[4], dataset[6])
    assert [text.split(": ")[1] for text in caplog.messages] == spoilt[:2]


def test_no_readable_neighbor(tree: Path) -> None:
    dataset = make_dataset(tree)
    for i in range(12):
        Path(dataset.path(i)).write_bytes(b"junk")
    with pytest.raises(DataError, match=r"12 files in a row are unreadable.*\n.*class 0.*not a JPEG"):
        dataset.augmented(np.array([3]), 0, 0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`d2v.data.path` must be a folder, but '.*nowhere' does not exist"):
        make_dataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        make_dataset(tmp_path / "file")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"must hold images \(\.jpg, .*has none\n  not data: 1 other file \("):
        make_dataset(tmp_path)


def test_only_unreadable_files(tmp_path: Path) -> None:
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"of 13 in .* 13 were tried and none can be read:\n.*bomb\.png: more than"):
        make_dataset(tmp_path)


def test_other_refusals(tree: Path) -> None:
    config = make_config(tree)
    with pytest.raises(DataError, match=r"`d2v.model.channels` must be 1 or 3, but is 4"):
        image_dataset(config.model_copy(update={"model": config.model.model_copy(update={"channels": 4})}))
    with pytest.raises(DataError, match='must be "train" for a folder of images'):
        image_dataset(config, "test")
    with pytest.raises(IndexError):
        image_dataset(config)[12]


def test_resampling_of_a_crop_by_itself(tmp_path: Path) -> None:
    """Torch's result is Pillow's of the cut image to the rounding of two passes, and differs from the other form's at
    the edge only; both forms of a reduced decoding are the same."""
    content = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(content).save(tmp_path / "a.png")
    path, box = str(tmp_path / "a.png"), (13, 7, 83, 71)
    for channels in (1, 3):
        fast, exact = (
            read_square(path, 32, channels, lambda *_: box, LIMITS, resampler=resampler).astype(int)
            for resampler in ("torch", "pillow")
        )
        with Image.open(path) as image:
            cut = image.convert("L" if channels == 1 else "RGB").crop((13, 7, 96, 78))
        alone = np.asarray(cut.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        assert fast.shape == exact.shape == alone.shape
        assert np.abs(fast - alone).max() <= 2
        assert np.abs(fast - alone).mean() < 0.1
        assert np.abs(fast - exact)[3:-3, 3:-3].max() <= 2
        assert np.abs(fast - exact).mean() < 2
    picture(400, 300).save(tmp_path / "large.jpg", quality=95)
    path, box = str(tmp_path / "large.jpg"), (11, 13, 301, 231)
    both = [read_square(path, 32, 3, lambda *_: box, LIMITS, resampler=which) for which in ("torch", "pillow")]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_has_the_bits_of_pillow(channels: int) -> None:
    def enhanced(image: Image.Image, order: float, strengths: list[float]) -> Image.Image:
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color][: 2 if channels == 1 else 3]
        steps = list(itertools.permutations(zip(enhancers, strengths, strict=False)))
        for enhancer, strength in steps[int(order * len(steps))]:
            image = enhancer(image).enhance(strength)
        return image

    generator = np.random.default_rng(channels)
    for trial in range(60):
        levels = generator.integers(0, 256, (channels, 23, 31), dtype=np.uint8)
        strengths = generator.uniform(0, 2, 3).tolist()
        strengths[trial % 3] = (strengths[trial % 3], 1.0, 0.0)[trial % 5 % 3]
        order = float(generator.random())
        image = Image.fromarray(levels[0] if channels == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0)))
        expected = np.atleast_3d(np.asarray(enhanced(image, order, strengths))).transpose(2, 0, 1)
        jitter_(levels, order, strengths)
        np.testing.assert_array_equal(levels, expected)


def test_levels_are_normalized_where_the_batch_goes(tree: Path) -> None:
    dataset = make_dataset(tree, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7], color_jitter=0.3, crop_scale=[0.3, 1.0])
    ids = np.arange(12)
    levels, scale, bad = dataset.drawn(ids, 1, 2)
    pixels, also_bad = dataset.augmented(ids, 1, 2)
    assert levels.dtype == torch.uint8
    assert bad == also_bad
    batch = Batch(levels, torch.arange(3), torch.from_numpy(ids), scale=scale)
    for moved in (batch.to("cpu"), batch.to("cpu").to("cpu")):
        assert torch.equal(moved.inputs, pixels)
        assert moved.scale is None
    mean, std = (np.array(values, np.float32)[:, None, None] * 255 for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    np.testing.assert_array_equal(pixels, (levels.numpy().astype(np.float32) - mean) / std)
    assert batch.to("meta").inputs.dtype == torch.float32
