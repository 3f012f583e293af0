"""Data sets of unlabeled recordings: a folder tree or a manifest of files that libsndfile reads."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_fast.data.files import (
    NUM_CHECKED,
    NUM_NAMED,
    NUM_NEIGHBORS,
    PathList,
    find_files,
    require_readable,
    spread,
    tried_in_order,
)
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
    from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelSection

__all__ = ["KINDS", "AudioDataset", "normalized", "read_manifest"]

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

# threads that read headers; they mostly wait for the disk
NUM_THREADS = 16
HEADERS_AT_A_TIME = 64
# in characters; longer than any path that an operating system allows
MAX_LINE = 10_000
# digits of a sample count
MAX_DIGITS = 15

_log = logging.getLogger(__name__)


class AudioDataset:
    """All recordings below the folder `data.path`, or in the manifest `data.path`, ordered by path.

    For a folder, the constructor reads the header of every file. It skips hidden files and folders, and follows links
    that stay below the folder, or all links with `data.follow_outside`.

    A manifest (`.tsv`) has fairseq's format: the root folder in the first line (absolute, or relative to the manifest),
    then lines of `relative/path<TAB>number of samples`, counted at each file's own rate. The constructor checks the
    rate and length of 16 files spread over the manifest, and reads every header only if one of them differs.

    Channels are averaged; if they would cancel each other, the loudest channel is used. Recordings at other rates are
    resampled. Files with an unreadable header, and recordings shorter than `data.min_seconds` or one frame, are
    skipped. A file that turns out to be unreadable, silent or too large is replaced by a neighbor when it is read.

    Attributes:
        lengths: int64 `[S]`, number of samples at the model's rate that a step may use, at most `data.max_seconds`.
        is_cut: bool `[S]`, whether a recording is longer than that.
        sample_rate: The model's sample rate in Hz.
        listing: The files that are used, and those that are skipped: other files, short recordings, unreadable headers.

    Raises:
        DataError: The folder or manifest does not exist, the manifest is malformed or leads out of its root, no
            recording is readable and long enough, or a package is missing.
    """

    def __init__(self, data: SpeechDataConfig, model: SpeechModelSection) -> None:
        if data.path is None:
            raise DataError("`d2v.data.path` must be the folder that holds the recordings, but is null instead.")
        path = os.path.abspath(data.path)
        if path.lower().endswith(".tsv") and not os.path.isdir(path):
            root, entries = read_manifest(path)
            entries.sort()
            paths, counts = [name for name, _ in entries], np.array([count for _, count in entries])
            self.listing = Listing(count_endings(paths))
        else:
            root, counts = path, None
            inside = None if data.follow_outside else os.path.realpath(path)
            paths, self.listing = find_files(path, inside, KINDS)
        self._fill(data, model, root, paths, counts)

    def _fill(
        self,
        data: SpeechDataConfig,
        model: SpeechModelSection,
        root: str,
        paths: list[str],
        counts: npt.NDArray[np.int64] | None,
    ) -> None:
        """Add files by their path below `root`; `counts` holds the number of samples that the manifest lists."""
        import_audio("soundfile")
        self.root = root
        self.sample_rate = model.sample_rate
        self._limits = AudioLimits(
            sample_rate=model.sample_rate,
            max_bytes=data.max_file_bytes,
            silence=data.silence,
            root=None if data.follow_outside else os.path.realpath(root),
        )
        if counts is None or not self._manifest_is_right(paths, counts):
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
        self.is_cut: npt.NDArray[np.bool_] = counts[kept] > most
        self._paths = PathList(paths[index] for index in kept.tolist())
        self._require_readable()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, sample_id: int) -> str:
        """Return the path of a sample's file."""
        return os.path.join(self.root, self._paths[sample_id])

    def names_digest(self) -> str:
        """Return a digest of the paths below the root, in order."""
        return digest_of(*self._paths.content)

    def sizes_digest(self) -> str:
        """Return a digest of the current file sizes and of the lengths that a step may use."""
        return digest_of(file_sizes(self.root, self._paths), self.lengths)

    def read(
        self, sample_ids: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], seed: int, epoch: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Read a random part of each recording, normalized to zero mean and unit variance.

        The start of a part depends only on (seed, epoch, sample id) and the recording's length. An unreadable recording
        is replaced by the next one that is long enough, or else by the longest of the others, repeated.

        Args:
            sample_ids: int64 `[B]`.
            sizes: int64 `[B]`, number of samples at the model's rate, from 1 to `lengths[sample_ids]`.
            seed, epoch: Keys of the random starts.

        Returns:
            Waveforms fp32 `[B, max(sizes)]`, padded with zeros, and the files that were replaced, as `path: reason`.

        Raises:
            ValueError: A size is out of range.
            DataError: A recording and the neighbors tried in its place are all unreadable.
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

    def read_labeled(
        self, sample_ids: npt.NDArray[np.int64], places: npt.NDArray[np.float64]
    ) -> tuple[list[Tensor], npt.NDArray[np.int64], tuple[str, ...]]:
        """Read recordings that have labels, each in its own length: as much of it as `lengths` says.

        An unreadable recording is replaced by the next readable one in the order of the data set, whole, so that the
        label of the replacement belongs to what is heard.

        Args:
            sample_ids: int64 `[B]`.
            places: Where the part of a longer recording begins, fp64 `[B]`, from 0 (its start) to 1 (its end).

        Returns:
            Waveforms fp32 `[N]`, each normalized to zero mean and unit variance; the sample that each is of, int64
            `[B]`; and the files that were replaced, as `path: reason`.

        Raises:
            DataError: A recording and the neighbors tried in its place are all unreadable.
        """
        waves, read, bad = [], sample_ids.copy(), []
        for index, place in enumerate(places.tolist()):
            failures: list[str] = []
            for offset in tried_in_order(len(self)):
                candidate = (int(sample_ids[index]) + offset) % len(self)
                try:
                    samples = read_part(self.path(candidate), int(self.lengths[candidate]), place, self._limits)
                except UnreadableAudio as error:
                    failures.append(printable(f"{self.path(candidate)}: {error}"))
                    continue
                waves.append(normalized(samples))
                read[index] = candidate
                break
            else:
                raise _all_unreadable(failures)
            bad += failures
        return waves, read, tuple(bad)

    def only(self, sample_ids: npt.NDArray[np.int64]) -> AudioDataset:
        """Return the data set of these samples alone, int64 `[S]`, in this order."""
        chosen = copy.copy(self)
        chosen.lengths, chosen.is_cut = self.lengths[sample_ids], self.is_cut[sample_ids]
        chosen._paths = PathList(self._paths[index] for index in sample_ids.tolist())
        return chosen

    def names(self) -> list[str]:
        """Return the paths of all samples below `root`, in order."""
        return [self._paths[index] for index in range(len(self))]

    def whole(self, sample_id: int) -> Tensor:
        """Read a whole recording, fp32 `[N]`, normalized to zero mean and unit variance.

        Raises:
            DataError: The file is unreadable.
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
        raise _all_unreadable(failures)

    def _candidates(self, sample_id: int, size: int) -> Iterator[int]:
        """Yield the sample, then the samples to try in its place."""
        yield sample_id
        enough = np.flatnonzero(self.lengths >= size)
        others = np.roll(enough, -int(np.searchsorted(enough, sample_id, side="right")))
        others = others[others != sample_id]
        yield from (int(others[distance - 1]) for distance in islice(tried_in_order(len(others) + 1), 1, None))
        if len(enough) < NUM_NEIGHBORS:
            shorter = np.flatnonzero(self.lengths < size)
            longest_first = shorter[np.argsort(-self.lengths[shorter], kind="stable")]
            yield from longest_first[: NUM_NEIGHBORS - len(enough)].tolist()

    def _manifest_is_right(self, paths: list[str], counts: npt.NDArray[np.int64]) -> bool:
        """Return whether a few headers have the manifest's lengths and the model's rate."""
        num_read = 0
        for index in spread(len(paths), NUM_CHECKED):
            try:
                header = read_header(os.path.join(self.root, paths[index]), self._limits)
            except UnreadableAudio:
                continue
            num_read += 1
            if header.sample_rate != self.sample_rate or header.num_samples != counts[index]:
                _log.info(
                    "'%s' has %d samples at %d Hz, but the manifest lists %d at the model's %d Hz; reading all headers",
                    printable(paths[index]),
                    header.num_samples,
                    header.sample_rate,
                    counts[index],
                    self.sample_rate,
                )
                return False
        return num_read > 0

    def _lengths_by_header(self, paths: list[str]) -> npt.NDArray[np.int64]:
        """Return lengths at the model's rate, int64 `[len(paths)]`, -1 for unreadable files, and list the latter."""
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
                f"`d2v.data.path` must hold readable recordings, but none of the {len(paths)} in "
                f"'{printable(self.root)}' can be read:\n  " + "\n  ".join(bad[:NUM_NAMED])
            )
        if rates != {self.sample_rate}:
            # a missing package must raise now, not in a loader worker
            import_audio("soxr")
        self.listing = replace(self.listing, bad_files=tuple(bad))
        return lengths

    def _headers(self, paths: list[str]) -> list[tuple[int, int] | str]:
        """Return the length at the model's rate and the own rate of each file, or the reason why it is unreadable."""
        found: list[tuple[int, int] | str] = []
        for path in paths:
            try:
                header = read_header(os.path.join(self.root, path), self._limits)
                found.append((header.length(self.sample_rate), header.sample_rate))
            except UnreadableAudio as error:
                found.append(str(error))
        return found

    def _require_readable(self) -> None:
        """Raise before training starts if none of a few recordings is readable."""
        require_readable(
            spread(len(self), NUM_CHECKED),
            lambda sample_id: read_part(self.path(sample_id), int(self.lengths[sample_id]), 0.0, self._limits),
            self.path,
            f"{len(self)} in '{printable(self.root)}'",
            "recordings",
        )


def _all_unreadable(failures: list[str]) -> DataError:
    return DataError(
        f"{len(failures)} files that were tried one after the other are unreadable. Remove or repair them:\n  "
        + "\n  ".join(failures)
    )


def normalized(samples: npt.NDArray[np.float32]) -> Tensor:
    """Return samples fp32 `[N]` normalized to zero mean and unit variance, as the model expects them."""
    wave = torch.from_numpy(samples)
    return F.layer_norm(wave, wave.shape, eps=NORM_EPS)


def read_manifest(path: str) -> tuple[str, list[tuple[str, int]]]:
    """Read the root, and the path below it and listed number of samples of each recording, in the manifest's order.

    Raises:
        DataError: The manifest cannot be read or is malformed.
    """
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
    return os.path.abspath(root), entries


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
