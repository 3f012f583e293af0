"""Hostile image files are refused with a reason, never decoded beyond the limits, and never stop a run."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v_fast.errors import DataError
from d2v_fast.modalities.vision.decode import MAX_SCANS, Limits, UnreadableImage, center_box, read_square
from d2v_fast.modalities.vision.images import ImagesDataset
from tests.helpers.image_datasets import LIMITS, encoded, make_dataset, picture, png_header
from tests.helpers.runs import run_forked, tiny_file


def reason(path: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_square(str(path), 16, 3, center_box, limits)
    return str(caught.value)


def repeated_scans(count: int) -> bytes:
    """Return a progressive JPEG with `count` copies of its last scan, a few bytes that cover all pixels."""
    content = encoded(Image.new("L", (64, 64), 90), "JPEG", progressive=True)
    body = content.removesuffix(b"\xff\xd9")
    return body + body[body.rindex(b"\xff\xda") :] * count + b"\xff\xd9"


def zip_bomb(size: int) -> bytes:
    """Return a PNG of 64 x 64 pixels whose data inflate to `size` bytes, about a thousandfold."""
    content = png_header(64, 64)
    data = zlib.compress(bytes(size), 9)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    return content[:33] + chunk + content[-12:]


def make_hostile(folder: Path, elsewhere: Path) -> dict[str, str]:
    """Fill a folder with files that must be refused, and return the expected reason by file name."""
    photo = encoded(picture(200, 200), "JPEG")
    contents = {
        "cut.jpg": (photo[:2000], "OSError: .*truncated"),
        "bomb.png": (png_header(20_000, 20_000), "more than 64,000,000 pixels"),
        "dot.png": (encoded(picture(1, 1), "PNG"), "1x1 is smaller than 2 pixels"),
        "page.jpg": (b"<!DOCTYPE html><html></html>", "not a JPEG, PNG, WebP, TIFF, BMP or GIF image"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a JPEG, PNG, WebP, TIFF, BMP or GIF image"),
        "scans.jpg": (repeated_scans(MAX_SCANS + 1), f"more than {MAX_SCANS} scans"),
        "red \x1b[31m\n.jpg": (b"", "an empty file"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    with (folder / "large.jpg").open("wb") as sparse:
        sparse.truncate(LIMITS.max_bytes + 1)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "dead.jpg").symlink_to("nowhere")
    elsewhere.mkdir()
    (elsewhere / "private.jpg").write_bytes(photo)
    (folder / "link.jpg").symlink_to(elsewhere / "private.jpg")
    (folder / "linked.jpg").symlink_to(elsewhere)
    reasons = {name: text for name, (_, text) in contents.items()}
    return reasons | {
        "large.jpg": "256,000,001 bytes are more than 256,000,000",
        "pipe.jpg": "not a regular file, but a pipe",
        "zero.jpg": "a link out of the folder, to /dev/zero",
        "dead.jpg": "a link to a file that does not exist",
        "link.jpg": "a link out of the folder, to .*private.jpg .allow it with `d2v.data.follow_outside`",
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Twelve images, three of them in a folder named like an image file."""
    folder = tmp_path / "images"
    (folder / "folder.jpg").mkdir(parents=True)
    for i in range(12):
        place = folder / "folder.jpg" if i < 3 else folder
        picture(30 + i, 41 - i, seed=i).save(place / f"{i:02d}.jpg")
    return folder


def test_each_is_named_and_replaced(tree: Path, tmp_path: Path) -> None:
    reasons = make_hostile(tree, tmp_path / "elsewhere")
    dataset = make_dataset(tree)
    assert len(dataset) == 12 + len(reasons)
    left_out, *small, unreadable = dataset.listing.left_out
    assert unreadable.count + sum(entry.count for entry in small) <= len(reasons)
    assert left_out.count == 1
    assert left_out.why == "to a folder outside (`d2v.data.follow_outside` would follow it): linked.jpg"
    assert unreadable.what == "image"
    assert unreadable.why.startswith("unreadable, such as ")
    start = time.perf_counter()
    pixels, bad = dataset.augmented(np.arange(len(dataset)), 0, 0)
    # the pipe, the endless file and the many scans cost no time
    assert time.perf_counter() - start < 10
    assert pixels.isfinite().all()
    found = dict.fromkeys(bad)
    assert len(found) == len(reasons)
    for name, text in reasons.items():
        printed = name.replace("\x1b", "\\x1b").replace("\n", "\\n")
        [line] = [line for line in found if line.startswith(f"{tree}/{printed}: ")]
        assert re.search(text, line), line
        assert line.isprintable()


def test_links_stay_inside(tree: Path, tmp_path: Path) -> None:
    make_hostile(tree, tmp_path / "elsewhere")
    (tree / "inside.jpg").symlink_to(tree / "05.jpg")
    inside = Limits(**{**vars(LIMITS), "root": str(tree)})
    assert read_square(str(tree / "inside.jpg"), 16, 3, center_box, inside).shape == (16, 16, 3)
    assert "a link out of the folder" in reason(tree / "link.jpg", inside)
    # a folder whose name starts with the root's name is outside
    sibling = tmp_path / "images of others"
    sibling.mkdir()
    (sibling / "a.jpg").write_bytes((tree / "05.jpg").read_bytes())
    (tree / "sibling.jpg").symlink_to(sibling / "a.jpg")
    assert "a link out of the folder" in reason(tree / "sibling.jpg", inside)
    assert "a link out of the folder" in reason(tree / "../images of others/a.jpg", inside)
    names = {os.path.basename(path) for path in paths(make_dataset(tree, follow_outside=True))}
    assert {"private.jpg", "link.jpg"} <= names
    assert read_square(str(tree / "link.jpg"), 16, 3, center_box, LIMITS).shape == (16, 16, 3)
    assert reason(tree / "zero.jpg") == "not a regular file, but a device"


