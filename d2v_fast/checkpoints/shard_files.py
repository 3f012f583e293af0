"""The tensor files of a checkpoint: each process writes its ranges, and any other division can read them.

Process 0 writes `shard-00000.safetensors`, and so on. A file holds fp32 ranges under `KIND/NAME`, or under
`KIND/NAME@START` if a range is not the whole parameter; it is then 1-D, and `START` is its first element in the flat
parameter. The kinds are `student`, `teacher`, `exp_avg` and `exp_avg_sq`. Replicated ranges are written by process 0
only.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.distributed.shards import Shard
from d2v_fast.errors import RunError
from d2v_fast.files.atomic import write_tensors
from d2v_fast.files.reading import open_regular, printable

_DTYPES = ("F64", "F32", "BF16", "F16")
_NUMBER = re.compile(r"\(([0-9]{1,4})\)\s*$")
# more digits than a tensor in memory can have
_START = re.compile(r"0|[1-9][0-9]{0,17}")


class Kept(NamedTuple):
    """A range of a parameter in a checkpoint: `shard.master` is the tensor that is written and read."""

    kind: str
    shard: Shard


class DamageError(ValueError):
    """The content of a checkpoint is missing or wrong."""


class HeldFile:
    """A regular file that stays open, so that the content that is read is the content that was checked.

    Args:
        path: The file.
        below: A folder that contains it; no part of the path beneath that folder may be a link.
    Attributes:
        path: As given.
        size: Size in bytes.
    Raises:
        NotRegularError: It is not a regular file, or is reached through a link.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, below: Path) -> None:
        self.path = path
        with open_regular(path, below=below) as file:
            # keep the descriptor only: a file object warns if it is collected before it is closed
            self._handle = os.dup(file.fileno())
        self._finalizer = weakref.finalize(self, os.close, self._handle)
        self._status = os.fstat(self._handle)
        self.size = self._status.st_size

    def close(self) -> None:
        """Close the file, as also happens when the last reference to this object is gone."""
        self._finalizer()

    def read(self, max_bytes: int) -> bytes:
        """Return the content.

        Raises:
            ValueError: It is longer than `max_bytes`.
            OSError: It cannot be read, or has changed since it was opened.
        """
        if self.size > max_bytes:
            raise ValueError(f"longer than {max_bytes:,} bytes.")
        return b"".join(self._blocks())

    def digest(self) -> str:
        """Return the SHA-256 of the content, in hexadecimal digits.

        Raises:
            OSError: It cannot be read, or has changed since it was opened.
        """
        found = hashlib.sha256()
        for block in self._blocks():
            found.update(block)
        return found.hexdigest()

    def open_tensors(self) -> Any:
        """Return a safetensors reader of the open file, even if its path leads to another file by now.

        Raises:
            DamageError: It is not a safetensors file.
            OSError: It cannot be opened once more.
        """
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(f"/proc/self/fd/{self._handle}", framework="pt")
        except SafetensorError as error:
            raise DamageError(f"{self.path.name} is no safetensors file: {error}") from None
        except FileNotFoundError:
            # safetensors raises this for any reason; the usual one is too many open files
            raise OSError(errno.EMFILE, "cannot be opened once more", str(self.path)) from None
        except RuntimeError as error:
            # torch maps the file; its message ends with the number of the system error
            found = _NUMBER.search(str(error))
            raise OSError(int(found[1]) if found else errno.EIO, str(error), str(self.path)) from None

    def require_unchanged(self) -> None:
        """Raise an OSError if the file was written to since it was opened."""
        now = os.fstat(self._handle)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise OSError(errno.EBUSY, "was changed while it was read", str(self.path))

    def _blocks(self) -> Iterator[bytes]:
        position = 0
        while block := os.pread(self._handle, 1 << 20, position):
            position += len(block)
            yield block
        self.require_unchanged()


class _Piece(NamedTuple):
    start: int
    stop: int
    held: HeldFile
    tensors: Any
    key: str
    is_whole: bool


