"""What `embed` reads: an encoder from a run or a Transformers folder, and images, recordings or lines of text as the
encoder was trained on them."""

from __future__ import annotations

import functools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v_fast.checkpoints.saved_weights import load_encoder, open_checkpoint, read_run_config, run_tokenizer
from d2v_fast.config import TextConfig
from d2v_fast.config.errors import OptionError, check
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.data import DataError
from d2v_fast.data.files import UnreadableFile, find_files, refuse_system_error
from d2v_fast.data.listing import FileKinds, Listing, count_endings
from d2v_fast.files.reading import printable, read_json
from d2v_fast.interop.huggingface import import_model
from d2v_fast.interop.sources import explain
from d2v_fast.modalities.speech.config import SpeechDataConfig, SpeechModelConfig
from d2v_fast.modalities.text.config import TextDataConfig, TextModelConfig
from d2v_fast.modalities.vision.config import VisionDataConfig, VisionModelConfig
from d2v_fast.models.student import Student

PREPROCESSOR = "preprocessor_config.json"
# bytes of a line, and of a file of lines
MAX_LINE = 1 << 20
MAX_TEXT_BYTES = 1 << 40
# files that are decoded ahead
READ_AHEAD = 32

_log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """A sample that could be read.

    Attributes:
        name: its path below the inputs, and the number of the line for text; printable.
        parts: what the encoder takes: pixels `[C, H, W]`, waveforms `[N]` or tokens `[T]`, mostly one.
        num_bytes: of the file that it takes.
    """

    name: str
    parts: list[Tensor]
    num_bytes: int


