"""Write small checkpoints as a run does, and edit them with a manifest that still fits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from d2v_fast.checkpoints.files import MANIFEST, STATE, Checkpoint, verified_checkpoint
from d2v_fast.checkpoints.shard_files import Kept
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.distributed.shards import Shard


def kept(kind: str, name: str, value: Tensor) -> Kept:
    """Wrap a whole tensor for writing or reading."""
    return Kept(kind, Shard(name, value.shape, 0, value.view(-1), value, 0, replicated=True))


def save(checkpoints: Checkpoints, step: int, in_background: bool = False, **state: Any) -> Path:
    """Save a checkpoint of two kinds of tensors."""
    tensors = [
        kept("student", "a.weight", torch.full((3, 5), float(step))),
        kept("student", "b", torch.tensor(step, dtype=torch.bfloat16)),
        kept("teacher", "t", torch.randn(4, 3)),
    ]
    checkpoints.save(step, {"skipped": 1, **state}, tensors, in_background=in_background)
    return checkpoints.folder / f"step-{step}"


def opened(folder: Path) -> Checkpoint:
    """Open and verify the checkpoint in `step-N`; it is closed when it is garbage collected."""
    return verified_checkpoint(folder, int(folder.name.removeprefix("step-")))


def write_manifest(folder: Path, *, without: str = "") -> None:
    """Write a manifest with the hashes of all files as they are, except the one named by `without`."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name not in (MANIFEST, without)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change `state.json` of a checkpoint and update the manifest."""
    state = json.loads((folder / STATE).read_text())
    edit(state)
    (folder / STATE).write_text(json.dumps(state))
    write_manifest(folder)


def write_shards_anew(folder: Path, *shards: Mapping[str, Tensor]) -> None:
    """Replace the shards of a checkpoint and update the manifest."""
    for path in folder.glob("shard-*"):
        path.unlink()
    for number, tensors in enumerate(shards):
        save_file(dict(tensors), folder / f"shard-{number:05d}.safetensors")
    write_manifest(folder)
