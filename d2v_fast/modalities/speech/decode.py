"""Decode a part of an audio file to a waveform. A damaged or hostile file raises `UnreadableAudio`."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from d2v_fast.data.files import UnreadableFile, open_sample, refuse_system_error
from d2v_fast.errors import DataError
from d2v_fast.modalities.speech.headers.repair import NOT_AUDIO, pieces_of_file
from d2v_fast.modalities.speech.headers.view import FileView
from d2v_fast.packages import install_command

__all__ = ["AudioHeader", "AudioLimits", "UnreadableAudio", "import_audio", "read_header", "read_part", "read_whole"]

# the only decoders that run, regardless of the file's name
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3")
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 768_000
# FLAC compresses a second of silence, the extreme case, to about 50 bytes; Ogg and MP3 need hardly fewer
MAX_SAMPLES_PER_BYTE = 10_000
# samples decoded at a time, over all channels
BLOCK = 1 << 20
# 4.6 hours at 16 kHz, or 1 GiB of memory
MAX_WHOLE = 1 << 28
# far above any real recording, yet its square is finite in fp32
MAX_PEAK = 1e12
# share by which a file may be shorter than its header says
MAX_MISSING = 0.01
# use the loudest channel if averaging leaves less than this share of the channels' power
CANCELED = 0.01
# MP3 frames use bits of the frames before them, without which the first frames after a seek are silent or wrong
MP3_REACH = 32 * 576
# samples on either side that cover the resampling filter, at the lower of both rates
FILTER_REACH = 256


@dataclass(frozen=True)
class AudioLimits:
    """Requirements on a file and on its waveform.

    Attributes:
        sample_rate: Rate of the waveforms in Hz. Files at other rates are resampled.
        max_bytes: Maximum size of the file.
        silence: Refuse a part in which no sample differs from the mean by more than this share of full scale.
        root: Absolute path, without links, of the folder that all files must be in. `None` allows any place.
    """

    sample_rate: int
    max_bytes: int
    silence: float
    root: str | None = None


@dataclass(frozen=True)
class AudioHeader:
    """The number of samples per channel and the rate in Hz that a file's header states."""

    num_samples: int
    sample_rate: int

    def length(self, sample_rate: int) -> int:
        """Return the number of samples per channel at another rate."""
        return self.num_samples * sample_rate // self.sample_rate


class UnreadableAudio(UnreadableFile):
    """The file cannot be used as audio; the message is the reason in a few words."""


def import_audio(name: str) -> Any:
    """Import the package `soundfile` or `soxr`.

    Raises:
        DataError: The package cannot be imported; the message says how to install it.
    """
    try:
        if name == "soundfile":
            import soundfile

            return soundfile
        import soxr

        return soxr
    except Exception as error:
        # soundfile raises OSError if it finds no libsndfile
        job = "read" if name == "soundfile" else "resampled"
        raise DataError(
            f"audio is {job} with {name}, which cannot be imported ({type(error).__name__}: {error}). Install it with "
            f"`{install_command(name)}`."
        ) from None


def read_header(path: str, limits: AudioLimits) -> AudioHeader:
    """Read the length and rate of a file without decoding it.

    Raises:
        UnreadableAudio: The file is unusable, for any reason.
    """
    with _as_unreadable_audio(path), _opened(path, limits) as opened:
        return AudioHeader(opened.num_samples, opened.file.samplerate)


def read_part(path: str, num_samples: int, place: float, limits: AudioLimits) -> npt.NDArray[np.float32]:
    """Decode a part of a file, and no more of it than the part and the reach of the resampling filter.

    Args:
        path: File in one of `FORMATS`, at any rate. Channels are averaged; if they would cancel each other, the
            loudest one is used.
        num_samples: Length of the part, at the rate of `limits`.
        place: Start of the part, in [0, 1), from the first possible start to the last.
        limits: Sample rate and requirements.

    Returns:
        Finite samples, fp32 `[num_samples]`; full scale is 1.

    Raises:
        UnreadableAudio: The file or the part is unusable, for any reason.
        DataError: A package is missing.
    """
    with _as_unreadable_audio(path), _opened(path, limits) as opened:
        length = opened.length(limits.sample_rate)
        if length < num_samples:
            raise UnreadableAudio(f"shorter than expected: {length:,} samples instead of {num_samples:,}")
        return _require_sound(_samples(opened, place, num_samples, limits), limits.silence)


