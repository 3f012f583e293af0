"""Test the audio data set: the choice of parts, resampling, mixing, normalization, folders and manifests."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from d2v_fast.data.listing import LeftOut
from d2v_fast.errors import DataError
from d2v_fast.masking.streams import AUGMENT, stream_keys, uniforms
from d2v_fast.modalities.speech import audio as audio_module
from d2v_fast.modalities.speech import decode as audio_decode
from d2v_fast.modalities.speech.decode import AudioLimits, read_part, read_whole
from tests.helpers.audio_files import RATE, make_dataset, tone, write_manifest

sf = pytest.importorskip("soundfile")

LIMITS = AudioLimits(sample_rate=RATE, max_bytes=10**9, silence=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty recordings of 1 to 2.9 s."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for i in range(20):
        sf.write(folder / f"{i:02d}.wav", tone(1 + i / 10, 200 + 20 * i), RATE, subtype="FLOAT")
    return folder


def test_a_random_part_of_a_ramp(tmp_path: Path) -> None:
    ramp = (np.arange(3 * RATE) / (3 * RATE) - 0.5).astype(np.float32)
    sf.write(tmp_path / "ramp.wav", ramp, RATE, subtype="FLOAT")
    dataset = make_dataset(tmp_path)
    # at most two of the three seconds are used
    assert dataset.lengths.tolist() == [2 * RATE]
    starts = []
    for epoch in range(20):
        waves, bad = dataset.read(np.array([0]), np.array([RATE]), 3, epoch)
        assert bad == ()
        assert waves.dtype == torch.float32
        place = uniforms(stream_keys(3, AUGMENT, epoch, np.array([0])), 1).item()
        starts.append(int(place * (2 * RATE + 1)))
        part = torch.from_numpy(ramp[starts[-1] : starts[-1] + RATE])
        assert torch.equal(waves[0], F.layer_norm(part, part.shape, eps=1e-5))
        assert abs(waves.mean()) < 1e-5
    # parts start anywhere in the recording, also after the first two seconds
    assert min(starts) < 0.25 * RATE
    assert max(starts) > 1.75 * RATE


def test_lengths_and_padding(folder: Path) -> None:
    dataset = make_dataset(folder, min_seconds=1.25)
    assert len(dataset) == 17
    assert dataset.path(0) == str(folder / "03.wav")
    assert dataset.lengths.tolist() == [min(round((1.3 + i / 10) * RATE), 2 * RATE) for i in range(17)]
    ids, sizes = np.array([4, 0, 16]), np.array([9000, 20_000, 300])
    waves, _ = dataset.read(ids, sizes, 0, 0)
    assert waves.shape == (3, 20_000)
    for wave, size in zip(waves, sizes.tolist(), strict=True):
        assert (wave[size:] == 0).all()
        assert wave[:size].mean().abs() < 1e-5
        assert (wave[:size].var(correction=0) - 1).abs() < 1e-3
    assert dataset.read(ids[:0], sizes[:0], 0, 0)[0].shape == (0, 0)
    for wrong in (0, 2 * RATE + 1):
        with pytest.raises(ValueError, match=r"`sizes` must be in \[1, `lengths"):
            dataset.read(np.array([16]), np.array([wrong]), 0, 0)


def test_a_sample_depends_on_nothing_else(folder: Path) -> None:
    dataset = make_dataset(folder)
    ids = np.arange(20)
    sizes = dataset.lengths - 3000
    together, _ = dataset.read(ids, sizes, 7, 2)
    for i in (0, 9, 19):
        alone, _ = make_dataset(folder).read(ids[[i]], sizes[[i]], 7, 2)
        assert torch.equal(alone[0], together[i, : sizes[i]])
    for seed, epoch in ((8, 2), (7, 3)):
        assert not torch.equal(dataset.read(ids, sizes, seed, epoch)[0], together)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("b.wav", {"subtype": "PCM_24"}, 1e-6),
        ("c.wav", {"subtype": "PCM_U8"}, 1e-2),
        ("d.wav", {"subtype": "DOUBLE"}, 1e-7),
        ("e.wav", {"format": "RF64"}, 1e-4),
        ("f.WAV", {"format": "WAVEX", "subtype": "ULAW"}, 1e-2),
        ("g.flac", {"subtype": "PCM_16"}, 1e-4),
        ("h.flac", {"subtype": "PCM_24"}, 1e-6),
        ("i.ogg", {"subtype": "VORBIS"}, 3e-2),
        ("j.ogg", {"subtype": "OPUS"}, 3e-2),
        ("k.mp3", {}, 3e-2),
        # the file's extension does not matter
        ("l.mp3", {"format": "FLAC"}, 1e-4),
    ],
)
def test_every_format(tmp_path: Path, name: str, options: dict[str, str], error: float) -> None:
    if name == "k.mp3" and "MP3" not in sf.available_formats():
        pytest.skip("libsndfile before 1.1")
    samples = tone(3)
    sf.write(tmp_path / name, samples, RATE, **options)
    dataset = make_dataset(tmp_path)
    assert dataset.lengths.tolist() == [2 * RATE]
    whole = read_whole(dataset.path(0), LIMITS)
    assert whole.shape == (3 * RATE,)
    # codecs distort the beginning
    assert np.abs(whole - samples)[RATE // 4 : -RATE // 4].max() < error
    part = read_part(dataset.path(0), RATE, 0.3, LIMITS)
    start = int(0.3 * (2 * RATE + 1))
    # MP3 and Opus start to decode a little earlier, with nearly the same result
    assert np.abs(part - whole[start : start + RATE]).max() < 1e-4


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 44_101])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    sf.write(tmp_path / "a.wav", tone(3, 1000, rate), rate, subtype="FLOAT")
    dataset = make_dataset(tmp_path, max_seconds=20)
    assert dataset.lengths.tolist() == [3 * RATE]
    whole = read_whole(dataset.path(0), LIMITS)
    assert whole.shape == (3 * RATE,)
    expected = tone(3, 1000)
    assert np.abs(whole - expected)[100:-100].max() < 2e-4
    # a part equals the same range of the whole recording, also at both ends
    for place in (0, 0.001, 0.4, 0.987, 1 - 2**-53):
        part = read_part(dataset.path(0), 20_000, place, LIMITS)
        start = min(int(place * (3 * RATE - 20_000 + 1)), 3 * RATE - 20_000)
        assert np.abs(part - whole[start : start + 20_000]).max() < 1e-6


def test_other_rate_of_the_model(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.flac", tone(1.5), RATE)
    dataset = make_dataset(tmp_path, sample_rate=8000)
    assert dataset.lengths.tolist() == [12_000]
    assert dataset.whole(0).shape == (12_000,)


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    samples = np.stack([tone(1, 300 * (c + 1)) for c in range(channels)], axis=1)
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    read = read_whole(str(tmp_path / "a.wav"), LIMITS)
    np.testing.assert_allclose(read, samples.mean(axis=1), atol=1e-6)


def test_only_the_needed_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = np.tile(tone(1), 600)
    sf.write(tmp_path / "ten_minutes.flac", long, RATE)
    sf.write(tmp_path / "at_48_kHz.wav", long, 48_000)
    dataset = make_dataset(tmp_path)
    decoded = []
    read = sf.SoundFile.read
    monkeypatch.setattr(
        sf.SoundFile, "read", lambda self, frames, **options: decoded.append(frames) or read(self, frames, **options)
    )
    dataset.read(np.array([1]), np.array([RATE]), 0, 0)
    assert decoded == [RATE]
    decoded.clear()
    dataset.read(np.array([0]), np.array([RATE]), 0, 0)
    assert 3 * RATE < sum(decoded) < 3.2 * RATE


def test_long_recording_with_many_channels_is_mixed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.stack([tone(2, 300), tone(2, 500)], axis=1)
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    whole = read_whole(str(tmp_path / "a.wav"), LIMITS)
    sf.write(tmp_path / "b.mp3", samples, RATE)
    compressed = read_whole(str(tmp_path / "b.mp3"), LIMITS)
    monkeypatch.setattr(audio_decode, "BLOCK", 3000)
    np.testing.assert_array_equal(read_whole(str(tmp_path / "a.wav"), LIMITS), whole)
    np.testing.assert_allclose(read_whole(str(tmp_path / "b.mp3"), LIMITS), compressed, atol=1e-6)


def test_whole(folder: Path) -> None:
    dataset = make_dataset(folder)
    whole = dataset.whole(19)
    assert whole.shape == (round(2.9 * RATE),)
    assert whole.mean().abs() < 1e-5
    assert (whole.var(correction=0) - 1).abs() < 1e-3
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match="sample"):
            dataset.whole(wrong)


def test_tree(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "c").mkdir(parents=True)
    os.rename(folder / "19.wav", folder / "b" / "c" / "z.wav")
    (folder / "notes.txt").write_text("no recording")
    (folder / ".hidden.wav").write_text("no recording")
    (tmp_path / "short").symlink_to(folder)
    dataset = make_dataset(tmp_path / "short")
    assert len(dataset) == 20
    assert dataset.path(19) == str(tmp_path / "short" / "b" / "c" / "z.wav")
    assert dataset.listing.bad_files == ()


@pytest.mark.parametrize("root", ["absolute", "relative"])
def test_manifest(folder: Path, tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i:02d}.wav" for i in (5, 3, 4, 19)]
    counts = [sf.info(folder / name).frames for name in names]
    file = write_manifest(tmp_path / "train.tsv", folder if root == "absolute" else folder.name, names, counts)
    opened = []
    read_header = audio_module.read_header
    monkeypatch.setattr(audio_module, "read_header", lambda *given: opened.append(given[0]) or read_header(*given))
    monkeypatch.setattr(audio_module, "NUM_CHECKED", 2)
    dataset = make_dataset(file, max_seconds=9)
    assert [os.path.basename(dataset.path(i)) for i in range(4)] == sorted(names)
    assert dataset.lengths.tolist() == sorted(counts)
    # trusted after a check of a few headers
    assert len(opened) == 2
    assert dataset.read(np.arange(4), dataset.lengths, 0, 0)[1] == ()


def test_manifest_of_another_rate_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(3):
        sf.write(tmp_path / f"{i}.wav", tone(1.8, rate=48_000), 48_000)
    file = write_manifest(tmp_path / "a.tsv", tmp_path, [f"{i}.wav" for i in range(3)], [86_400] * 3)
    with caplog.at_level(logging.INFO):
        dataset = make_dataset(file)
    assert "has 86400 samples at 48000 Hz, but the manifest lists 86400 at the model's 16000 Hz" in caplog.text
    # neither 5.4 s, cut to 2 s, nor anything after the end
    assert dataset.lengths.tolist() == [28_800] * 3
    assert dataset.read(np.arange(3), dataset.lengths, 0, 0)[1] == ()


def test_manifest_that_is_out_of_date(folder: Path, tmp_path: Path) -> None:
    names = [f"{i:02d}.wav" for i in range(20)]
    dataset = make_dataset(write_manifest(tmp_path / "a.tsv", folder, names, [RATE] * 20))
    assert dataset.lengths.tolist() == make_dataset(folder).lengths.tolist()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"line 1 of '.*a\.tsv' must be the folder that holds the recordings, but is ''"),
        (["nowhere", "a.wav\t3"], "line 1 .* but is 'nowhere' instead"),
        (["."], "must name recordings, but the manifest '.*a.tsv' has none"),
        ([".", "00.wav\t16000", "01.wav"], "line 3 .* must be `path<TAB>number of samples`, but is '01.wav' instead"),
        ([".", "01.wav\tlong"], r"line 2 .*but is '01\.wav\\tlong' instead"),
        ([".", "01.wav\t-5"], "line 2 "),
        ([".", "01.wav\t1.5"], "line 2 "),
        ([".", "01.wav\t" + "9" * 30], "line 2 "),
        ([".", "01.wav\t³"], "line 2 "),
        ([".", "\t16000"], "line 2 "),
        ([".", "", "a\0.wav\t16000"], r"line 3 .*'a\\x00\.wav"),
        ([".", "../01.wav\t16000"], "line 2 .* must be a path below the root of the first line, but is '../01.wav'"),
        ([".", "a/../../01.wav\t16000"], "line 2 .* must be a path below the root"),
        ([".", "/etc/01.wav\t16000"], "line 2 .* must be a path below the root"),
    ],
)
def test_malformed_manifest(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        make_dataset(tmp_path / "a.tsv")


def test_file_that_is_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        make_dataset(tmp_path / "none.tsv")
    (tmp_path / "a.tsv").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(DataError, match="line 1 ") as caught:
        make_dataset(tmp_path / "a.tsv")
    assert str(caught.value).isprintable()
    os.mkfifo(tmp_path / "pipe.tsv")
    with pytest.raises(DataError, match="is neither"):
        make_dataset(tmp_path / "pipe.tsv")
    (tmp_path / "folder.tsv").mkdir()
    sf.write(tmp_path / "folder.tsv" / "a.wav", tone(1), RATE)
    assert len(make_dataset(tmp_path / "folder.tsv")) == 1


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        make_dataset(tmp_path / "none")
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(DataError, match="is a file"):
        make_dataset(tmp_path / "a.wav")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(
        DataError, match=r"must hold recordings \(\.wav, .*has none\n  not data: 1 other file \(1 \.txt\)"
    ):
        make_dataset(tmp_path / "empty")


def test_all_are_too_short(folder: Path) -> None:
    with pytest.raises(DataError, match=r"`d2v\.data\.min_seconds` must leave some.*all 20 .* shorter than 3 s"):
        make_dataset(folder, min_seconds=3, max_seconds=4)
    dataset = make_dataset(folder, min_seconds=2.85, max_seconds=4)
    assert len(dataset) == 1
    assert dataset.listing.left_out == (LeftOut(19, "recording", "shorter than `d2v.data.min_seconds` (2.85 s)"),)


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_missing_package_names_the_extra(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sf.write(folder / "other_rate.wav", tone(1, rate=8000), 8000)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"with {name}, which cannot be imported.*pip install 'd2v_fast\[train\]'"):
        make_dataset(folder)


def test_nothing_is_warned_of(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_dataset(folder).read(np.arange(20), np.full(20, 5000), 0, 0)