def paths(dataset: ImagesDataset) -> list[str]:
    return [dataset.path(i) for i in range(len(dataset))]


def test_the_root_may_be_a_link(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "short").symlink_to(tree)
    dataset = make_dataset(tmp_path / "short")
    assert dataset.augmented(np.arange(12), 0, 0)[1] == ()


def test_only_links_to_elsewhere(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.jpg").symlink_to(tree / "05.jpg")
    with pytest.raises(DataError, match=r"none can be read:\n.*allow it with `d2v\.data\.follow_outside`"):
        make_dataset(folder)
    (folder / "a.jpg").unlink()
    (folder / "all").symlink_to(tree)
    with pytest.raises(DataError, match="left out: 1 link to a folder outside"):
        make_dataset(folder)
    assert len(make_dataset(folder, follow_outside=True)) == 12


def test_file_that_vanishes_or_turns_into_another(tree: Path, tmp_path: Path) -> None:
    dataset = make_dataset(tree)
    listed = [Path(path) for path in paths(dataset)]
    (tmp_path / "private.jpg").write_bytes(listed[4].read_bytes())
    for path in listed[1:5]:
        path.unlink()
    listed[2].mkdir()
    os.mkfifo(listed[3])
    listed[4].symlink_to(tmp_path / "private.jpg")
    _, bad = dataset.augmented(np.array([1, 2, 3, 4]), 0, 0)
    reasons = {line.split(": ", 2)[0]: line.split(": ", 2)[1] for line in bad}
    assert [reasons[str(path)][:18] for path in listed[1:5]] == [
        "FileNotFoundError",
        "not a regular file",
        "not a regular file",
        "a link out of the ",
    ]


def test_limits_are_keys(tree: Path) -> None:
    small = {"max_image_pixels": 36 * 35, "min_image_side": 32, "max_image_bytes": 100_000}
    with (tree / "10.jpg").open("ab") as file:
        file.truncate(100_001)
    _, bad = make_dataset(tree, **small).augmented(np.arange(12), 0, 0)
    told = {os.path.basename(line.split(": ")[0]): line.split(": ")[1] for line in bad}
    assert told == {
        "00.jpg": "30x41 is smaller than 32 pixels",
        "01.jpg": "31x40 is smaller than 32 pixels",
        "10.jpg": "100,001 bytes are more than 100,000",
        "11.jpg": "41x30 is smaller than 32 pixels",
    }
    few = make_dataset(tree, max_image_pixels=36 * 35 - 1)
    assert "36x35 is more than 1,259 pixels" in "".join(few.augmented(np.arange(12), 0, 0)[1])


def test_scans_are_counted_in_the_image_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(repeated_scans(MAX_SCANS - 20))
    assert read_square(str(path), 16, 3, center_box, LIMITS).shape == (16, 16, 3)
    # a phone's video after the photograph, and a comment before its data
    film = b"\xff\xda\x00\x02" * (MAX_SCANS + 50)
    path.write_bytes(encoded(picture(), "JPEG", comment=film) + film)
    assert read_square(str(path), 16, 3, center_box, LIMITS).shape == (16, 16, 3)
    # bytes that a decoder skips between two scans do not hide a scan
    for hidden in (b"\xff\x01", b"\xff\xff\xff\x01", b"junk", b"\xff\xd0"):
        content = repeated_scans(MAX_SCANS + 1)
        place = content.rindex(b"\xff\xda", 0, len(content) // 2)
        path.write_bytes(content[:place] + hidden + content[place:])
        assert reason(path) == f"more than {MAX_SCANS} scans", hidden


def test_data_that_never_end_are_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(zip_bomb(500_000_000))
    assert path.stat().st_size < 600_000
    start = time.process_time()
    assert read_square(str(path), 16, 3, center_box, LIMITS).shape == (16, 16, 3)
    assert time.process_time() - start < 0.5


def test_webp_header_that_asks_for_gigabytes(tmp_path: Path) -> None:
    content = bytearray(encoded(picture().convert("RGBA"), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    assert content[12:16] == b"VP8X"
    content[24:30] = b"\xfe\x3f\0\xfe\x3f\0"
    (tmp_path / "a.webp").write_bytes(content)
    assert reason(tmp_path / "a.webp") != ""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_run_among_hostile_files(tree: Path, tmp_path: Path, num_workers: int) -> None:
    reasons = make_hostile(tree, tmp_path / "elsewhere")
    config = tiny_file(
        tmp_path,
        train_batch_size=8,
        d2v__data__kind="images",
        d2v__data__path=str(tree),
        d2v__data__num_workers=num_workers,
        d2v__data__max_bad_fraction=1.0,
        d2v__schedule={"steps": 9},
    )
    output = tmp_path / "output"
    # without pytest's handlers, warnings go where they go in a user's process
    quiet = logging.getLogger().handlers.clear
    assert run_forked("--ds_config", config, "--run", "a", output=output, before=quiet) == [0], output.read_text()
    lines = [json.loads(line) for line in (tmp_path / "runs" / "a" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 9
    text = output.read_text()
    # after three epochs each file was met, and logged once with a number
    for name in reasons:
        assert text.count(name.replace("\x1b", "\\x1b").replace("\n", "\\n") + ": ") == 1, name
    assert f"skipped unreadable image number {len(reasons)}: " in text
    assert "\x1b[31m" not in text