def read_whole(path: str, limits: AudioLimits) -> npt.NDArray[np.float32]:
    """Decode a whole file, fp32 `[N]`. Raises as `read_part` does."""
    with _as_unreadable_audio(path), _opened(path, limits) as opened:
        if opened.num_samples > MAX_WHOLE:
            raise UnreadableAudio(f"{opened.num_samples:,} samples are more than {MAX_WHOLE:,}")
        return _require_sound(_samples(opened, 0.0, None, limits), limits.silence)


@contextmanager
def _as_unreadable_audio(path: str) -> Iterator[None]:
    """Turn any error inside the context into `UnreadableAudio` with a short reason."""
    try:
        yield
    except (UnreadableAudio, DataError):
        raise
    except UnreadableFile as error:
        raise UnreadableAudio(str(error)) from None
    except OSError as error:
        refuse_system_error(error, path)
        raise UnreadableAudio(f"cannot be opened: {error.strerror or type(error).__name__}") from None
    except Exception as error:
        # prefer libsndfile's own message
        words = getattr(error, "error_string", f"{type(error).__name__}: {error}").strip().rstrip(".")
        raise UnreadableAudio(f"cannot be decoded{words and ': '}{words[:200]}") from None


@dataclass
class _Opened:
    """An open recording.

    Attributes:
        file: The `soundfile.SoundFile`.
        num_samples: Samples per channel at the file's own rate; lowered if the file turns out to end a little earlier.
        channel: The only channel to read; `None` averages all.
    """

    file: Any
    num_samples: int
    channel: int | None = None

    def length(self, sample_rate: int) -> int:
        """Return the number of samples per channel at another rate."""
        return AudioHeader(self.num_samples, self.file.samplerate).length(sample_rate)


@contextmanager
def _opened(path: str, limits: AudioLimits) -> Iterator[_Opened]:
    """Open a file and check its header."""
    soundfile = import_audio("soundfile")
    with open_sample(path, limits.root, limits.max_bytes) as opened:
        handle, size = opened.fileno(), os.fstat(opened.fileno()).st_size
        pieces = pieces_of_file(handle, size)
        source = handle if pieces is None else FileView(handle, pieces)
        with soundfile.SoundFile(source, closefd=False) as file:
            if file.format not in FORMATS:
                raise UnreadableAudio(NOT_AUDIO)
            if not 1 <= file.channels <= MAX_CHANNELS:
                raise UnreadableAudio(f"{file.channels} channels")
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise UnreadableAudio(f"a rate of {file.samplerate:,} Hz")
            if file.frames <= 0:
                raise UnreadableAudio("holds no samples")
            if file.frames > size * MAX_SAMPLES_PER_BYTE:
                raise UnreadableAudio(f"its header promises {file.frames:,} samples, and it has {size:,} bytes")
            yield _Opened(file, file.frames)


def _samples(opened: _Opened, place: float, num_samples: int | None, limits: AudioLimits) -> npt.NDArray[np.float32]:
    """Decode a part to mono at the rate of `limits`.

    Args:
        place: Start of the part, in [0, 1).
        num_samples: Length of the part at the rate of `limits`. `None` decodes the whole file.
    """
    rate = limits.sample_rate
    while True:
        length = opened.length(rate)
        wanted = length if num_samples is None else num_samples
        # after `_EndsEarly`, less than wanted may be left
        present = min(wanted, length)
        start = min(math.floor(place * (length - present + 1)), length - present)
        try:
            part = _resampled(opened, start, present, rate)
        except _EndsEarly as error:
            if error.num_samples < (1 - MAX_MISSING) * opened.num_samples:
                raise UnreadableAudio(str(error)) from None
            opened.num_samples = error.num_samples
            continue
        return part if present == wanted else np.pad(part, (0, wanted - present))


class _EndsEarly(Exception):
    """The file has fewer samples than its header says."""

    def __init__(self, num_samples: int, expected: int) -> None:
        super().__init__(f"ends after {num_samples:,} of {expected:,} samples")
        self.num_samples = num_samples


