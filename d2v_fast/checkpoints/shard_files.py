"""Tensors of a checkpoint, as the processes that hold them wrote them, and read into any other division.

`shard-00000.safetensors` of process 0, and so on, hold fp32 ranges under `KIND/NAME`, or `KIND/NAME@START` where the
range is not the whole parameter: then it is 1-D and `START` is its first element in the flat parameter. The kinds are
`student`, `teacher`, `exp_avg` and `exp_avg_sq`. What every process holds is written by the first one only.
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
from d2v_fast.distributed.world import RunError
from d2v_fast.files.atomic import write_tensors
from d2v_fast.files.reading import open_regular, printable

_DTYPES = ("F64", "F32", "BF16", "F16")
_NUMBER = re.compile(r"\(([0-9]{1,4})\)\s*$")
# more digits than a tensor in memory can have
_START = re.compile(r"0|[1-9][0-9]{0,17}")


class Kept(NamedTuple):
    """A range of a parameter, and what is kept of it: `shard.master` is the tensor that is written and read."""

    kind: str
    shard: Shard


class DamageError(ValueError):
    """A checkpoint lacks something that it should hold, or holds something else."""


class HeldFile:
    """A regular file that stays open, so that what is read later is what was checked before.

    Args:
        path: the file.
        below: a folder that it lies in; no part of the path beneath it may be a link.
    Attributes:
        path: as given.
        size: in bytes.
    Raises:
        NotRegularError: it is no regular file, or is reached through a link.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, below: Path) -> None:
        self.path = path
        with open_regular(path, below=below) as file:
            # not the file object, which complains where it is dropped instead of closed
            self._handle = os.dup(file.fileno())
        self._finalizer = weakref.finalize(self, os.close, self._handle)
        self._status = os.fstat(self._handle)
        self.size = self._status.st_size

    def close(self) -> None:
        """Close the file, which also happens when the last reference to it is gone."""
        self._finalizer()

    def read(self, max_bytes: int) -> bytes:
        """Return the content.

        Raises:
            ValueError: it is longer than `max_bytes`.
            OSError: it cannot be read, or was changed since it was opened.
        """
        if self.size > max_bytes:
            raise ValueError(f"longer than {max_bytes:,} bytes.")
        return b"".join(self._blocks())

    def digest(self) -> str:
        """Return the SHA-256 of the content, in hexadecimal digits.

        Raises:
            OSError: it cannot be read, or was changed since it was opened.
        """
        found = hashlib.sha256()
        for block in self._blocks():
            found.update(block)
        return found.hexdigest()

    def open_tensors(self) -> Any:
        """Return the safetensors file that was opened, whatever its path leads to by now.

        Raises:
            DamageError: it is no safetensors file.
            OSError: it cannot be opened once more.
        """
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(f"/proc/self/fd/{self._handle}", framework="pt")
        except SafetensorError as error:
            raise DamageError(f"{self.path.name} is no safetensors file: {error}") from None
        except FileNotFoundError:
            # what safetensors says whatever the reason is; most often there are too many open files
            raise OSError(errno.EMFILE, "cannot be opened once more", str(self.path)) from None
        except RuntimeError as error:
            # torch, which maps the file, has the number of the system's error at the end of its message
            found = _NUMBER.search(str(error))
            raise OSError(int(found[1]) if found else errno.EIO, str(error), str(self.path)) from None

    def require_unchanged(self) -> None:
        """OSError if the file was written to since it was opened."""
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
    """What goes into this process's file, by key, in host memory.

    Args:
        even_if_there: copy what is in host memory already, because training goes on while it is written.
    """
    tensors = {}
    for kind, shard in kept:
        value = shard.master.detach()
        # queued on a GPU: waited for once, below
        on_host = value.to("cpu", copy=even_if_there, non_blocking=value.device.type != "cpu")
        tensors[f"{kind}/{shard.key}"] = on_host.view(shard.shape) if shard.is_whole else on_host
    if any(shard.master.device.type == "cuda" for _, shard in kept):
        torch.cuda.synchronize()
    return tensors


def write_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of ranges."""
    write_tensors(path, tensors)


class ShardReader:
    """Reads ranges out of the files of a checkpoint, in whatever division they were written.

    Args:
        files: of ranges, all that the checkpoint has, with the content that was written. They must stay open.
        shapes: of whole tensors, by `KIND/NAME`.
    Raises:
        DamageError: they do not hold every element of these tensors exactly once, or hold others.
        OSError: one cannot be read.
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
            RunError: the checkpoint does not hold all of this range.
            OSError: a file was changed since it was opened.
        """
        shard = kept.shard
        self._fill(f"{kept.kind}/{shard.name}", shard.start, shard.master)

    def whole(self, name: str) -> Tensor:
        """Return the whole tensor `KIND/NAME`, in host memory.

        Raises:
            OSError: a file was changed since it was opened.
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
        for key in tensors.keys():  # noqa: SIM118 - it is no dictionary
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
    """Sort the pieces of a tensor of `count` elements; DamageError unless they hold each element exactly once."""
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
