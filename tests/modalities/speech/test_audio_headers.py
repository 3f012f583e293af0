"""Test recordings whose headers state no length or a wrong one: all samples that are there are read."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from d2v_fast.modalities.speech.audio import KINDS
from d2v_fast.modalities.speech.decode import AudioLimits, UnreadableAudio, read_header, read_part, read_whole
from d2v_fast.modalities.speech.headers import mp3 as mp3_layout
from tests.helpers.audio_files import RATE, make_dataset, tone

sf = pytest.importorskip("soundfile")
needs_mp3 = pytest.mark.skipif("MP3" not in sf.available_formats(), reason="libsndfile before 1.1 cannot read MP3")

LENGTH = 24_000
LIMITS = AudioLimits(sample_rate=RATE, max_bytes=10**8, silence=1e-4)
SAMPLES = np.round(tone(LENGTH / RATE) * 2**15) / 2**15
PCM = (SAMPLES * 2**15).astype("<i2").tobytes()


def encoded(samples: np.ndarray = SAMPLES, rate: int = RATE, **options: object) -> bytes:
    stream = io.BytesIO()
    sf.write(stream, samples, rate, **options)
    return stream.getvalue()


def read(tmp_path: Path, content: bytes, rate: int = RATE) -> np.ndarray:
    """Read a whole file, and check that a part of it and its header agree with it."""
    path = tmp_path / "a"
    path.write_bytes(content)
    limits = AudioLimits(sample_rate=rate, max_bytes=10**8, silence=1e-4)
    whole = read_whole(str(path), limits)
    length = read_header(str(path), limits).num_samples
    assert len(whole) == length
    for place in (0.0, 0.3, 0.999999):
        start = min(int(place * (length - 3000 + 1)), length - 3000)
        part = read_part(str(path), 3000, place, limits)
        assert np.abs(part - whole[start : start + 3000]).max() < 1e-4
    return whole


def riff(*chunks: tuple[bytes, bytes], magic: bytes = b"RIFF", pads: bool = True) -> bytes:
    content = b"".join(
        name + struct.pack("<I", len(data)) + data + (b"\0" if pads and len(data) % 2 else b"") for name, data in chunks
    )
    return magic + struct.pack("<I", len(content) + 4) + b"WAVE" + content


FORM = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
# WAVE_FORMAT_EXTENSIBLE
LONG_FORM = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 0)
LONG_FORM += bytes.fromhex("0100000000001000800000aa00389b71")
INFO = (b"LIST", b"INFOISFT\x03\0\0\0abc")


@pytest.mark.parametrize("form", [FORM, LONG_FORM], ids=["plain", "extensible"])
@pytest.mark.parametrize(
    "before", [(), (INFO,), ((b"bext", bytes(602)), (b"junk", bytes(27)))], ids=["", "LIST", "bext"]
)
@pytest.mark.parametrize(
    "said",
    [0, 0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFFF - 36, 0x7FFFFFFE, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0xFFFFFFF0],
)
def test_placeholder_of_a_streamed_wav(tmp_path: Path, said: int, before, form: bytes) -> None:
    content = riff((b"fmt ", form), *before, (b"data", b""))
    content = content[:-4] + struct.pack("<I", said) + PCM
    for total in (said + 36 & 0xFFFFFFFF, 0xFFFFFFFF, 0):
        mended = content[:4] + struct.pack("<I", total) + content[8:]
        np.testing.assert_array_equal(read(tmp_path, mended), SAMPLES)


def test_wav_without_samples_has_none(tmp_path: Path) -> None:
    for content in (riff((b"fmt ", FORM), (b"data", b"")), riff((b"fmt ", FORM), (b"data", b""), INFO)):
        with pytest.raises(UnreadableAudio, match="holds no samples"):
            read(tmp_path, content)


def test_chunks_around_the_samples(tmp_path: Path) -> None:
    chunks = ((b"fmt ", FORM), INFO, (b"data", PCM), (b"id3 ", b"abc"))
    for pads in (True, False):
        np.testing.assert_array_equal(read(tmp_path, riff(*chunks, pads=pads)), SAMPLES)
    # some programs write the length of the file instead of that of the samples
    content = riff(*chunks[::2])
    content = content.replace(struct.pack("<I", len(PCM)), struct.pack("<I", len(content)))
    np.testing.assert_array_equal(read(tmp_path, content)[:LENGTH], SAMPLES)
    with pytest.raises(UnreadableAudio, match=r"cut: 40,\d+ of 48,000 bytes of samples are there"):
        read(tmp_path, riff((b"fmt ", FORM), (b"data", PCM))[:40_100])


@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
@pytest.mark.parametrize("said", ["right", 0, 2**64 - 1])
def test_rf64(tmp_path: Path, magic: bytes, said: int | str) -> None:
    length = len(PCM) if said == "right" else said
    count = LENGTH if said == "right" else said
    sizes = struct.pack("<QQQI", length + 72 & 2**64 - 1, length, count, 0)
    content = riff((b"ds64", sizes), (b"fmt ", FORM), (b"data", b""), magic=magic)[:-4] + b"\xff" * 4 + PCM
    np.testing.assert_array_equal(read(tmp_path, content[:4] + b"\xff" * 4 + content[8:]), SAMPLES)


@pytest.mark.parametrize(
    ("format", "place", "size", "placeholders"),
    [
        # lengths of FORM and SSND as sox and ffmpeg write them
        ("AIFF", b"SSND", 4, [b"\x7f\0\0\x08", b"\0\0\0\0", b"\xff\xff\xff\xff"]),
        ("AU", b".snd\0\0\0", 4, [b"\xff\xff\xff\xff", b"\x7f\xff\xf0\0"]),
        ("CAF", b"data", 8, [b"\xff" * 8, bytes(8)]),
    ],
)
def test_placeholders_of_other_containers(tmp_path: Path, format: str, place: bytes, size: int, placeholders) -> None:
    content = encoded(format=format, **({"endian": "BIG"} if format != "CAF" else {}))
    at = content.index(place) + len(place)
    if format == "AU":
        at = 8
    np.testing.assert_array_equal(read(tmp_path, content), SAMPLES)
    for placeholder in placeholders:
        np.testing.assert_array_equal(read(tmp_path, content[:at] + placeholder + content[at + size :]), SAMPLES)
    with pytest.raises(UnreadableAudio, match=r"cut: \d\d,\d+ of 48,0\d\d bytes of samples are there"):
        read(tmp_path, content[: len(content) // 2])


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".opus", {"format": "OGG", "subtype": "OPUS"}),
        (".oga", {"format": "OGG", "subtype": "VORBIS"}),
        (".aiff", {"format": "AIFF"}),
        (".aif", {"format": "AIFF", "subtype": "PCM_24"}),
        (".aifc", {"format": "AIFF", "subtype": "FLOAT"}),
        (".au", {"format": "AU"}),
        (".snd", {"format": "AU", "subtype": "ULAW"}),
        (".caf", {"format": "CAF"}),
        (".w64", {"format": "W64"}),
        (".sph", {"format": "NIST"}),
        (".wave", {"format": "WAVEX"}),
        (".rf64", {"format": "RF64"}),
    ],
)
def test_other_endings_are_read(tmp_path: Path, ending: str, options: dict[str, str]) -> None:
    (tmp_path / f"a{ending.upper()}").write_bytes(encoded(**options))
    dataset = make_dataset(tmp_path)
    assert dataset.listing.used == {ending: 1}
    assert dataset.lengths.tolist() == [LENGTH]
    whole = read_whole(dataset.path(0), LIMITS)
    assert np.abs(whole - SAMPLES)[4000:-4000].max() < 5e-2
    assert ending in KINDS.read


def test_gsm_is_read_from_its_beginning(tmp_path: Path) -> None:
    whole = read(tmp_path, encoded(rate=8000, format="WAV", subtype="GSM610"), rate=8000)
    # an odd number of blocks is followed by a padding byte
    assert len(whole) == LENGTH
    assert np.corrcoef(whole, SAMPLES)[0, 1] > 0.98


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_streams_one_after_the_other_are_refused(tmp_path: Path, subtype: str) -> None:
    one = encoded(format="OGG", subtype=subtype)
    serial = one[14:18]
    # changing the serial number makes the page's checksum wrong, but the code under test ignores it
    other = one.replace(b"OggS", b"oggs").replace(serial, bytes(byte ^ 1 for byte in serial)).replace(b"oggs", b"OggS")
    assert len(read(tmp_path, one)) == LENGTH
    with pytest.raises(UnreadableAudio, match="several recordings one after the other"):
        read(tmp_path, one + other)


def test_cut_nist_is_refused(tmp_path: Path) -> None:
    content = encoded(format="NIST", subtype="PCM_16")
    assert len(read(tmp_path, content)) == LENGTH
    with pytest.raises(UnreadableAudio, match=r"cut: 28,976 of 48,000 bytes"):
        read(tmp_path, content[:30_000])


@needs_mp3
@pytest.mark.parametrize("rate", [8000, RATE, 44_100])
def test_mp3_in_wav(tmp_path: Path, rate: int) -> None:
    sound = encoded(SAMPLES[:12_000], rate=rate, format="MP3")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, rate, 8000, 1, 0, 12, 1, 2, 1152, 1, 1393)
    expected = read(tmp_path, sound, rate=rate)
    for after in ((), (INFO,)):
        content = riff((b"fmt ", form), (b"data", sound), *after)
        np.testing.assert_array_equal(read(tmp_path, content, rate=rate), expected)


def w64(form: bytes, data: bytes, said: int | None = None) -> bytes:
    tail = bytes.fromhex("f3acd3118cd100c04f8edb8a")
    content = b"wave" + tail + b"fmt " + tail + struct.pack("<Q", 24 + len(form)) + form.ljust(-(-len(form) // 8) * 8)
    total = 40 - 16 + len(content) + 24 + len(data)
    content += b"data" + tail + struct.pack("<Q", 24 + len(data) if said is None else said) + data
    head = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
    return head + struct.pack("<Q", total if said is None else 2**64 - 1) + content


@pytest.mark.parametrize("said", [None, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize(("dtype", "tag"), [("<f4", 3), ("<f8", 3), ("<i2", 1)])
def test_sub_format_of_w64_is_believed(tmp_path: Path, dtype: str, tag: int, said: int | None) -> None:
    size = np.dtype(dtype).itemsize
    form = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, size * RATE, size, 8 * size, 22, 8 * size, 0)
    form += struct.pack("<I", tag) + bytes.fromhex("00001000800000aa00389b71")
    data = PCM if tag == 1 else SAMPLES.astype(dtype).tobytes()
    np.testing.assert_array_equal(read(tmp_path, w64(form, data, said)), SAMPLES.astype(np.float32))


@pytest.mark.parametrize("num_samples", [LENGTH, 4096 * 4, 4097])
def test_flac_of_unknown_length(tmp_path: Path, num_samples: int) -> None:
    content = bytearray(encoded(SAMPLES[:num_samples], format="FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    for before, behind in ((b"", b""), (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10), b"TAG" + bytes(125))):
        np.testing.assert_array_equal(read(tmp_path, before + bytes(content) + behind), SAMPLES[:num_samples])
    if num_samples == LENGTH:
        # nothing of a truncated frame is used
        np.testing.assert_array_equal(read(tmp_path, bytes(content[:-100])), SAMPLES[: LENGTH - LENGTH % 4096])
        with pytest.raises(UnreadableAudio, match="without a whole frame"):
            read(tmp_path, bytes(content[:100]))


def mp3(rate: int = 44_100, channels: int = 1, mode: str = "VARIABLE", seconds: float = 2.0) -> bytes:
    samples = np.random.default_rng(0).normal(0, 0.05, (int(seconds * rate), channels))
    samples += 0.3 * np.sin(np.arange(len(samples)) ** 1.5 / 300)[:, None]
    stream = io.BytesIO()
    with sf.SoundFile(stream, "w", rate, channels, format="MP3", bitrate_mode=mode, compression_level=0.5) as file:
        file.write(samples)
    return stream.getvalue()


def starts(content: bytes) -> list[int]:
    """Return the offsets of the frames of an MP3 file."""
    found, position = [], content.index(b"\xff")
    while position + 4 <= len(content):
        found.append(position)
        position += mp3_layout._size_of(int.from_bytes(content[position : position + 4], "big"))
    return found


def without_header(content: bytes) -> bytes:
    """Return an MP3 file without its Xing frame, as a program would write it into a pipe."""
    assert b"Xing" in content[:200] or b"Info" in content[:200]
    return content[starts(content)[1] :]


def decoded(content: bytes) -> int:
    """Return the number of samples of all frames less the delay of the decoder, which libsndfile removes."""
    rate = {3: 1152, 2: 576, 0: 576}[content[1] >> 3 & 3]
    return rate * len(starts(content)) - 529


@needs_mp3
@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000])
def test_mp3_without_a_header_is_counted(tmp_path: Path, rate: int, mode: str) -> None:
    for channels in (1, 2):
        content = mp3(rate, channels, mode)
        bare = without_header(content)
        assert len(read(tmp_path, bare, rate)) == decoded(bare)
        # with its own header, the length is exactly that of the encoded signal
        assert len(read(tmp_path, content, rate)) == 2 * rate


@needs_mp3
@pytest.mark.parametrize("has_header", [True, False])
def test_what_lies_around_and_between_mp3_frames(tmp_path: Path, has_header: bool) -> None:
    content = mp3(channels=2)
    content = content if has_header else without_header(content)
    whole = read(tmp_path, content, 44_100)
    id3v1 = b"TAG" + bytes(125)
    id3v2 = b"ID3\x04\0\0\0\0\x08\0" + bytes(1024)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 132, 1, 1 << 31) + bytes(108)
    for before, behind in (
        (b"", id3v1),
        (id3v2, b""),
        (id3v2 + id3v2, ape + id3v1),
        (bytes(3000), b""),
        (id3v2 + bytes(70_000), b""),
        (ape, bytes(2000)),
    ):
        np.testing.assert_array_equal(read(tmp_path, before + content + behind, 44_100), whole)
    middle = starts(content)[len(starts(content)) // 2]
    junk = np.random.default_rng(1).bytes(5000)
    bare = without_header(content) if has_header else content
    plain = read(tmp_path, bare, 44_100)
    for between in (junk, junk[:1000], junk[:2000], id3v1 + id3v2, bytes(100_000)):
        torn = content[:middle] + between + content[middle:]
        found = read(tmp_path, torn, 44_100)
        assert len(found) in (len(plain), len(whole))
        np.testing.assert_array_equal(found, plain if len(found) == len(plain) else whole)
    # two concatenated files with only the first one's header are read completely
    twice = read(tmp_path, content + content, 44_100)
    assert len(twice) == 2 * len(plain) + 529 + (1152 if has_header else 0)
    # recordings of broadcasts begin in the middle of a frame
    assert len(read(tmp_path, bare[300:], 44_100)) == len(plain) - 1152


@needs_mp3
def test_mp3_that_was_cut(tmp_path: Path) -> None:
    content = mp3()
    bare = without_header(content)
    # a file slightly shorter than its header says is read as far as it goes
    assert len(read(tmp_path, content[:-600], 44_100)) > 0.9 * 2 * 44_100
    with pytest.raises(UnreadableAudio, match=r"cut: \d+ of 7\d MP3 frames are there"):
        read(tmp_path, content[: len(content) // 2], 44_100)
    # without a header, truncation cannot be detected
    half = bare[: len(bare) // 2]
    assert len(read(tmp_path, half, 44_100)) == decoded(half) - 1152


@needs_mp3
def test_counting_is_bounded_and_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = without_header(mp3())
    path = tmp_path / "a.mp3"
    path.write_bytes(bare)
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: reads.append(given) or pread(*given))
    read_header(str(path), LIMITS)
    first = len(reads)
    read_header(str(path), LIMITS)
    counted_again = any(count == mp3_layout.CHUNK for _, count, _ in reads[first:])
    assert not counted_again
    with monkeypatch.context() as patch:
        patch.setattr(mp3_layout, "MAX_FRAMES", 10)
        patch.setattr(mp3_layout, "_cache", {})
        with pytest.raises(UnreadableAudio, match="more than 10 MP3 frames"):
            read_header(str(path), LIMITS)
    # an endless series of bytes that look like the start of a frame
    for hostile in (b"\xff", b"\xff\xfb\x90", b"\xff\xfb\x90\0", b"\xff\xfb\0\0", bare[:4] + b"\xff"):
        path.write_bytes(b"ID3\x04\0\0\0\0\0\0" + hostile * (6_000_000 // len(hostile)))
        start = time.process_time()
        with contextlib.suppress(UnreadableAudio):
            read_part(str(path), 4000, 0.9, LIMITS)
        assert time.process_time() - start < 3


def test_file_that_ends_a_little_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept up to 1 % fewer samples than libsndfile states, which some of its decoders cause."""
    path = tmp_path / "a.wav"
    sf.write(path, SAMPLES, RATE, subtype="FLOAT")
    end = LENGTH
    system_read = sf.SoundFile.read

    def cut(self: object, frames: int, **options: object) -> np.ndarray:
        return system_read(self, max(0, min(frames, end - self.tell())), **options)

    monkeypatch.setattr(sf.SoundFile, "read", cut)
    end = LENGTH - 200
    np.testing.assert_allclose(read_whole(str(path), LIMITS)[:end], SAMPLES[:end], atol=1e-7)
    part = read_part(str(path), 4000, 0.99999, LIMITS)
    np.testing.assert_allclose(part, SAMPLES[end - 4000 : end], atol=1e-7)
    whole = read_part(str(path), LENGTH, 0.5, LIMITS)
    np.testing.assert_allclose(whole, np.pad(SAMPLES[:end], (0, 200)), atol=1e-7)
    end = LENGTH - 300
    with pytest.raises(UnreadableAudio, match="ends after 23,700 of 24,000 samples"):
        read_part(str(path), 4000, 0.99999, LIMITS)


