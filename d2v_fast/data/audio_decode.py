"""A part of one audio file to a waveform. The file may be damaged or hostile: whatever it does, `UnreadableAudio`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_fast.data.batch import DataError
from d2v_fast.data.files import UnreadableFile, open_regular

__all__ = ["AudioHeader", "AudioLimits", "UnreadableAudio", "import_audio", "read_header", "read_part", "read_whole"]

# only these decoders run, whatever the file is called
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3")
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 768_000
# silence needs the fewest bytes: a second of it takes some 50 in FLAC, and Ogg and MP3 do not get far below
MAX_SAMPLES_PER_BYTE = 10_000
# samples that are decoded at a time, over all channels
BLOCK = 1 << 20
# 4.6 hours at 16 kHz, and 1 GiB of memory
MAX_WHOLE = 1 << 28
# no instrument gives such a sample, and its square is still a number
MAX_PEAK = 1e12
# more chunks than any recorder writes before the samples
MAX_CHUNKS = 256
# what programs that write into a pipe put where the number of bytes should be
UNKNOWN_SIZES = (0, 0xFFFFFFFF)
# MP3 frames take bits of those before them; without these, the first ones behind a seek are silent or wrong
MP3_REACH = 32 * 576
# the resampling filter sees less of its surroundings, counted at the lower of both rates
FILTER_REACH = 256


@dataclass(frozen=True)
class AudioLimits:
    """What is expected of a file.

    Attributes:
        sample_rate: of the waveforms, in Hz. Files of another rate are resampled.
        max_bytes: size of the file.
        silence: a part in which no sample differs from the mean by more than this share of full scale is refused.
        root: absolute folder without links in it, which no file may lie outside of; None for any place.
    """

    sample_rate: int
    max_bytes: int
    silence: float
    root: str | None = None


@dataclass(frozen=True)
class AudioHeader:
    """What a file says of itself: its samples per channel, and its own rate in Hz."""

    num_samples: int
    sample_rate: int

    def length(self, sample_rate: int) -> int:
        """Samples per channel at another rate."""
        return self.num_samples * sample_rate // self.sample_rate


class UnreadableAudio(UnreadableFile):
    """A file that cannot be used as audio; the message is the reason in a few words."""


def import_audio(name: str) -> Any:
    """The package `soundfile` or `soxr`, imported when it is first needed.

    Raises:
        DataError: if it cannot be imported, with the extra that has it.
    """
    try:
        if name == "soundfile":
            import soundfile

            return soundfile
        import soxr

        return soxr
    except Exception as error:
        # also OSError: a soundfile built without libsndfile looks for the system's
        job = "read" if name == "soundfile" else "resampled"
        raise DataError(
            f"audio is {job} with {name}, which cannot be imported ({type(error).__name__}: {error}). Install it with "
            f"`pip install 'd2v_fast[train]'`."
        ) from None


def read_header(path: str, limits: AudioLimits) -> AudioHeader:
    """Length and rate of a file, without its samples.

    Raises:
        UnreadableAudio: for anything that is wrong with the file.
    """
    with _reasons(), _opened(path, limits) as file:
        return AudioHeader(file.frames, file.samplerate)


def read_part(path: str, num_samples: int, place: float, limits: AudioLimits) -> npt.NDArray[np.float32]:
    """A part of a file, at the rate of `limits`; no more than that and what the resampling filter sees is read.

    Args:
        path: a WAV, FLAC, Ogg (Vorbis, Opus) or MP3 file of any rate. Channels are averaged.
        num_samples: length of the part.
        place: in [0, 1), from the first possible part to the last.
    Returns:
        fp32 `[num_samples]`, finite; full scale is 1.
    Raises:
        UnreadableAudio: for anything that is wrong with the file, or what is read of it.
        DataError: if a package is missing.
    """
    with _reasons(), _opened(path, limits) as file:
        length = AudioHeader(file.frames, file.samplerate).length(limits.sample_rate)
        if length < num_samples:
            raise UnreadableAudio(f"shorter than it was said to be: {length:,} samples instead of {num_samples:,}")
        start = min(math.floor(place * (length - num_samples + 1)), length - num_samples)
        return _audible(_samples(file, start, num_samples, limits.sample_rate), limits.silence)


def read_whole(path: str, limits: AudioLimits) -> npt.NDArray[np.float32]:
    """All of a file, fp32 `[N]`; otherwise as `read_part`."""
    with _reasons(), _opened(path, limits) as file:
        if file.frames > MAX_WHOLE:
            raise UnreadableAudio(f"{file.frames:,} samples are more than {MAX_WHOLE:,}")
        length = AudioHeader(file.frames, file.samplerate).length(limits.sample_rate)
        return _audible(_samples(file, 0, length, limits.sample_rate), limits.silence)


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever goes wrong inside, in words."""
    try:
        yield
    except (UnreadableAudio, DataError):
        raise
    except UnreadableFile as error:
        raise UnreadableAudio(str(error)) from None
    except OSError as error:
        raise UnreadableAudio(f"cannot be opened: {error.strerror or type(error).__name__}") from None
    except Exception as error:
        # libsndfile's own words, where it has some
        words = getattr(error, "error_string", f"{type(error).__name__}: {error}").strip().rstrip(".")
        raise UnreadableAudio(f"cannot be decoded{words and ': '}{words[:200]}") from None