def copy_to_host(kept: Sequence[Kept], *, even_if_there: bool) -> dict[str, Tensor]:
    """Return the tensors of this process's file by key, in host memory.

    Args:
        kept: The ranges to write.
        even_if_there: Copy tensors that are in host memory already, because training changes them while they are
            written.
    """
    tensors = {}
    for kind, shard in kept:
        value = shard.master.detach()
        # asynchronous on a GPU: one wait for all of them below
        on_host = value.to("cpu", copy=even_if_there, non_blocking=value.device.type != "cpu")
        tensors[f"{kind}/{shard.key}"] = on_host.view(shard.shape) if shard.is_whole else on_host
    if any(shard.master.device.type == "cuda" for _, shard in kept):
        torch.cuda.synchronize()
    return tensors


def write_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of ranges."""
    write_tensors(path, tensors)


class ShardReader:
    """Read ranges from the files of a checkpoint, however they were divided when they were written.

    Args:
        files: All shard files of the checkpoint, with verified content. They must stay open.
        shapes: Shapes of the whole tensors, by `KIND/NAME`.
    Raises:
        DamageError: They do not hold every element of these tensors exactly once, or hold others.
        OSError: A file cannot be read.
    """

    def __init__(self, files: Iterable[HeldFile], shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = shapes
        self._pieces: dict[str, list[_Piece]] = {}
        for held in files:
            self._add(held)
        for name, shape in shapes.items():
            _require_once(name, math.prod(shape), self._pieces.get(name, []))

    def read(self, kept: Kept) -> None:
        """Fill `kept.shard.master`.

        Raises:
            RunError: The checkpoint does not hold all of this range.
            OSError: A file has changed since it was opened.
        """
        shard = kept.shard
        self._fill(f"{kept.kind}/{shard.name}", shard.start, shard.master)

    def whole(self, name: str) -> Tensor:
        """Return the whole tensor `KIND/NAME` in host memory, in fp32.

        Raises:
            OSError: A file has changed since it was opened.
        """
        tensor = torch.empty(list(self.shapes[name]), dtype=torch.float32)
        self._fill(name, 0, tensor.view(-1))
        return tensor

    @torch.no_grad()
    def _fill(self, name: str, start: int, target: Tensor) -> None:
        position, stop = start, start + target.numel()
        for piece in self._pieces.get(name, []):
            if not piece.start <= position < min(stop, piece.stop):
                continue
            last = min(stop, piece.stop)
            section = slice(position - piece.start, last - piece.start)
            if piece.is_whole:
                values = piece.tensors.get_tensor(piece.key).view(-1)[section]
            else:
                values = piece.tensors.get_slice(piece.key)[section]
            target[position - start : last - start].copy_(values)
            piece.held.require_unchanged()
            position = last
        if position < stop:
            raise RunError(f"the checkpoint does not hold all of {name}: from {position} on.")

    def _add(self, held: HeldFile) -> None:
        tensors = held.open_tensors()
        for key in tensors.keys():  # noqa: SIM118 - not a dictionary
            found = tensors.get_slice(key)
            name, mark, start = key.partition("@")
            shape, is_whole = found.get_shape(), not mark
            if name not in self.shapes:
                raise DamageError(f"{held.path.name} holds {printable(name)}, which is no tensor of the checkpoint")
            if found.get_dtype() not in _DTYPES:
                raise DamageError(f"{printable(key)} in {held.path.name} holds {found.get_dtype()} and no real numbers")
            if is_whole and shape != list(self.shapes[name]):
                raise DamageError(f"{name} is {shape} in {held.path.name}, and {self.shapes[name]} in the checkpoint")
            if not is_whole and (len(shape) != 1 or not _START.fullmatch(start)):
                raise DamageError(f"{held.path.name} holds {printable(key)}, which is no range of a tensor")
            first = int(start or 0)
            piece = _Piece(first, first + math.prod(shape), held, tensors, key, is_whole)
            self._pieces.setdefault(name, []).append(piece)


def _require_once(name: str, count: int, pieces: list[_Piece]) -> None:
    """Sort the pieces of a tensor of `count` elements, and check that they hold each element exactly once."""
    pieces.sort(key=lambda piece: piece.start)
    position = 0
    for piece in pieces:
        if piece.start < position:
            raise DamageError(f"{piece.held.path.name} holds {name} from {piece.start} on, which another range holds")
        if piece.start > position:
            break
        position = piece.stop
    if position < count:
        raise DamageError(f"no file holds {name} from {position} on")
    if position > count:
        raise DamageError(f"{name} has {count} elements, but the files hold {position}")