def test_quiet_recording_names_the_key(tmp_path: Path) -> None:
    sf.write(tmp_path / "a.wav", SAMPLES * 10 ** (-84 / 20), RATE, subtype="PCM_24")
    with pytest.raises(UnreadableAudio, match=r"silent: no sample above 0.0001 of full scale \(`d2v.data.silence`\)"):
        read_whole(str(tmp_path / "a.wav"), LIMITS)


@pytest.mark.parametrize("residue", [0.0, 0.01])
def test_channels_of_opposite_phase_do_not_cancel(tmp_path: Path, residue: float) -> None:
    """Use the louder channel if the average would be silence or the residue of a codec."""
    other = -0.9 * SAMPLES + residue * np.random.default_rng(0).normal(0, 0.1, LENGTH)
    sf.write(tmp_path / "a.wav", np.stack([other, SAMPLES], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_whole(str(tmp_path / "a.wav"), LIMITS), SAMPLES, atol=1e-7)
    part = read_part(str(tmp_path / "a.wav"), 5000, 0.5, LIMITS)
    np.testing.assert_allclose(part, SAMPLES[9500:14500], atol=1e-7)
    # other channels are averaged as usual
    sf.write(tmp_path / "b.wav", np.stack([SAMPLES, SAMPLES[::-1]], axis=1), RATE, subtype="FLOAT")
    mixed = (SAMPLES + SAMPLES[::-1]) / 2
    np.testing.assert_allclose(read_whole(str(tmp_path / "b.wav"), LIMITS), mixed, atol=1e-6)