class Source(ABC):
    """Samples, and the encoder that reads them.

    Args:
        model: the encoder.
        origin: of the encoder, for messages.
        inputs: a folder, or a file.
        kinds: which files to read.
        follow: links that lead out of the folder.
        paths: of these files below `inputs`, in this order; None reads all.
    Attributes:
        what: a sample, in a word.
        listing: which files are read, and which others are not.
        num_bytes: of all files.
        num_cut: lines that were too long, so far.
        padding: what stands behind the end of a shorter sample.
        num_places: from the length of a part to the places that it becomes; None where all are alike.
    """

    what: str
    num_bytes = 0
    num_cut = 0
    padding = 0.0
    num_places: Callable[[int], int] | None = None

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        kinds: FileKinds,
        follow: bool,
        paths: list[str] | None = None,
    ) -> None:
        self.model, self.origin = model, origin
        root = os.path.abspath(inputs)
        self._inside = None if follow else os.path.realpath(root)
        if paths is not None:
            self._root, self._paths, self.listing = root, paths, Listing(count_endings(paths))
        elif os.path.isfile(root) and root.lower().endswith(kinds.read):
            self._root, name = os.path.split(root)
            self._paths, self._inside = [name], None
            self.listing = Listing(count_endings(self._paths))
        elif not os.path.isdir(root):
            raise DataError(f"`INPUTS` must be a folder of {self.what}s, but '{printable(str(inputs))}' is none.")
        else:
            self._root = root
            try:
                self._paths, self.listing = find_files(root, self._inside, kinds)
            except DataError as error:
                raise DataError(str(error).replace("`d2v.data.path`", "`INPUTS`")) from None
        self.num_bytes = sum(map(self._size, self._paths))

    @abstractmethod
    def samples(self) -> Iterator[Sample | str]:
        """Samples in the order of sorted paths; what cannot be read as `path: reason`."""

    def problem(self) -> str | None:
        """What is wrong with the samples that were read so far, for the user; None: nothing."""
        return None

    def _absolute(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _size(self, path: str) -> int:
        try:
            return os.stat(self._absolute(path)).st_size
        except OSError:
            # whoever reads it says why it cannot be read
            return 0

    def _decoded(self, decode: Callable[[str], list[Tensor]]) -> Iterator[Sample | str]:
        """Files, some of them at a time, each by a thread of its own."""

        def read(path: str) -> Sample | str:
            try:
                return Sample(printable(path), decode(self._absolute(path)), self._size(path))
            except UnreadableFile as error:
                return printable(f"{path}: {error}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self._paths), READ_AHEAD):
                yield from pool.map(read, self._paths[start : start + READ_AHEAD])


class Images(Source):
    """Images as a run sees them when it is probed: the largest square in the middle."""

    what = "image"

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: VisionModelConfig,
        data: VisionDataConfig,
        paths: list[str] | None = None,
    ) -> None:
        from d2v_fast.modalities.vision.decode import Limits
        from d2v_fast.modalities.vision.images import KINDS

        super().__init__(model, origin, inputs, KINDS, data.follow_outside, paths)
        self._limits = Limits(data.max_image_pixels, data.max_image_bytes, data.min_image_side, self._inside)
        self._size_px, self._channels = config.image_size, config.channels
        self._bit_depth, self._has_told_dim = data.bit_depth, False
        # per channel, in gray levels
        self._mean, self._std = (np.array(v, np.float32)[:, None, None] * 255 for v in (data.mean, data.std))

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        yield from self._decoded(self._decode)

    def _decode(self, path: str) -> list[Tensor]:
        from d2v_fast.modalities.vision.decode import center_box, read_square

        note = None if self._has_told_dim else functools.partial(self._tell_dim, path)
        square = read_square(
            path, self._size_px, self._channels, center_box, self._limits, bit_depth=self._bit_depth, note=note
        )
        levels = np.atleast_3d(np.asarray(square)).transpose(2, 0, 1).astype(np.float32)
        return [torch.from_numpy((levels - self._mean) / self._std)]

    def _tell_dim(self, path: str, dim: Any) -> None:
        # of several threads, each may tell it once
        self._has_told_dim = True
        _log.warning("%s: %s (of a Transformers folder: `bit_depth` in its %s)", printable(path), dim, PREPROCESSOR)


class Recordings(Source):
    """Whole recordings; those that are longer than a step of training takes are encoded in parts of equal length."""

    what = "recording"

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: SpeechModelConfig,
        data: SpeechDataConfig,
        paths: list[str] | None = None,
    ) -> None:
        from d2v_fast.modalities.speech.audio import KINDS
        from d2v_fast.modalities.speech.decode import AudioLimits, import_audio

        import_audio("soundfile")
        super().__init__(model, origin, inputs, KINDS, data.follow_outside, paths)
        self._limits = AudioLimits(config.sample_rate, data.max_file_bytes, data.silence, self._inside)
        self._fewest = config.receptive_field
        self._most = max(int(data.max_seconds * config.sample_rate), 2 * self._fewest)
        self.num_places = config.num_frames

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        yield from self._decoded(self._decode)

    def _decode(self, path: str) -> list[Tensor]:
        from d2v_fast.modalities.speech.audio import normalized
        from d2v_fast.modalities.speech.decode import read_whole

        wave = normalized(read_whole(path, self._limits))
        if len(wave) < self._fewest:
            raise UnreadableFile(f"{len(wave)} samples are fewer than make a frame ({self._fewest})")
        return list(wave.tensor_split(-(-len(wave) // self._most)))


class Middles(Recordings):
    """The middle of each recording: at most `max_seconds` of it, and no more than a step of training takes."""

    def __init__(
        self,
        model: Student,
        inputs: Path,
        config: SpeechModelConfig,
        data: SpeechDataConfig,
        paths: list[str],
        max_seconds: float,
    ) -> None:
        super().__init__(model, "", inputs, config, data, paths)
        self._most = min(self._most, max(int(max_seconds * config.sample_rate), 2 * self._fewest))

    def _decode(self, path: str) -> list[Tensor]:
        from d2v_fast.modalities.speech.audio import normalized
        from d2v_fast.modalities.speech.decode import read_header, read_part

        if read_header(path, self._limits).length(self._limits.sample_rate) <= self._most:
            return [torch.cat(super()._decode(path))]
        return [normalized(read_part(path, self._most, 0.5, self._limits))]


class Lines(Source):
    """Lines of .txt files, compressed or not, that are not empty, between begin and end token."""

    what = "line"

    def __init__(
        self,
        model: Student,
        origin: str,
        inputs: Path,
        config: TextModelConfig,
        data: TextDataConfig,
        tokenizer: Any,
        paths: list[str] | None = None,
    ) -> None:
        from d2v_fast.modalities.text.files import KINDS
        from d2v_fast.modalities.text.round_trip import RoundTrip

        read = tuple(ending for ending in KINDS.read if ending.startswith(".txt"))
        others = [ending for ending in KINDS.read if ending not in read]
        unread = {**KINDS.unread, **dict.fromkeys(others, "write one line per sample into a .txt file")}
        kinds = FileKinds("lines of text", read, unread)
        super().__init__(model, origin, inputs, kinds, data.follow_outside, paths)
        tokenizer.fit(config)
        self._tokenizer, self._kept = tokenizer, RoundTrip()
        self._replaces = data.encoding_errors == "replace"
        self._most = config.max_positions - 2
        self.padding = float(tokenizer.specials.pad)
        self.num_places = lambda length: length

    def samples(self) -> Iterator[Sample | str]:
        """See `Source`."""
        for path in self._paths:
            try:
                yield from self._of_file(path)
            except (OSError, UnreadableFile) as error:
                refuse_system_error(error, path)
                yield printable(f"{path}: {error}")

    def problem(self) -> str | None:
        """See `Source`: what the tokenizer loses."""
        return self._kept.problem(self._tokenizer.name)

    def _of_file(self, path: str) -> Iterator[Sample | str]:
        from d2v_fast.modalities.text.files import REPLACEMENT
        from d2v_fast.modalities.text.streams import check_byte_order_mark, open_text

        with open_text(self._absolute(path), self._inside, MAX_TEXT_BYTES) as stream:
            number = before = 0
            while line := stream.content.readline(MAX_LINE):
                number += 1
                if number == 1:
                    check_byte_order_mark(line)
                if len(line) == MAX_LINE:
                    raise UnreadableFile(f"line {number} and what follows: longer than {MAX_LINE:,} bytes")
                name = printable(f"{path}:{number}")
                try:
                    encoding = "utf-8-sig" if number == 1 else "utf-8"
                    text = line.decode(encoding, "replace" if self._replaces else "strict").strip()
                except UnicodeDecodeError:
                    yield f"{name}: not UTF-8"
                    continue
                if "\0" in text:
                    if not self._replaces:
                        # such as UTF-16 without a byte order mark
                        yield f"{name}: no text: it has zero bytes"
                        continue
                    text = text.replace("\0", REPLACEMENT)
                if text:
                    # of the file, which may be compressed
                    position = stream.file.tell()
                    yield self.sample(name, text, position - before)
                    before = position

    def sample(self, name: str, text: str, num_bytes: int = 0) -> Sample:
        """The sample of a text."""
        ids, _ = self._tokenizer.encode([text])
        self.num_cut += len(ids) > self._most
        self._kept.add(self._tokenizer, [text])
        specials = self._tokenizer.specials
        tokens = torch.tensor([specials.bos, *ids[: self._most].tolist(), specials.eos])
        return Sample(name, [tokens], num_bytes)


def open_source(
    model: Path, inputs: Path, weights: str | None = None, step: int | None = None, tokenizer: Path | None = None
) -> Source:
    """An encoder, and what it is to read.

    Args:
        model: a run folder, or a Transformers folder.
        inputs: see `embed`.
        weights, step: of a run folder.
        tokenizer: of a text model; None is what the run names, or the folder holds.
    Raises:
        ValueError: `model` is neither, or cannot be read; `inputs` holds nothing; an option does not apply.
    """
    config: Any
    data: Any
    if _is_run(model):
        run = read_run_config(model)
        chosen = weights or "student"
        with open_checkpoint(model, step) as checkpoint:
            student, config, data = load_encoder(checkpoint, run, chosen), run.model, run.data
        origin = f"{chosen} of {model}, step {checkpoint.step}"
    else:
        if weights is not None or step is not None:
            raise OptionError(f"`--weights` and `--step` are for run folders, and {model} is a Transformers folder.")
        run, data = None, None
        student, config = import_model(model)
        origin = f"model in {model}"
    if tokenizer is not None and not isinstance(config, TextModelConfig):
        raise OptionError(f"`--tokenizer` is for models of text, and that in {model} is none.")
    if isinstance(config, VisionModelConfig):
        return Images(student, origin, inputs, config, data or _image_preparation(model, config))
    if isinstance(config, SpeechModelConfig):
        return Recordings(student, origin, inputs, config, data or SpeechDataConfig())
    if isinstance(run, TextConfig):
        found = run_tokenizer(run, tokenizer, checkpoint.state.get("vocabulary"), str(model))
    else:
        from d2v_fast.modalities.text.tokenizer import load_tokenizer

        found = load_tokenizer(tokenizer or model)
    return Lines(student, origin, inputs, config, data or TextDataConfig(), found)


def _is_run(folder: Path) -> bool:
    path = folder / "config.json"
    if (folder / "checkpoints").is_dir():
        # its configuration may be damaged, and be found all the same
        return True
    if not path.is_file():
        reason = explain(folder) or f"`{folder}` holds no config.json."
        raise ValueError(f"`MODEL` must be a run folder or a Transformers folder. {reason}")
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"`MODEL` must be a run folder or a Transformers folder, but {path}: {error}") from None
    return isinstance(raw, dict) and "d2v" in raw


def _image_preparation(folder: Path, model: VisionModelConfig) -> VisionDataConfig:
    """Mean and deviation that a Transformers folder names; those of ImageNet where it names none."""
    path = folder / PREPROCESSOR
    try:
        raw = read_json(path, MAX_FILE_BYTES) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must be a preprocessor's configuration, but: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"`{path}` must hold one section {{...}}, but does not.")
    named = {"mean": "image_mean", "std": "image_std", "bit_depth": "bit_depth"}
    data, problems = check(VisionDataConfig, {ours: raw[theirs] for ours, theirs in named.items() if theirs in raw})
    if data is None:
        raise ValueError(f"`{path}` names no preparation of images: {problems[0]}")
    for values, key in ((data.mean, "image_mean"), (data.std, "image_std")):
        if len(values) not in (1, model.channels):
            raise ValueError(f"`{key}` in {path} must hold {model.channels} values, but holds {len(values)} instead.")
    return data
