"""Which samples a data set has, in a form that a checkpoint can hold and a later start can compare."""

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

# sizes are asked for by threads, which mostly wait for the file system
NUM_THREADS = 16
SIZES_AT_A_TIME = 1024


class SampleSource(Protocol):
    """A data set that can say which samples it has."""

    def names_digest(self) -> str:
        """Return a digest of which samples these are, and of their order; see `Samples.names`."""
        ...

    def sizes_digest(self) -> str:
        """Return a digest of their sizes; see `Samples.sizes`. It may look at every file, but reads none."""
        ...


class Samples(NamedTuple):
    """The samples of a data set in the order that their ids count.

    Attributes:
        what: one sample in a word, as `BatchMaker.what`.
        number: of them.
        names: digest of their names below the data path; of text, of its tokens.
        sizes: digest of the sizes of their files, and of their lengths where they differ in length; of text, of how its
            tokens are divided into blocks.
    """

    what: str
    number: int
    names: str
    sizes: str

    def difference(self, now: Samples) -> str | None:
        """Describe in what the samples `now` differ from these; None where nothing does."""
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
    """Return the SHA-256 of bytes and arrays, in hexadecimal digits, with the length of each part."""
    state = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes()
        state.update(f"{len(content)}:".encode())
        state.update(content)
    return state.hexdigest()


def file_sizes(root: str, paths: PathList) -> npt.NDArray[np.int64]:
    """Return the size in bytes of every file, int64 `[len(paths)]`; -1 for a file that is gone.

    Raises:
        OSError: a size is not to be had, for a reason that may pass.
    """
    sizes = np.full(len(paths), -1, dtype=np.int64)

    def ask(start: int) -> None:
        for index in range(start, min(start + SIZES_AT_A_TIME, len(paths))):
            try:
                sizes[index] = os.stat(os.path.join(root, paths[index])).st_size
            except OSError as error:
                if is_of_system(error) or error_number(error) == errno.EIO:
                    # the data have not changed for it
                    raise

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        # a list, so that an error of a thread is raised here
        list(pool.map(ask, range(0, len(paths), SIZES_AT_A_TIME)))
    return sizes
