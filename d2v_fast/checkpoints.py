"""Checkpoints that are complete or absent, and checked before they are used.

`checkpoints/step-N/` is written under another name, flushed to the disk, and renamed last; a process that dies at any
moment leaves the previous checkpoints as they were. `manifest.json` holds size and SHA-256 of every file: a checkpoint
with a single changed byte is passed over for the one before it. Nothing in it is loaded with pickle: weights are
safetensors, the rest is JSON and torch files read with `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from d2v_fast.faults import fault_point
from d2v_fast.untrusted import read_json
from d2v_fast.world import RunError, World

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64_000_000
_NAME = re.compile(r"step-(\d+)")
_TEMPORARY = re.compile(r"step-\d+\.tmp-\w+")
_FILE = re.compile(r"[\w.-]+(/[\w.-]+)*")
# scripts that DeepSpeed drops beside its files
_STRAY = ("zero_to_fp32.py", "zero_to_torch.py")


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder, and what its `state.json` holds."""

    folder: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `NAME.safetensors`."""
        from safetensors.torch import load_file

        return load_file(self.folder / f"{name}.safetensors")


class Checkpoints:
    """The `checkpoints` folder of a run. Every method is called by all processes.

    Args:
        folder: may not exist yet.
        keep: how many complete checkpoints stay.
        world: the first process writes, all agree on what was found.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder = folder
        self.keep = keep
        self.world = world

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Mapping[str, Tensor]]],
        save_engine: Callable[[Path], None],
    ) -> None:
        """Write `step-<step>`; nothing happens where it exists already.

        Args:
            step: optimizer steps made.
            state: what JSON can express; goes to `state.json`.
            tensors: by file name and tensor name; called in the first process only.
            save_engine: writes further files into the folder; called in every process.
        Raises:
            RunError: it could not be written. The checkpoints before it are untouched.
        """
        started = self.world.decide(lambda: self._begin(step))
        if started is None:
            return
        temporary = self.folder / started
        fault_point("save.begin")
        failure: Exception | None = None
        try:
            save_engine(temporary)
        except Exception as error:
            failure = error
        if self.world.any(failure is not None):
            self._give_up(step, temporary, failure)
        fault_point("save.engine")

        def finish() -> None:
            try:
                self._finish(step, temporary, state, tensors())
            except Exception as error:
                self._give_up(step, temporary, error)

        self.world.decide(finish)

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
            tell: is told about every damaged one that is passed over.
        Raises:
            RunError: there are checkpoints, and every one is damaged.
        """
        name = self.world.decide(lambda: self._find(tell))
        if name is None:
            return None
        folder = self.folder / name
        return Checkpoint(folder, json.loads((folder / "state.json").read_text()))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _begin(self, step: int) -> str | None:
        """Make the temporary folder and return its name; None where the checkpoint exists."""
        if (self.folder / f"step-{step}").exists():
            return None
        for entry in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            # of a process that died: the lock on the run folder says that no one else is writing
            if _TEMPORARY.fullmatch(entry.name):
                shutil.rmtree(entry)
        name = f"step-{step}.tmp-{os.getpid()}"
        (self.folder / name).mkdir(parents=True)
        return name

    def _finish(
        self, step: int, temporary: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        from safetensors.torch import save_file

        for name, values in tensors.items():
            on_host = {key: value.detach().cpu().contiguous() for key, value in values.items()}
            save_file(on_host, temporary / f"{name}.safetensors")
            fault_point("save.tensors")
        (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
        for stray in _STRAY:
            (temporary / stray).unlink(missing_ok=True)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            _flush(path)
        fault_point("save.manifest")
        entries = {str(path.relative_to(temporary)): _fingerprint(path) for path in files}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=1))
        _flush(temporary / MANIFEST)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            _flush(folder)
        fault_point("save.rename")
        temporary.rename(self.folder / f"step-{step}")
        _flush(self.folder)
        fault_point("save.retention")
        for old in self.steps()[self.keep :]:
            # renamed first, so that no half-deleted checkpoint ever carries a good name
            doomed = (self.folder / f"step-{old}").rename(self.folder / f"step-{old}.tmp-old")
            fault_point("save.delete")
            shutil.rmtree(doomed)

    def _give_up(self, step: int, temporary: Path, error: Exception | None) -> None:
        if self.world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        steps = self.steps()
        intact = f"step-{steps[0]} before it is intact" if steps else "there is none before it"
        reason = "another process failed" if error is None else f"{type(error).__name__}: {error}"
        free = shutil.disk_usage(self.folder).free
        raise RunError(
            f"the checkpoint step-{step} could not be written to {self.folder} ({free / 1e6:.0f} MB free): {reason}. "
            f"{intact.capitalize()}; make room and use --resume."
        ) from error

    def _find(self, tell: Callable[[str], None]) -> str | None:
        damaged = [f"{path.name} was found damaged before" for path in self.folder.glob("step-*.damaged")]
        for step in self.steps():
            problem = verify(self.folder / f"step-{step}", step)
            if problem is None:
                return f"step-{step}"
            damaged.append(f"checkpoint step-{step} is damaged ({problem})")
            # out of the way, so that the run can save under this name again
            aside = self.folder / f"step-{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / f"step-{step}").rename(aside)
            tell(f"{damaged[-1]}: kept as {aside.name}, falling back to the one before it")
        if damaged:
            raise RunError(
                f"no usable checkpoint in {self.folder}: {'; '.join(damaged)}. Remove that folder to begin again."
            )
        return None


def verify(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of it."""
    try:
        manifest = read_json(folder / MANIFEST, MAX_MANIFEST_BYTES)
        if manifest["step"] != step:
            return f"{MANIFEST} is of step {manifest['step']}"
        files = dict(manifest["files"])
        if "state.json" not in files:
            return f"{MANIFEST} does not list state.json"
        for name, expected in files.items():
            if not _FILE.fullmatch(name) or ".." in name.split("/"):
                return f"{MANIFEST} names {name!r}, which is not a file in the folder"
            if not (folder / name).is_file() or (folder / name).is_symlink():
                return f"{name} is missing"
            found = _fingerprint(folder / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
            if found["sha256"] != expected["sha256"]:
                return f"{name} has another content than was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}: {error}"
    return None


def require_same_tensors(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """RunError that lists what differs, where names or shapes do."""
    lines = [f"{name} is not in the checkpoint" for name in expected if name not in saved]
    lines += [f"{name} is only in the checkpoint" for name in saved if name not in expected]
    lines += [
        f"{name} is {list(saved[name].shape)} in the checkpoint and {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in saved and saved[name].shape != value.shape
    ]
    if lines:
        shown = "\n  ".join(lines[:8] + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else []))
        raise RunError(f"the checkpoint's {what} is of another model:\n  {shown}")


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
