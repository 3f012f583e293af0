"""Any recordings: a folder tree, or a manifest, of files that libsndfile reads, without labels."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_fast.data.files import NUM_CHECKED, NUM_NAMED, NUM_NEIGHBORS, PathList, find_files, tried_in_order
from d2v_fast.data.listing import ARCHIVES, VIDEOS, FileKinds, Listing, count_endings
from d2v_fast.data.samples import digest_of, file_sizes
from d2v_fast.errors import DataError
from d2v_fast.files.reading import NotRegularError, is_path, open_regular, printable, refuse_pointer
from d2v_fast.masking.streams import AUGMENT, stream_keys, uniforms
from d2v_fast.modalities.speech.decode import (
    AudioLimits,
    UnreadableAudio,
    import_audio,
    read_header,
    read_part,
    read_whole,
)

if TYPE_CHECKING:
    from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelConfig

__all__ = ["KINDS", "AudioDataset", "normalized"]

_CONVERT = "convert them, for example with `ffmpeg -i FILE FILE.flac`"
_EXTRACT = "extract the recordings as WAV or FLAC files"
KINDS = FileKinds(
    "recordings",
    read=(
        *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist"),
        *(".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mpga"),
    ),
    unread={
        **ARCHIVES,
        **dict.fromkeys(VIDEOS, _CONVERT),
        **dict.fromkeys((".aac", ".ac3", ".alac", ".amr", ".ape", ".asf", ".awb", ".dff", ".dsf", ".dts"), _CONVERT),
        **dict.fromkeys(
            (".m4a", ".m4b", ".m4r", ".mka", ".mpc", ".ra", ".rm", ".shn", ".spx", ".tta", ".voc"), _CONVERT
        ),
        **dict.fromkeys((".weba", ".wma", ".wv", ".pcm", ".raw", ".gsm"), _CONVERT),
        **dict.fromkeys((".arrow", ".parquet", ".tfrecord"), _EXTRACT),
    },
)
NORM_EPS = 1e-5

# headers are read by threads, which mostly wait for the disk
NUM_THREADS = 16
HEADERS_AT_A_TIME = 64
# characters; more than any path that a system takes
MAX_LINE = 10_000
# digits of a number of samples
MAX_DIGITS = 15

_log = logging.getLogger(__name__)


class AudioDataset:
    """All recordings below `data.path`, or of the manifest that it names, ordered by path.

    Of a folder, the header of every file is read once, at the beginning. Hidden files and folders are left out; links
    are followed where they stay below the folder, and everywhere if `data.follow_outside`.

    A manifest (`.tsv`) is fairseq's: the root folder in the first line, then `relative/path<TAB>number of samples`. A
    relative root is one beside the manifest. Its numbers count samples at each file's own rate. They are believed, and
    no header is read at the beginning, if 16 files spread over it have the model's rate and the lengths that it says;
    otherwise the header of every file is read, as for a folder.

    Channels are averaged, unless they would cancel each other: then the loudest one is taken. Other rates than the
    model's are resampled. Recordings shorter than `data.min_seconds`, or
    than one frame, are left out. A file that cannot be read, is silent in what is read of it, or beyond the limits of
    `data` is replaced by a neighbor; one whose header cannot be read is left out.

    Attributes:
        lengths: int64 `[S]`, samples at the model's rate that a step may use: at most `data.max_seconds`.
        sample_rate: the model's, in Hz.
        listing: which files are used, and what is left out: other files, recordings that are too short, files whose
            header cannot be read.

    Raises:
        DataError: at once, if there is no such folder or manifest, a manifest is malformed or leads out of its root,
            there is no recording, none that can be read, none that is long enough, or a package is missing.
    """

    def __init__(self, data: SpeechDataConfig, model: SpeechModelConfig) -> None:
        if data.path is None:
            raise DataError("`d2v.data.path` must be the folder that holds the recordings, but is null instead.")
        path = os.path.abspath(data.path)
        if path.lower().endswith(".tsv") and not os.path.isdir(path):
            root, paths, counts = _read_manifest(path)
            self.listing = Listing(count_endings(paths))
        else:
            root, counts = path, None
            inside = None if data.follow_outside else os.path.realpath(path)
            paths, self.listing = find_files(path, inside, KINDS)
        self._fill(data, model, root, paths, counts)

    def _fill(
        self,
        data: SpeechDataConfig,
        model: SpeechModelConfig,
        root: str,
        paths: list[str],
        counts: npt.NDArray[np.int64] | None,
    ) -> None:
        """Take in files by their path below `root`; `counts` is how many samples they are said to have."""
        import_audio("soundfile")
        self.root = root
        self.sample_rate = model.sample_rate
        self._limits = AudioLimits(
            sample_rate=model.sample_rate,
            max_bytes=data.max_file_bytes,
            silence=data.silence,
            root=None if data.follow_outside else os.path.realpath(root),
        )
        if counts is None or not self._believes(paths, counts):
            counts = self._lengths_by_header(paths)
        fewest = max(round(data.min_seconds * model.sample_rate), model.receptive_field)
        most = max(int(data.max_seconds * model.sample_rate), fewest)
        kept = np.flatnonzero(counts >= fewest)
        num_short = len(paths) - len(self.listing.bad_files) - len(kept)
        if fewest > model.receptive_field:
            short = f"shorter than `d2v.data.min_seconds` ({data.min_seconds:g} s)"
        else:
            short = f"shorter than one frame of the model ({fewest / model.sample_rate:g} s)"
        self.listing = self.listing.without(num_short, "recording", short)
        if len(kept) == 0:
            raise DataError(
                f"`d2v.data.min_seconds` must leave some recordings, but all {num_short} in '{printable(root)}' are "
                f"shorter than {fewest / model.sample_rate:g} s."
            )
        self.lengths: npt.NDArray[np.int64] = np.minimum(counts[kept], most)
        self._paths = PathList(paths[index] for index in kept.tolist())
        self._check_some()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, sample_id: int) -> str:
        """The file of a sample."""
        return os.path.join(self.root, self._paths[sample_id])

    def names_digest(self) -> str:
        """Return a digest of the paths below the root, in order."""
        return digest_of(*self._paths.content)

    def sizes_digest(self) -> str:
        """Return a digest of the sizes of the files, asked for now, and of the lengths that a step may use."""
        return digest_of(file_sizes(self.root, self._paths), self.lengths)

    def read(
        self, sample_ids: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], seed: int, epoch: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        """A random part of each recording, of zero mean and unit variance over that part.

        Where a part begins depends on (seed, epoch, sample id) and the recording's length. An unreadable recording is
        replaced by the next one that is long enough, or else by the longest of the others, repeated.

        Args:
            sample_ids: int64 `[B]`.
            sizes: int64 `[B]`, samples at the model's rate, from 1 to `lengths[sample_ids]`.
            seed, epoch: of the parts.
        Returns:
            Waveforms fp32 `[B, max(sizes)]`, zero behind the end of each, and the files that had to be replaced as
            `path: reason`.
        Raises:
            ValueError: if a size is out of range.
            DataError: if a recording and its next neighbors are all unreadable.
        """
        if len(sizes) and (sizes.min() < 1 or (sizes > self.lengths[sample_ids]).any()):
            raise ValueError("`sizes` must be in [1, `lengths[sample_ids]`], but some are not.")
        places = uniforms(stream_keys(seed, AUGMENT, epoch, sample_ids), 1)[:, 0]
        waves = torch.zeros(len(sample_ids), int(sizes.max(initial=0)))
        bad: list[str] = []
        for wave, sample_id, size, place in zip(
            waves, sample_ids.tolist(), sizes.tolist(), places.tolist(), strict=True
        ):
            samples, failures = self._read_or_replace(sample_id, size, place)
            wave[:size] = normalized(samples)
            bad += failures
        return waves, tuple(bad)

    def whole(self, sample_id: int) -> Tensor:
        """All of a recording, fp32 `[N]`, of zero mean and unit variance.

        Raises:
            DataError: if it cannot be read: there is no other in its place.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        try:
            return normalized(read_whole(self.path(sample_id), self._limits))
        except UnreadableAudio as error:
            raise DataError(printable(f"{self.path(sample_id)}: {error}")) from None

    def _read_or_replace(self, sample_id: int, size: int, place: float) -> tuple[npt.NDArray[np.float32], list[str]]:
        failures: list[str] = []
        for candidate in self._candidates(sample_id, size):
            path = self.path(candidate)
            num_samples = min(size, int(self.lengths[candidate]))
            try:
                samples = read_part(path, num_samples, place, self._limits)
                return samples if num_samples == size else np.resize(samples, size), failures
            except UnreadableAudio as error:
                failures.append(printable(f"{path}: {error}"))
        raise DataError(
            f"{len(failures)} files that were tried one after the other are unreadable. Remove or repair them:\n  "
            + "\n  ".join(failures)
        )

    def _candidates(self, sample_id: int, size: int) -> Iterator[int]:
        """The sample, and those to try in its place."""
        yield sample_id
        enough = np.flatnonzero(self.lengths >= size)
        others = np.roll(enough, -int(np.searchsorted(enough, sample_id, side="right")))
        others = others[others != sample_id]
        yield from (int(others[distance - 1]) for distance in tried_in_order(len(others) + 1)[1:])
        if len(enough) < NUM_NEIGHBORS:
            shorter = np.flatnonzero(self.lengths < size)
            longest_first = shorter[np.argsort(-self.lengths[shorter], kind="stable")]
            yield from longest_first[: NUM_NEIGHBORS - len(enough)].tolist()

    def _believes(self, paths: list[str], counts: npt.NDArray[np.int64]) -> bool:
        """Whether a few headers agree with the numbers of a manifest, and have the model's rate."""
        num_read = 0
        for index in _spread(len(paths)):
            try:
                header = read_header(os.path.join(self.root, paths[index]), self._limits)
            except UnreadableAudio:
                continue
            num_read += 1
            if header.sample_rate != self.sample_rate or header.num_samples != counts[index]:
                _log.info(
                    "'%s' has %d samples at %d Hz, and the manifest says %d at the model's %d Hz: reading every header",
                    printable(paths[index]),
                    header.num_samples,
                    header.sample_rate,
                    counts[index],
                    self.sample_rate,
                )
                return False
        return num_read > 0

    def _lengths_by_header(self, paths: list[str]) -> npt.NDArray[np.int64]:
        """Lengths at the model's rate, int64 `[len(paths)]`, -1 for the bad ones, which are named."""
        groups = [paths[i : i + HEADERS_AT_A_TIME] for i in range(0, len(paths), HEADERS_AT_A_TIME)]
        lengths = np.full(len(paths), -1, dtype=np.int64)
        bad, rates = [], set()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            found = (answer for group in pool.map(self._headers, groups) for answer in group)
            for index, header in enumerate(found):
                if isinstance(header, str):
                    bad.append(printable(f"{os.path.join(self.root, paths[index])}: {header}"))
                else:
                    lengths[index] = header[0]
                    rates.add(header[1])
        if len(bad) == len(paths):
            raise DataError(
                f"`d2v.data.path` must hold readable recordings, but of {len(paths)} in '{printable(self.root)}' none "
                f"can be read:\n  " + "\n  ".join(bad[:NUM_NAMED])
            )
        if rates != {self.sample_rate}:
            # said now, if it is missing
            import_audio("soxr")
        self.listing = replace(self.listing, bad_files=tuple(bad))
        return lengths

    def _headers(self, paths: list[str]) -> list[tuple[int, int] | str]:
        """Length at the model's rate and own rate of every file, or what is wrong with it."""
        found: list[tuple[int, int] | str] = []
        for path in paths:
            try:
                header = read_header(os.path.join(self.root, path), self._limits)
                found.append((header.length(self.sample_rate), header.sample_rate))
            except UnreadableAudio as error:
                found.append(str(error))
        return found

    def _check_some(self) -> None:
        """Fail before training does, when nothing can be read."""
        failures = []
        for sample_id in _spread(len(self)):
            try:
                read_part(self.path(sample_id), int(self.lengths[sample_id]), 0.0, self._limits)
                return
            except UnreadableAudio as error:
                failures.append(printable(f"{self.path(sample_id)}: {error}"))
        raise DataError(
            f"`d2v.data.path` must hold readable recordings, but of {len(self)} in '{printable(self.root)}' "
            f"{len(failures)} were tried and none can be read:\n  " + "\n  ".join(failures)
        )