def _resampled(opened: _Opened, start: int, num_samples: int, sample_rate: int) -> npt.NDArray[np.float32]:
    """Decode mono samples `start` to `start + num_samples`, counted at `sample_rate`."""
    own_rate = opened.file.samplerate
    if own_rate == sample_rate:
        return _mono(opened, start, num_samples)
    soxr = import_audio("soxr")
    # samples at both rates of the shortest time that is a whole number of either
    divisor = math.gcd(own_rate, sample_rate)
    unit, own_unit = sample_rate // divisor, own_rate // divisor
    margin = FILTER_REACH * max(1, -(-sample_rate // own_rate))
    first, last = max(0, start - margin) // unit, -(-(start + num_samples + margin) // unit)
    source = _mono(opened, first * own_unit, min(last * own_unit, opened.num_samples) - first * own_unit)
    offset = start - first * unit
    part: npt.NDArray[np.float32] = soxr.resample(source, own_rate, sample_rate, quality="HQ")
    return part[offset : offset + num_samples].copy()


def _mono(opened: _Opened, start: int, num_samples: int) -> npt.NDArray[np.float32]:
    """Decode mono samples at the file's own rate: the average of its channels, or the loudest if they would cancel."""
    mono = np.empty(num_samples, dtype=np.float32)
    power = _Power(opened.file.channels)
    done = 0
    for block in _blocks(opened, start, num_samples):
        peak = float(np.abs(block).max())
        if not math.isfinite(peak):
            raise UnreadableAudio("samples that are not finite")
        if peak > MAX_PEAK:
            raise UnreadableAudio(f"samples of up to {peak:.0e} times full scale")
        if opened.channel is not None:
            mixed = block[:, opened.channel]
        else:
            mixed = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
            power.add(block, mixed)
        mono[done : done + len(block)] = mixed
        done += len(block)
    if opened.channel is None and (loudest := power.loudest_if_canceled()) is not None:
        return _mono(dataclasses.replace(opened, channel=loudest), start, num_samples)
    return mono


def _blocks(opened: _Opened, start: int, num_samples: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield samples fp32 `[N, C]` from `start` on, in blocks."""
    file = opened.file
    # some codecs can only be decoded from the beginning
    seekable = file.seekable()
    done = -start if not seekable else 0
    while done < num_samples:
        # soundfile also seeks after every read, so each block has to begin early
        before = min(start + done, MP3_REACH) if file.format == "MP3" else 0
        if seekable:
            file.seek(start + done - before)
        wanted = min(BLOCK // file.channels, (num_samples if done >= 0 else 0) - done)
        block = file.read(before + wanted, dtype="float32", always_2d=True)[before:]
        if len(block) == 0:
            raise _EndsEarly(start + done, opened.num_samples)
        if done >= 0:
            yield block
        done += len(block)


class _Power:
    """Variances of the channels and of their average, to detect channels that cancel."""

    def __init__(self, num_channels: int) -> None:
        self._sums = np.zeros((2, num_channels + 1))
        self._count = 0

    def add(self, block: npt.NDArray[np.float32], mixed: npt.NDArray[np.float32]) -> None:
        """Add samples fp32 `[N, C]` and their average `[N]`."""
        if block.shape[1] == 1:
            return
        self._count += len(block)
        columns = np.column_stack((block, mixed)).astype(np.float64)
        self._sums += np.stack((columns.sum(axis=0), np.square(columns).sum(axis=0)))

    def loudest_if_canceled(self) -> int | None:
        """Return the loudest channel if averaging nearly cancels the sound, as with opposite phases, else `None`."""
        if not self._count:
            return None
        means = self._sums / self._count
        *channels, mixed = (means[1] - np.square(means[0])).tolist()
        canceled = mixed < CANCELED * sum(channels) / len(channels)
        return int(np.argmax(channels)) if canceled else None


def _require_sound(samples: npt.NDArray[np.float32], silence: float) -> npt.NDArray[np.float32]:
    if np.abs(samples - float(samples.mean(dtype=np.float64))).max() <= silence:
        raise UnreadableAudio(f"silent: no sample above {silence:g} of full scale (`d2v.data.silence`)")
    return samples
