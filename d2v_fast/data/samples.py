"""Identify the samples of a data set by digests, which a checkpoint holds and a resumed run compares."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from d2v_fast.files.io_errors import error_number, is_of_system

if TYPE_CHECKING:
    from d2v_fast.data.files import PathList

__all__ = ["SampleSource", "Samples", "digest_of", "file_sizes"]

# threads, because asking for a size mostly waits for the file system
NUM_THREADS = 16
SIZES_AT_A_TIME = 1024


class SampleSource(Protocol):
    """A data set that can identify its samples."""

    def names_digest(self) -> str:
        """Return the digest of the samples' names and order; see `Samples.names`."""
        ...

    def sizes_digest(self) -> str:
        """Return the digest of the samples' sizes; see `Samples.sizes`. It reads no file."""
        ...


class Samples(NamedTuple):
    """The identity of a data set's samples, in the order of their ids.

    Attributes:
        what: a noun for one sample, as `BatchMaker.what`.
        number: number of samples.
        names: digest of the names below the data path; for text, of the tokens.
        sizes: digest of file sizes and, if they vary, of lengths; for text, of how tokens are divided into blocks.
    """

    what: str
    number: int
    names: str
    sizes: str

    def difference(self, now: Samples) -> str | None:
        """Describe how the samples `now` differ from these. Return None if they do not."""
        if self[1:] == now[1:]:
            return None
        if self.number != now.number:
            return f"{self.number:,} {self.what}s then and {now.number:,} now"
        if self.names != now.names:
            other = "other tokens" if self.what == "block" else "others of them: names or their order differ"
            return f"{now.number:,} {self.what}s then and now, but {other}"
        other = "divided otherwise" if self.what == "block" else "files of other sizes or lengths under the same names"
        return f"{now.number:,} {self.what}s then and now, but {other}"


def digest_of(*parts: bytes | npt.NDArray[np.generic]) -> str:
    """Return the SHA-256 of the parts and their lengths, in hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes()
        state.update(f"{len(content)}:".encode())
        state.update(content)
    return state.hexdigest()


def file_sizes(root: str, paths: PathList) -> npt.NDArray[np.int64]:
    """Return the size in bytes of every file, int64 `[len(paths)]`; -1 for a file that is gone.

    Raises:
        OSError: a size cannot be read because of an error that may be temporary.
    """
    sizes = np.full(len(paths), -1, dtype=np.int64)

    def ask(start: int) -> None:
        for index in range(start, min(start + SIZES_AT_A_TIME, len(paths))):
            try:
                sizes[index] = os.stat(os.path.join(root, paths[index])).st_size
            except OSError as error:
                if is_of_system(error) or error_number(error) == errno.EIO:
                    # a temporary error must not look like changed data
                    raise

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # consume the results, so that an error of a thread is raised here
        list(pool.map(ask, range(0, len(paths), SIZES_AT_A_TIME)))
    return sizes
