"""Every command reports the files of a data set by ending, and those that are left out by reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from d2v_fast.commands.console import main
from d2v_fast.data.files import find_files
from d2v_fast.data.listing import Listing, counted, describe_listing, ending_of
from d2v_fast.errors import DataError
from d2v_fast.modalities.speech.audio import KINDS as AUDIO_KINDS
from d2v_fast.modalities.text.files import KINDS as TEXT_KINDS
from d2v_fast.modalities.vision import images
from d2v_fast.modalities.vision.config import VisionDataConfig
from d2v_fast.modalities.vision.images import KINDS as IMAGE_KINDS
from d2v_fast.modalities.vision.images import ImagesDataset
from d2v_fast.training.run_folder import RunFolder
from tests.helpers.runs import TINY_SPEECH, TINY_TEXT, leave_out_reports, run_here, tiny_file
from tests.helpers.text_files import sentences, small_tokenizer

sf = pytest.importorskip("soundfile")

RATE = 8000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.WAV", ".wav"),
        ("b/c.d/e.jsonl.gz", ".jsonl.gz"),
        ("a.tar.xz", ".tar.xz"),
        ("read me.gz", ".gz"),
        ("notes 1.5 of may.gz", ".gz"),
        ("README", ""),
        ("ends with a dot.", ""),
        (".hidden", ""),
    ],
)
def test_endings(name: str, ending: str) -> None:
    assert ending_of(name) == ending


def test_files_of_a_folder_are_counted_by_ending(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b/c.WAV", "b/d.flac", "x.m4a", "y.M4A", "z.wma", "t.tar.gz", "q.aac", "README", "n.txt")
    touch(tmp_path, "cover.jpg", ".DS_Store", "._a.wav", ".hidden.wav", ".notes", ".clips/a.wav")
    (tmp_path / "out").symlink_to(tmp_path.parent)
    paths, listing = find_files(str(tmp_path), str(tmp_path), AUDIO_KINDS)
    assert paths == ["a.wav", "b/c.WAV", "b/d.flac"]
    assert listing.used == {".wav": 2, ".flac": 1}
    assert listing.unread == {".m4a": 2, ".wma": 1, ".tar.gz": 1, ".aac": 1}
    assert listing.others == {".jpg": 1, ".txt": 1, "": 1}
    lines = describe_listing(listing, counted(3, "recording"))
    assert lines[0] == "3 recordings in 3 files (2 .wav, 1 .flac)"
    assert "left out: 4 files (2 .m4a, 1 .aac, 1 .wma): not read, convert them" in lines[1] + lines[2]
    assert "left out: 1 file (1 .tar.gz): not read, unpack them" in lines
    assert "left out: 2 hidden paths (the name begins with a dot): .clips, .hidden.wav" in lines
    assert "left out: 1 link to a folder outside (`d2v.data.follow_outside` would follow it): out" in lines
    assert lines[-1] == "not data: 3 other files (1 without ending, 1 .jpg, 1 .txt)"


@pytest.mark.parametrize(
    ("kinds", "used", "unread"),
    [
        (IMAGE_KINDS, ["a.jpg"], ["b.heic", "c.avif", "d.mp4", "e.zip", "f.nef", "g.jxl"]),
        (TEXT_KINDS, ["a.txt"], ["b.pdf", "c.csv", "d.html", "e.tar.gz", "f.docx"]),
        (AUDIO_KINDS, ["a.wav"], ["b.m4a", "c.amr", "d.webm", "e.zip", "f.parquet", "g.raw"]),
    ],
)
def test_files_that_may_be_taken_for_samples_are_named(tmp_path: Path, kinds, used, unread) -> None:
    touch(tmp_path, *used, *unread)
    _, listing = find_files(str(tmp_path), None, kinds)
    assert listing.others == {}
    text = "\n".join(describe_listing(listing, "samples"))
    assert all(f"1 {ending_of(name)}" in text for name in unread)
    # a folder with nothing else says the same in its error
    touch(tmp_path / "only", *unread)
    with pytest.raises(DataError, match=r"has none\n  left out: ") as caught:
        find_files(str(tmp_path / "only"), None, kinds)
    assert all(f"1 {ending_of(name)}" in str(caught.value) for name in unread)


def test_many_endings_are_not_all_named() -> None:
    listing = Listing({".wav": 1}, others={f".{i}": 20 - i for i in range(12)})
    assert describe_listing(listing, "1 recording")[1].endswith("14 .6, 13 .7, 42 more)")
    listing = Listing({".wav": 3}, bad_files=("a.wav: an empty file",))
    assert (
        describe_listing(listing, "2 recordings")[1]
        == "left out: 1 unreadable file of 3 (33 %), such as a.wav: an empty file"
    )


def test_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    touch(tmp_path, "a.wav", "b/c.wav")
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "b":
            # root, who may run the tests, may read everything
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, listing = find_files(str(tmp_path), None, AUDIO_KINDS)
    assert describe_listing(listing, "x")[1] == "left out: 1 folder that cannot be listed: b (Permission denied)"


def speech_file(tmp_path: Path) -> Path:
    """Recordings: 4 that are long enough, 3 too short, 1 without a header, 2 of another kind."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i in range(7):
        sf.write(folder / f"{i}.wav", noise(0.5 if i < 4 else 0.1, i), RATE)
    touch(folder, "a.m4a", "b.m4a")
    data = {**TINY_SPEECH["d2v"]["data"], "kind": "audio", "path": str(folder)}
    return tiny_file(tmp_path, TINY_SPEECH, train_batch_size=2, d2v__schedule={"steps": 1}, d2v__data=data)


