"""Tensors of a checkpoint, as the processes that hold them wrote them, and read into any other division.

`shard-00000.safetensors` of process 0, and so on, hold fp32 ranges under `KIND/NAME`, or `KIND/NAME@START` where the
range is not the whole parameter: then it is 1-D and `START` is its first element in the flat parameter. The kinds are
`student`, `teacher`, `exp_avg` and `exp_avg_sq`. What every process holds is written by the first one only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.atomic import write_tensors
from d2v_fast.shards import Shard
from d2v_fast.world import RunError


class Kept(NamedTuple):
    """A range of a parameter, and what is kept of it: `shard.master` is the tensor that is written and read."""

    kind: str
    shard: Shard


class _Piece(NamedTuple):
    start: int
    stop: int
    file: Any
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
        folder: of a verified checkpoint.
        shapes: of whole tensors, by `KIND/NAME`.
        rank, world_size: of this process: the files are opened beginning with the one that likely holds its ranges,
            and no more of them than needed.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]], rank: int = 0, world_size: int = 1) -> None:
        self.shapes = shapes
        self._folder = folder
        files = sorted(folder.glob("shard-*.safetensors"))
        first = rank * len(files) // world_size
        self._unopened = [*files[first:], *files[:first]]
        self._pieces: dict[str, list[_Piece]] = {}

    def read(self, kept: Kept) -> None:
        """Fill `kept.shard.master`.

        Raises:
            RunError: the checkpoint does not hold all of this range.
        """
        shard = kept.shard
        self._fill(f"{kept.kind}/{shard.name}", shard.start, shard.master)

    def whole(self, name: str) -> Tensor:
        """The whole tensor `KIND/NAME`, in host memory.

        Raises:
            RunError: a part of it is missing.
        """
        tensor = torch.empty(list(self.shapes[name]), dtype=torch.float32)
        self._fill(name, 0, tensor.view(-1))
        return tensor

    @torch.no_grad()
    def _fill(self, name: str, start: int, target: Tensor) -> None:
        position, stop = start, start + target.numel()
        while position < stop:
            piece = self._piece_at(name, position)
            last = min(stop, piece.stop)
            section = slice(position - piece.start, last - piece.start)
            if piece.is_whole:
                values = piece.file.get_tensor(piece.key).view(-1)[section]
            else:
                values = piece.file.get_slice(piece.key)[section]
            target[position - start : last - start].copy_(values)
            position = last

    def _piece_at(self, name: str, position: int) -> _Piece:
        while True:
            for piece in self._pieces.get(name, []):
                if piece.start <= position < piece.stop:
                    return piece
            if not self._unopened:
                raise RunError(f"the checkpoint {self._folder} does not hold all of {name}: from {position} on.")
            self._open(self._unopened.pop(0))

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise RunError(f"{path} is damaged ({error}). Resume the run: it passes over what is damaged.") from None
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            name, _, start = key.partition("@")
            begin, count = int(start or 0), 1
            for size in file.get_slice(key).get_shape():
                count *= size
            self._pieces.setdefault(name, []).append(_Piece(begin, begin + count, file, key, not start))
