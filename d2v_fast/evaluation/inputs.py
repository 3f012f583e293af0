"""Samples that an encoder is to encode, and their features.

A modality's `Source` reads files as its encoder was trained on them; `encode` returns the features of what it has read.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_fast.data.files import UnreadableFile, find_files
from d2v_fast.data.listing import FileKinds, Listing, count_endings
from d2v_fast.errors import DataError
from d2v_fast.evaluation.features import patch_features, sequence_features
from d2v_fast.files.reading import printable
from d2v_fast.models.student import Student

Rows = NDArray[np.float32]

# files that are decoded ahead
READ_AHEAD = 32


class Encoder(NamedTuple):
    """A pre-trained encoder, and where it comes from.

    Attributes:
        model: Fp32 on the CPU.
        origin: The encoder in words, such as "student of runs/a, step 7".
        folder: The run folder or the Transformers folder.
        config: The model section of its configuration.
        run: The run's configuration; None for a Transformers folder.
        vocabulary: Digest of the tokenizer that a run trained with; None if there is none or it is unknown.
    """

    model: Student
    origin: str
    folder: Path
    config: Any
    run: Any = None
    vocabulary: str | None = None


class Sample(NamedTuple):
    """A sample that could be read.

    Attributes:
        name: Its path below the inputs, with the number of the line for text; printable.
        parts: Inputs of the encoder, one of them unless the sample is long: pixels `[C, H, W]`, waveforms `[N]` or
            tokens `[T]`.
        num_bytes: Size of its part of the file.
    """

    name: str
    parts: list[Tensor]
    num_bytes: int


class Source(ABC):
    """Samples of files, as an encoder was trained on them.

    Args:
        model: The encoder.
        origin: The encoder in words, for messages.
        inputs: A folder, or a file.
        kinds: The kinds of files to read.
        follow: Read links that lead out of the folder.
        paths: Read only these files below `inputs`, in this order; None reads all.
    Attributes:
        what: A word for a sample, such as "image".
        batch_size: Parts that are encoded together, unless the caller says otherwise.
        listing: The files that are read, and those that are left out.
        num_bytes: Size of all files.
        num_cut: Samples so far of which only the beginning was read.
        padding: Value behind the end of a shorter sequence.
        num_places: From the length of a sequence to the number of its frames or tokens; None if all samples are alike.
    """

    what: ClassVar[str]
    batch_size: ClassVar[int]
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
        """Read the samples in the order of sorted paths; yield `path: reason` for one that cannot be read."""

    def problem(self) -> str | None:
        """Return a warning about the samples read so far, or None."""
        return None

    def _absolute(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _size(self, path: str) -> int:
        try:
            return os.stat(self._absolute(path)).st_size
        except OSError:
            # the error is reported when the file is read
            return 0

    def _decoded(self, decode: Callable[[str], list[Tensor]]) -> Iterator[Sample | str]:
        """Decode the files, `READ_AHEAD` at a time in several threads."""

        def read(path: str) -> Sample | str:
            try:
                return Sample(printable(path), decode(self._absolute(path)), self._size(path))
            except UnreadableFile as error:
                return printable(f"{path}: {error}")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self._paths), READ_AHEAD):
                yield from pool.map(read, self._paths[start : start + READ_AHEAD])


def encode(model: Student, source: Source, samples: Sequence[Sample], batch_size: int | None = None) -> list[Rows]:
    """Return the features `[P, D]` of every sample, fp32; the parts of a sample follow one another.

    Args:
        model: An encoder of the source's modality.
        source: Where the samples come from.
        samples: Samples that it has read.
        batch_size: Parts that are encoded together; None is the source's own number.
    """
    size = source.batch_size if batch_size is None else batch_size
    parts = [part for sample in samples for part in sample.parts]
    if source.num_places is None:
        batches = [torch.stack(parts[start : start + size]) for start in range(0, len(parts), size)]
        features = [rows for batch in batches for rows in patch_features(model, batch, top_k=1).cpu()]
    else:
        features = sequence_features(
            model, parts, num_places=source.num_places, padding=source.padding, batch_size=size
        )
    encoded = iter(features)
    return [torch.cat(list(islice(encoded, len(sample.parts)))).numpy() for sample in samples]