@contextmanager
def _opened(path: str, limits: AudioLimits) -> Iterator[Any]:
    """The `soundfile.SoundFile` of a file whose header makes sense."""
    soundfile = import_audio("soundfile")
    handle, size = open_regular(path, limits.root, limits.max_bytes)
    try:
        head = os.pread(handle, 12, 0)
        if not head:
            raise UnreadableAudio("an empty file")
        if not _looks_like_audio(head):
            raise UnreadableAudio("not a WAV, FLAC, Ogg or MP3 file")
        if head[:4] in (b"RIFF", b"RIFX"):
            _refuse_cut_wav(handle, size)
        with soundfile.SoundFile(handle, closefd=False) as file:
            if file.format not in FORMATS:
                raise UnreadableAudio("not a WAV, FLAC, Ogg or MP3 file")
            if not 1 <= file.channels <= MAX_CHANNELS:
                raise UnreadableAudio(f"{file.channels} channels")
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise UnreadableAudio(f"a rate of {file.samplerate:,} Hz")
            if file.frames <= 0:
                raise UnreadableAudio("holds no samples")
            if file.frames > size * MAX_SAMPLES_PER_BYTE:
                raise UnreadableAudio(f"its header promises {file.frames:,} samples, and it has {size:,} bytes")
            yield file
    finally:
        os.close(handle)


def _looks_like_audio(head: bytes) -> bool:
    """By the first bytes, so that libsndfile does not try its decoders for rare formats."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return head[8:12] == b"WAVE"
    is_mp3_frame = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head[:4] in (b"fLaC", b"OggS") or head[:3] == b"ID3" or is_mp3_frame


def _refuse_cut_wav(handle: int, size: int) -> None:
    """libsndfile takes what is left of a WAV file for all of it."""
    order: Any = "big" if os.pread(handle, 4, 0) == b"RIFX" else "little"
    position = 12
    for _ in range(MAX_CHUNKS):
        chunk = os.pread(handle, 8, position)
        if len(chunk) < 8:
            break
        length = int.from_bytes(chunk[4:], order)
        position += 8
        if chunk[:4] == b"data":
            if length not in UNKNOWN_SIZES and position + length > size:
                raise UnreadableAudio(f"cut: {size - position:,} of {length:,} bytes of samples are there")
            break
        position += length + length % 2


def _samples(file: Any, start: int, num_samples: int, sample_rate: int) -> npt.NDArray[np.float32]:
    """Mono samples `start` to `start + num_samples`, counted at `sample_rate`."""
    if file.samplerate == sample_rate:
        return _mono(file, start, num_samples)
    soxr = import_audio("soxr")
    # the shortest stretches of whole samples at both rates
    divisor = math.gcd(file.samplerate, sample_rate)
    ours, theirs = sample_rate // divisor, file.samplerate // divisor
    margin = FILTER_REACH * max(1, -(-sample_rate // file.samplerate))
    first, last = max(0, start - margin) // ours, -(-(start + num_samples + margin) // ours)
    source = _mono(file, first * theirs, min(last * theirs, file.frames) - first * theirs)
    offset = start - first * ours
    part: npt.NDArray[np.float32] = soxr.resample(source, file.samplerate, sample_rate, quality="HQ")
    return part[offset : offset + num_samples].copy()


def _mono(file: Any, start: int, num_samples: int) -> npt.NDArray[np.float32]:
    """Samples at the file's own rate, averaged over its channels."""
    mono = np.empty(num_samples, dtype=np.float32)
    done = 0
    while done < num_samples:
        # soundfile seeks behind every read as well, so that each block has to begin early
        before = min(start + done, MP3_REACH) if file.format == "MP3" else 0
        file.seek(start + done - before)
        wanted = min(BLOCK // file.channels, num_samples - done)
        block = file.read(before + wanted, dtype="float32", always_2d=True)[before:]
        if len(block) == 0:
            raise UnreadableAudio(f"ends after {start + done:,} of {file.frames:,} samples")
        peak = float(np.abs(block).max())
        if not math.isfinite(peak):
            raise UnreadableAudio("samples that are not finite")
        if peak > MAX_PEAK:
            raise UnreadableAudio(f"samples of up to {peak:.0e} times full scale")
        mono[done : done + len(block)] = block[:, 0] if file.channels == 1 else block.mean(axis=1)
        done += len(block)
    return mono


def _audible(samples: npt.NDArray[np.float32], silence: float) -> npt.NDArray[np.float32]:
    if np.abs(samples - float(samples.mean(dtype=np.float64))).max() <= silence:
        raise UnreadableAudio(f"silent: no sample above {silence:g} of full scale")
    return samples
