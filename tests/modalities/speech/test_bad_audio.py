"""Test damaged and hostile recordings: each is reported with a reason and replaced, without stopping the run, taking
long or using much memory."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_fast.data.files import tried_in_order
from d2v_fast.errors import DataError
from d2v_fast.masking.streams import AUGMENT, stream_keys, uniforms
from d2v_fast.modalities.speech import audio as audio_module
from d2v_fast.modalities.speech.audio import AudioDataset, normalized
from d2v_fast.modalities.speech.decode import AudioLimits, UnreadableAudio, read_header, read_part, read_whole
from tests.helpers.audio_files import RATE, make_dataset, tone, write_manifest

sf = pytest.importorskip("soundfile")

LENGTH = 24_000
MAX_BYTES = 10_000_000
LIMITS = AudioLimits(sample_rate=RATE, max_bytes=MAX_BYTES, silence=1e-4)
NOISE = (0.2 * np.random.default_rng(0).standard_normal(LENGTH)).astype(np.float32)


def encoded(format: str, samples: np.ndarray = NOISE, **options: str) -> bytes:
    stream = io.BytesIO()
    sf.write(stream, samples, RATE, format=format, **options)
    return stream.getvalue()


def wav(samples: np.ndarray, **header: int) -> bytes:
    """Return a float WAV file with the given header fields."""
    data = samples.astype("<f4").tobytes()
    fields = {"tag": 3, "channels": 1, "rate": RATE, "size": len(data)} | header
    block = 4 * fields["channels"]
    form = struct.pack(
        "<HHIIHH",
        fields["tag"],
        fields["channels"],
        fields["rate"],
        fields["rate"] * block % 2**32,
        block % 2**16,
        32,
    )
    content = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", fields["size"]) + data
    return b"RIFF" + struct.pack("<I", len(content)) + content


def flac_that_promises(num_samples: int) -> bytes:
    content = bytearray(encoded("FLAC"))
    # 36 bits of the stream information block
    content[21] = content[21] & 0xF0 | num_samples >> 32
    content[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


def changed(content: bytes, position: float) -> bytes:
    """Return the content with one byte changed."""
    index = int(position * len(content))
    return content[:index] + bytes([content[index] ^ 0xFF]) + content[index + 1 :]


def with_one_bad_sample(value: float) -> np.ndarray:
    return np.where(np.arange(LENGTH) == LENGTH // 2, np.float32(value), NOISE)


NOT_AUDIO = "not a file of a kind that is read"
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty.wav": (b"", "an empty file"),
    "ten_zeros.wav": (bytes(10), NOT_AUDIO),
    "four_bytes.wav": (b"RIFF", NOT_AUDIO),
    "text.wav": (b"These are words.\n" * 100, NOT_AUDIO),
    "page.mp3": (b"<!DOCTYPE html><html><body>404</body></html>", NOT_AUDIO),
    "picture.flac": (b"\x89PNG\r\n\x1a\n" + bytes(1000), NOT_AUDIO),
    "film.wav": (b"RIFF\x00\x10\x00\x00AVI LIST" + bytes(1000), NOT_AUDIO),
    "rare_format.wav": (encoded("VOC"), NOT_AUDIO),
    "header.wav": (wav(NOISE)[:44], "cut: 0 of 96,000 bytes of samples are there"),
    "no_samples.wav": (wav(NOISE[:0]), "holds no samples"),
    "half.wav": (wav(NOISE)[:50_000], "cut: 49,956 of 96,000 bytes"),
    "four_gigabytes.wav": (wav(NOISE, size=0xF0000000), "cut: 96,000 of 4,026,531,840 bytes"),
    "rate_zero.wav": (wav(NOISE, rate=0), "cannot be decoded: .|a rate of 0 Hz"),
    "rate_one.wav": (wav(NOISE, rate=1), "a rate of 1 Hz"),
    "rate_huge.wav": (wav(NOISE, rate=2_000_000_000), "a rate of 2,000,000,000 Hz"),
    "no_channels.wav": (wav(NOISE, channels=0), "cannot be decoded: .|0 channels"),
    "many_channels.wav": (wav(NOISE, channels=1000), "cannot be decoded: .|1000 channels"),
    "unknown_codec.wav": (wav(NOISE, tag=0x4242), "cannot be decoded: ."),
    "half.flac": (encoded("FLAC")[:20_000], "cannot be decoded|ends after"),
    "flipped.flac": (changed(encoded("FLAC"), 0.7), "cannot be decoded|ends after"),
    "header.flac": (encoded("FLAC")[:40], "cannot be decoded"),
    "long.flac": (flac_that_promises(2**36 - 1), "its header promises 68,719,476,735 samples, and it has"),
    "header.ogg": (encoded("OGG", subtype="VORBIS")[:200], "cannot be decoded"),
    "garbage.ogg": (b"OggS" + np.random.default_rng(1).bytes(5000), "cannot be decoded"),
    "header.mp3": (b"ID3\x04\0\0\0\0\0\0" + bytes(2000), "no MP3 frame was found"),
    "half.mp3": (encoded("MP3")[:4000] if "MP3" in sf.available_formats() else b"\xff\xfb", "cut: 2"),
    "nan.wav": (wav(with_one_bad_sample(np.nan)), "samples that are not finite"),
    "infinite.wav": (wav(with_one_bad_sample(-np.inf)), "samples that are not finite"),
    "huge.wav": (wav(with_one_bad_sample(1e30)), r"samples of up to 1e\+30 times full scale"),
    "silent.wav": (wav(np.zeros(LENGTH)), "silent: no sample above 0.0001 of full scale"),
    "nearly_silent.flac": (encoded("FLAC", np.sign(NOISE) * 5e-5), "silent: no sample above 0.0001 of full scale"),
    "constant.wav": (wav(np.full(LENGTH, 0.5)), "silent"),
}


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_outside(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere.wav"
    elsewhere.write_bytes(wav(NOISE))
    path.symlink_to(elsewhere)


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe.wav": (make_pipe, "not a regular file"),
    "dead.wav": (make_dead_link, "a link to a file that does not exist"),
    "device.wav": (make_link_to_a_device, "a link out of the folder, to /dev/zero"),
    "link.wav": (
        make_link_outside,
        r"a link out of the folder, to .*elsewhere.wav \(allow it with `d2v.data.follow_outside`\)",
    ),
    "circle.wav": (make_link_to_itself, "a link to a file that does not exist"),
    "large.wav": (make_large, "10,000,001 bytes are more than 10,000,000"),
}
REASONS = {name: reason for name, (_, reason) in [*CONTENTS.items(), *OTHERS.items()]}


def make_bad(folder: Path, name: str) -> None:
    if name in CONTENTS:
        (folder / name).write_bytes(CONTENTS[name][0])
    else:
        OTHERS[name][0](folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write four good recordings, two that sort before any bad one and two that sort after it."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i, name in enumerate(("0.wav", "1.wav", "y.flac", "z.wav")):
        sf.write(folder / name, tone(LENGTH / RATE, 300 + 100 * i), RATE)
    return folder


def as_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AudioDataset:
    """Return a data set that notices no bad file before it reads one, because it checks only the first header."""
    monkeypatch.setattr(audio_module, "NUM_CHECKED", 1)
    names = sorted(entry.name for entry in folder.iterdir())
    file = write_manifest(folder.parent / "a.tsv", folder, names, [LENGTH] * len(names))
    return make_dataset(file, max_file_bytes=MAX_BYTES)


@pytest.mark.parametrize("name", REASONS)
def test_in_a_folder(folder: Path, name: str) -> None:
    make_bad(folder, name)
    dataset = make_dataset(folder, max_file_bytes=MAX_BYTES)
    ids = np.arange(len(dataset))
    waves, bad = dataset.read(ids, dataset.lengths, 0, 0)
    # skipped because of its header, or replaced when it is read
    assert len(dataset) == 5 - len(dataset.listing.bad_files)
    [line] = {*dataset.listing.bad_files, *bad}
    found, _, reason = line.partition(": ")
    assert found == str(folder / name)
    assert re.search(REASONS[name], reason), reason
    assert line.isprintable()
    assert waves.isfinite().all()
    assert (waves.var(dim=1, correction=0) - 1).abs().max() < 0.01


@pytest.mark.parametrize("name", REASONS)
def test_in_a_manifest(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bad(folder, name)
    dataset = as_manifest(folder, monkeypatch)
    assert len(dataset) == 5
    start = time.perf_counter()
    tracemalloc.start()
    waves, bad = dataset.read(np.arange(5), dataset.lengths, 0, 0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # pipes and endless files do not block, and no header causes a large allocation
    assert time.perf_counter() - start < 5
    assert most < 20e6
    [line] = bad
    assert re.search(f"^{re.escape(str(folder / name))}: ({REASONS[name]})", line), line
    # the next one replaces it, and the others are unchanged
    assert torch.equal(waves[2], waves[3])
    assert len({wave.numpy().tobytes() for wave in waves}) == 4
    again, bad_again = dataset.read(np.array([2]), dataset.lengths[[2]], 0, 0)
    assert torch.equal(again[0], waves[2])
    assert bad_again == bad
    with pytest.raises(DataError, match=f"{name}: "):
        dataset.whole(2)


def test_all_at_once(folder: Path) -> None:
    for name in REASONS:
        make_bad(folder, name)
    dataset = make_dataset(folder, max_file_bytes=MAX_BYTES)
    assert len(dataset) + len(dataset.listing.bad_files) == len(REASONS) + 4
    _, bad = dataset.read(np.arange(len(dataset)), dataset.lengths, 0, 0)
    assert len({*bad, *dataset.listing.bad_files}) == len(REASONS)


def test_no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.wav").write_bytes(wav(NOISE))
    dataset = make_dataset(folder)
    system_open = os.open

    def refuse(path: str, *options: int) -> int:
        if os.path.basename(path) == "a.wav":
            # root can read every file
            raise PermissionError(13, "Permission denied", path)
        return system_open(path, *options)

    monkeypatch.setattr(os, "open", refuse)
    _, bad = dataset.read(np.arange(5), dataset.lengths, 0, 0)
    assert bad == (f"{folder}/a.wav: cannot be opened: Permission denied",)


def test_files_that_vanish_or_turn_into_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcd":
        (folder / f"{name}.wav").write_bytes(wav(NOISE))
    dataset = make_dataset(folder)
    for name in "abcd":
        (folder / f"{name}.wav").unlink()
    (folder / "b.wav").mkdir()
    os.mkfifo(folder / "c.wav")
    (folder / "d.wav").write_bytes(wav(NOISE[:10_000]))
    _, bad = dataset.read(np.arange(2, 6), dataset.lengths[2:6], 0, 0)
    # once for itself, and once for each recording that it was tried for
    assert dict(line.split(": ", 1) for line in bad) == {
        f"{folder}/a.wav": "cannot be opened: No such file or directory",
        f"{folder}/b.wav": "not a regular file, but a folder",
        f"{folder}/c.wav": "not a regular file, but a pipe",
        f"{folder}/d.wav": "shorter than expected: 10,000 samples instead of 24,000",
    }


def test_links_are_followed_where_that_is_wanted(folder: Path) -> None:
    make_link_outside(folder / "link.wav")
    (folder / "inside.wav").symlink_to(folder / "0.wav")
    assert len(make_dataset(folder)) == 5
    dataset = make_dataset(folder, follow_outside=True)
    assert len(dataset) == 6
    assert dataset.listing.bad_files == ()


def test_names_are_printable(folder: Path) -> None:
    (folder / "red \x1b[31m\n.wav").write_bytes(b"junk")
    [line] = make_dataset(folder).listing.bad_files
    assert line.startswith(f"{folder}/red \\x1b[31m\\n.wav: {NOT_AUDIO}")


def test_longest_one_is_replaced_by_a_shorter_one_repeated(folder: Path) -> None:
    (folder / "a.wav").write_bytes(wav(np.concatenate([NOISE, with_one_bad_sample(np.nan)])))
    dataset = make_dataset(folder, max_seconds=9)
    waves, bad = dataset.read(np.array([2]), np.array([48_000]), 0, 0)
    assert bad == (f"{folder}/a.wav: samples that are not finite",)
    assert torch.equal(waves[0, :LENGTH], waves[0, LENGTH:])
    # a part without such samples is good
    parts = [dataset.read(np.array([2]), np.array([9000]), 0, epoch)[1] for epoch in range(20)]
    assert {len(bad) for bad in parts} == {0, 1}


def test_nothing_readable(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.wav").write_bytes(b"junk")
    with pytest.raises(DataError, match=rf"none of the 20 in '{folder}' can be read:\n  {folder}/00.wav: not a file"):
        make_dataset(folder)
    for i in range(20):
        (folder / f"{i:02d}.wav").write_bytes(wav(np.zeros(LENGTH)))
    with pytest.raises(DataError, match=r"16 were tried and none can be read:\n.*silent"):
        make_dataset(folder)
    file = write_manifest(tmp_path / "a.tsv", folder, ["00.wav", "gone.wav"], [LENGTH] * 2)
    with pytest.raises(DataError, match=r"2 were tried and none can be read:(.|\n)*gone.wav: cannot be opened"):
        make_dataset(file)


def test_many_in_a_row(folder: Path) -> None:
    """Many adjacent bad files do not stop a run if others can replace them; too many do."""
    (folder / "a000.wav").write_bytes(wav(np.zeros(LENGTH)))
    for i in range(1, 300):
        (folder / f"a{i:03d}.wav").hardlink_to(folder / "a000.wav")
    dataset = make_dataset(folder)
    good, num = {0, 1, 302, 303}, len(dataset)
    alone = next(i for i in range(2, 302) if not good & {(i + distance) % num for distance in tried_in_order(num)})
    with pytest.raises(DataError, match=r"^64 files that were tried one after the other are unreadable"):
        dataset.read(np.array([alone]), np.array([LENGTH]), 0, 0)
    for i in range(200):
        sf.write(folder / f"z{i:03d}.wav", tone(LENGTH / RATE), RATE)
    waves, bad = make_dataset(folder).read(np.array([2]), np.array([LENGTH]), 0, 0)
    assert 32 <= len(bad) < 64
    assert waves.isfinite().all()
    assert len(make_dataset(folder).read(np.array([280]), np.array([LENGTH]), 0, 0)[1]) == 22


def test_silence_is_a_key(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a.wav").write_bytes(wav(NOISE / 100))
    (folder / "b.wav").write_bytes(wav(np.zeros(LENGTH)))
    for silence, count in ((0.0, 1), (1e-4, 1), (0.02, 2)):
        with caplog.at_level(logging.ERROR):
            dataset = make_dataset(folder, silence=silence)
        assert len(set(dataset.read(np.arange(6), dataset.lengths, 0, 0)[1])) == count


def test_piped_wav_has_no_length_in_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(NOISE, size=0xFFFFFFFF))
    assert read_header(str(tmp_path / "a.wav"), LIMITS).num_samples == LENGTH
    np.testing.assert_array_equal(read_whole(str(tmp_path / "a.wav"), LIMITS), NOISE)


def test_of_ten_hours_only_a_part_is_read(folder: Path) -> None:
    length = 10 * 3600 * RATE
    place = uniforms(stream_keys(0, AUGMENT, 0, np.array([2])), 1).item()
    start = int(place * (length - LENGTH + 1))
    content = wav(NOISE, size=4 * length)
    with (folder / "a.wav").open("wb") as file:
        file.write(content[:44])
        file.seek(44 + 4 * start)
        file.write(content[44:])
        file.truncate(44 + 4 * length)
    dataset = make_dataset(folder)
    assert dataset.lengths[2] == 2 * RATE
    began = time.process_time()
    waves, bad = dataset.read(np.array([2]), np.array([LENGTH]), 0, 0)
    assert time.process_time() - began < 1
    assert bad == ()
    assert torch.equal(waves[0], normalized(NOISE))
    with pytest.raises(DataError, match="576,000,000 samples are more than 268,435,456"):
        dataset.whole(2)


@pytest.mark.parametrize("num_samples", [1, 399])
def test_less_than_a_frame_is_left_out(folder: Path, num_samples: int) -> None:
    (folder / "a.wav").write_bytes(wav(NOISE[:num_samples]))
    dataset = make_dataset(folder, min_seconds=1e-6)
    assert len(dataset) == 4
    assert dataset.listing.bad_files == ()


def test_damaged_files_never_escape(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kinds = [("WAV", {}), ("FLAC", {}), ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"}), ("MP3", {})]
    sources = [encoded(kind, NOISE[:6000], **options) for kind, options in kinds if kind in sf.available_formats()]
    outcomes = []
    path = tmp_path / "damaged.wav"
    for trial in range(400):
        content = np.frombuffer(sources[trial % len(sources)], dtype=np.uint8).copy()
        # half of the positions are in the header
        end = len(content) if trial % 2 else 100
        content[generator.integers(0, end, 3)] = generator.integers(0, 256, 3)
        path.write_bytes(content[: generator.integers(1, 2 * len(content))].tobytes())
        try:
            samples = read_part(str(path), 3000, generator.random(), LIMITS)
            outcomes.append(samples.shape == (3000,) and bool(np.isfinite(samples).all()))
        except UnreadableAudio as error:
            outcomes.append(str(error) != "")
    assert all(outcomes)
    assert len(outcomes) == 400