def normalized(samples: npt.NDArray[np.float32]) -> Tensor:
    """Samples fp32 `[N]` as the model takes them: of zero mean and unit variance."""
    wave = torch.from_numpy(samples)
    return F.layer_norm(wave, wave.shape, eps=NORM_EPS)


def _spread(num: int) -> list[int]:
    """A few positions from the first to the last."""
    return np.unique(np.linspace(0, num - 1, NUM_CHECKED, dtype=np.int64)).tolist()


def _read_manifest(path: str) -> tuple[str, list[str], npt.NDArray[np.int64]]:
    """Root, sorted paths below it, and the samples that each is said to have."""
    try:
        refuse_pointer(path)
        with (
            open_regular(path) as content,
            io.TextIOWrapper(content, encoding="utf-8", errors="surrogateescape", newline="\n") as file,
        ):
            first = file.readline(MAX_LINE).rstrip("\r\n")
            root = os.path.join(os.path.dirname(path), os.path.expanduser(first)) if is_path(first) and first else ""
            if not os.path.isdir(root):
                raise _malformed(path, 1, "the folder that holds the recordings", first)
            entries = []
            number = 1
            while line := file.readline(MAX_LINE):
                number += 1
                if line := line.rstrip("\r\n"):
                    entries.append(_entry(path, number, line))
    except NotRegularError:
        raise DataError(
            f"`d2v.data.path` must be a folder or a manifest, but '{printable(path)}' is neither."
        ) from None
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise DataError(
            f"`d2v.data.path` must be a folder or a manifest, but '{printable(path)}' cannot be read: {what}."
        ) from None
    if not entries:
        raise DataError(f"`d2v.data.path` must name recordings, but the manifest '{printable(path)}' has none.")
    entries.sort()
    return os.path.abspath(root), [name for name, _ in entries], np.array([count for _, count in entries])


def _entry(path: str, number: int, line: str) -> tuple[str, int]:
    name, tab, count = line.rpartition("\t")
    if not (tab and name and is_path(name) and count.isascii() and count.isdigit() and len(count) <= MAX_DIGITS):
        raise _malformed(path, number, "`path<TAB>number of samples`", line)
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise _malformed(path, number, "a path below the root of the first line", name)
    return name, int(count)


def _malformed(path: str, number: int, must: str, text: str) -> DataError:
    shown = printable(text[:200])
    return DataError(f"`d2v.data.path`: line {number} of '{printable(path)}' must be {must}, but is '{shown}' instead.")