def test_check_and_dry_run_say_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = speech_file(tmp_path)
    for status in (lambda: main(["check", str(file)]), lambda: run_here(file, "--dry-run")):
        assert status() == 0
        said = capsys.readouterr().out
        assert "data            4 recordings in 7 files (7 .wav)\n" in said
        assert "\n                left out: 2 files (2 .m4a): not read, convert them" in said
        assert "\n                left out: 3 recordings shorter than `d2v.data.min_seconds` (0.3 s)\n" in said


def test_training_says_what_is_left_out_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2v_fast.training import prepare

    def stop(*arguments: object, **options: object) -> None:
        raise DataError("stopped here")

    file = speech_file(tmp_path)
    monkeypatch.setattr(prepare, "World", stop)
    assert run_here(file) == 1
    said = capsys.readouterr().out
    assert said.startswith("data: 4 recordings in 7 files (7 .wav)\n  left out: 2 files (2 .m4a)")
    monkeypatch.setenv("RANK", "1")
    assert run_here(file) == 1
    assert capsys.readouterr().out == ""


def test_tokenize_says_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "text", "a.pdf", "b.csv")
    (tmp_path / "text/a.txt").write_text("\n\n".join(["yes", *sentences(40)]))
    (tmp_path / "tokenizer").mkdir()
    small_tokenizer().save(tmp_path / "tokenizer")
    data = {"kind": "text", "path": str(tmp_path / "text"), "tokenizer": str(tmp_path / "tokenizer")}
    data |= {"num_workers": 0, "block_size": 32, "tokens_path": str(tmp_path / "tokens"), "documents": "paragraph"}
    file = tiny_file(tmp_path, TINY_TEXT, train_batch_size=2, d2v__data={**data, "min_tokens": 4})

    def said() -> str:
        return capsys.readouterr().out

    assert main(["tokenize", str(file)]) == 0
    assert said().startswith("data: text in 1 file (1 .txt)\n  left out: 2 files (1 .csv, 1 .pdf): not read")
    assert main(["check", str(file)]) == 0
    assert "left out: 1 document shorter than `d2v.data.min_tokens` (4)" in said()
    source, to = str(tmp_path / "text"), str(tmp_path / "new")
    assert main(["tokenize", "--train", source, "--vocab-size", "300", "--to", to]) == 0
    assert said().startswith("data: text in 1 file (1 .txt)\n  left out: 2 files (1 .csv, 1 .pdf): not read")


def test_embed_and_draw_say_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2v_fast.commands.draw import draw
    from tests.helpers.written_runs import CONFIG, write_run

    write_run(tmp_path / "r", CONFIG, 1)
    touch(tmp_path / "images", "a.heic", "b.heic")
    for i in range(2):
        Image.fromarray(np.full((20, 20), 50 * i, np.uint8)).save(tmp_path / f"images/{i}.png")
    to = str(tmp_path / "a.npy")
    assert main(["embed", str(tmp_path / "r"), str(tmp_path / "images"), "--to", to, "--device", "cpu"]) == 0
    line = "images in 2 files (2 .png)\n  left out: 2 files (2 .heic): not read, convert them to PNG or JPEG\n"
    assert capsys.readouterr().out.startswith(f"data: {line}")
    draw(tmp_path / "r", data=tmp_path / "images", count=2)
    said = capsys.readouterr()
    # the path is the only line on the standard output
    assert said.err == f"data: 2 {line}"


def test_check_judges_unreadable_headers_as_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 of 150 files are less than 10 % and do not stop a run; of 12 in 100, `check` says what `train` says."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    sf.write(folder / "0.wav", noise(0.4), RATE)
    for i in range(1, 88):
        (folder / f"{i}.wav").hardlink_to(folder / "0.wav")
    for i in range(12):
        (folder / f"bad{i}.wav").write_bytes(b"")
    data = {**TINY_SPEECH["d2v"]["data"], "kind": "audio", "path": str(folder), "max_bad_fraction": 0.1}
    schedule = {"steps": 1, "warmup_steps": 0}
    file = tiny_file(tmp_path, TINY_SPEECH, train_batch_size=2, d2v__schedule=schedule, d2v__data=data)
    refusals = []
    for command in (lambda: main(["check", str(file)]), lambda: run_here(file, "--dry-run"), lambda: run_here(file)):
        assert command() == 1
        refusals.append(capsys.readouterr().err)
    assert refusals[0].startswith("error: 12 of 100 recordings are unreadable, and `d2v.data.max_bad_fraction` is 0.1")
    assert refusals[0] == refusals[1] == refusals[2]
    assert not (tmp_path / "runs").exists()
    for i in range(88, 138):
        (folder / f"{i}.wav").hardlink_to(folder / "0.wav")
    assert main(["check", str(file)]) == 0
    assert "left out: 12 unreadable files of 150 (8 %), such as " in capsys.readouterr().out
    leave_out_reports(monkeypatch.setattr)
    assert run_here(file, "--run", "r") == 0
    assert len(RunFolder(tmp_path / "runs/r").lines("bad_files.txt")) == 12


def test_small_and_unreadable_images_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        side = 8 if i < 3 else 40
        Image.fromarray(np.full((side, side), 10 * i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "99.png").write_bytes(b"junk")
    model = SimpleNamespace(channels=3, image_size=32)
    data = VisionDataConfig(kind="images", path=str(tmp_path), min_image_side=32)
    small, unreadable = ImagesDataset(data, model).listing.left_out
    assert small.count == 3
    assert small.what == unreadable.what == "image"
    by_another = "training replaces it by another"
    assert small.why == f"smaller than `d2v.data.min_image_side` (32), such as 00.png; {by_another}"
    assert unreadable.count == 1
    assert unreadable.why == f"unreadable, such as 99.png; {by_another}"
    # of many, a spread of them
    monkeypatch.setattr(images, "NUM_HEADERS", 5)
    small, unreadable = ImagesDataset(data, model).listing.left_out
    assert (small.count, unreadable.count) == (1, 1)
    assert small.why.startswith("smaller than `d2v.data.min_image_side` (32) (of 5 whose headers were read), such as")
