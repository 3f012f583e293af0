"""Checkpoints that are complete or absent, and checked before they are used.

`checkpoints/step-N/` is written under another name, flushed to the disk, and renamed last; a process that dies at any
moment leaves the previous checkpoints as they were. `manifest.json` holds size and SHA-256 of every file: a checkpoint
with a single changed byte is passed over for the one before it. Nothing in it is loaded with pickle: the tensors are
in safetensors files, the rest is JSON.

Every process writes the ranges that it trains into a file of its own; `shard_files.py` says how, and reads them back
into any other division. Training waits for the copy to host memory and no longer: a thread writes it to the disk, and
the checkpoint gets its name when all processes are through.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from d2v_fast.checkpoint_hold import alone_with
from d2v_fast.commands import resume_command
from d2v_fast.faults import fault_point
from d2v_fast.io_errors import advice
from d2v_fast.shard_files import Kept, ShardReader, copy_to_host, write_shards
from d2v_fast.untrusted import read_json
from d2v_fast.world import RunError, World

MANIFEST, STATE = "manifest.json", "state.json"
MAX_MANIFEST_BYTES = 64_000_000
MAX_STATE_BYTES = 64_000_000
_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"step-\d+\.tmp-\w+")
_FILE = re.compile(r"[\w.-]+(/[\w.-]+)*")


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder, and what its `state.json` holds."""

    folder: Path
    state: dict[str, Any]

    def reader(self, world: World) -> ShardReader:
        """Reads its tensors into whatever this process trains."""
        return ShardReader(self.folder, self.state["shapes"], world.rank, world.size)


class _Writing:
    """A checkpoint on its way to the disk: what this process writes, in a thread of its own or at once."""

    def __init__(
        self, step: int, folder: Path, state: Mapping[str, Any], file: str, tensors: dict[str, Tensor]
    ) -> None:
        self.step, self.folder, self.state = step, folder, state
        self.failure: Exception | None = None
        self.written: dict[str, Any] = {}
        self._file, self._tensors = file, tensors
        self._thread: threading.Thread | None = None

    def start(self, in_background: bool) -> None:
        if in_background:
            self._thread = threading.Thread(target=self._run, name="checkpoint")
            self._thread.start()
        else:
            self._run()

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            if self._tensors:
                _require_finite(self._tensors)
                path = self.folder / self._file
                write_shards(path, self._tensors)
                self._tensors = {}
                fault_point("save.tensors")
                _flush(path)
                self.written = {path.name: _fingerprint(path)}
        except Exception as error:
            # raised by the process that asks for it, together with the others
            self.failure = error


class Checkpoints:
    """The `checkpoints` folder of a run. Every method is called by all processes.

    Args:
        folder: may not exist yet.
        keep: how many complete checkpoints stay.
        world: the first process names and finishes them, all agree on what was found.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder = folder
        self.keep = keep
        self.world = world
        self._writing: _Writing | None = None

    def save(self, step: int, state: Mapping[str, Any], kept: Sequence[Kept], *, in_background: bool = False) -> None:
        """Write `step-<step>`; nothing happens where it exists already. An earlier one that is still being written is
        waited for.

        Args:
            step: optimizer steps made.
            state: what JSON can express; goes to `state.json`.
            kept: the ranges that this process trains, see `shard_files.Kept`.
            in_background: return when the values are copied to host memory; `advance` and `finish` do the rest.
        Raises:
            RunError: it, or the earlier one, could not be written. The checkpoints before it are untouched.
        """
        self.finish()
        own = [entry for entry in kept if self.world.is_first or not entry.shard.replicated]
        num_bytes = sum(self.world.collect(sum(shard.master.nbytes for _, shard in own)))
        started = self.world.decide(partial(self._begin_or_give_up, step, num_bytes))
        if started is None:
            return
        temporary = self.folder / started
        fault_point("save.begin")
        shapes = {f"{kind}/{shard.name}": list(shard.shape) for kind, shard in kept}
        if self.world.any(any(not shard.is_whole for _, shard in kept)):
            # no process knows the parameters that it trains nothing of
            shapes = {name: shape for known in self.world.collect(shapes) for name, shape in known.items()}
        failure: Exception | None = None
        try:
            tensors = copy_to_host(own, even_if_there=in_background)
        except Exception as error:
            failure = error
        self._require_success(step, temporary, failure)
        fault_point("save.copy")
        content = {**state, "step": step, "shapes": shapes}
        self._writing = _Writing(step, temporary, content, f"shard-{self.world.rank:05d}.safetensors", tensors)
        self._writing.start(in_background)
        if not in_background:
            self.finish()

    def advance(self) -> None:
        """Give a checkpoint that was written in the background its name, if all processes are through with it.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is not None and not self.world.any(self._writing.is_busy):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.join()
        self._require_success(writing.step, writing.folder, writing.failure)
        files = {name: print_ for known in self.world.collect(writing.written) for name, print_ in known.items()}

        def name() -> None:
            try:
                self._name(writing, files)
            except Exception as error:
                self._give_up(writing.step, writing.folder, self._described(error))

        self.world.decide(name)

    def newest(self, tell: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
            tell: is told about every damaged one that is passed over.
        Raises:
            RunError: there are checkpoints, and every one is damaged.
        """
        steps = self.world.decide(self.steps)
        damaged = self.world.decide(
            lambda: [f"{path.name} was found damaged before" for path in self.folder.glob("step-*.damaged")]
        )
        for step in steps:
            folder = self.folder / f"step-{step}"
            # every process reads a part of the files, so that this takes no longer for many of them
            problems = self.world.collect(verify(folder, step, self.world.rank, self.world.size))
            problem = next((found for found in problems if found is not None), None)
            if problem is None:
                return Checkpoint(folder, read_json(folder / STATE, MAX_STATE_BYTES))
            damaged.append(f"checkpoint step-{step} is damaged ({problem})")
            self.world.decide(partial(_set_aside, folder))
            tell(f"{damaged[-1]}: kept as step-{step}.damaged, falling back to the one before it")
        if damaged:
            raise RunError(
                f"no usable checkpoint in {self.folder}: {'; '.join(damaged)}. Remove that folder to begin again."
            )
        return None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return complete_steps(self.folder)

    def _begin(self, step: int, num_bytes: int) -> str | None:
        """Make the temporary folder and return its name; None where the checkpoint exists.

        Raises:
            RunError: there is no room for it.
        """
        if (self.folder / f"step-{step}").exists():
            return None
        for entry in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            # of a process that died: the lock on the run folder says that no one else is writing
            if _TEMPORARY.fullmatch(entry.name):
                shutil.rmtree(entry)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise RunError(
                f"the checkpoint step-{step} takes {num_bytes / 1e6:.0f} MB, and {self.folder} has {free / 1e6:.0f} MB "
                f"left. Those before it are intact. Make room, then: {resume_command(self.folder.parent)}"
            )
        name = f"step-{step}.tmp-{os.getpid()}"
        (self.folder / name).mkdir()
        return name

    def _name(self, writing: _Writing, files: dict[str, Any]) -> None:
        temporary = writing.folder
        state = temporary / STATE
        state.write_text(json.dumps(writing.state))
        _flush(state)
        fault_point("save.manifest")
        files[state.name] = _fingerprint(state)
        (temporary / MANIFEST).write_text(json.dumps({"step": writing.step, "files": files}, indent=1))
        _flush(temporary / MANIFEST)
        _flush(temporary)
        fault_point("save.rename")
        temporary.rename(self.folder / f"step-{writing.step}")
        _flush(self.folder)
        fault_point("save.retention")
        for old in self.steps()[self.keep :]:
            with alone_with(self.folder / f"step-{old}") as is_free:
                if not is_free:
                    # an export or a probe reads it: its turn comes with a later save
                    continue
                # renamed first, so that no half-deleted checkpoint ever carries a good name
                doomed = (self.folder / f"step-{old}").rename(self.folder / f"step-{old}.tmp-old")
            fault_point("save.delete")
            shutil.rmtree(doomed)

    def _begin_or_give_up(self, step: int, num_bytes: int) -> str | None:
        try:
            return self._begin(step, num_bytes)
        except OSError as error:
            self._give_up(step, None, self._described(error))

    def _require_success(self, step: int, temporary: Path, failure: Exception | None) -> None:
        """RunError in every process if one of them failed, with the reason of the first that did."""
        found = [told for told in self.world.collect(failure and self._described(failure)) if told is not None]
        if found:
            self._give_up(step, temporary, found[0])

    def _described(self, error: Exception) -> tuple[str, str]:
        """What went wrong, and what to do about it."""
        return f"{type(error).__name__}: {error}", advice(error, self.folder)

    def _give_up(self, step: int, temporary: Path | None, described: Sequence[str]) -> NoReturn:
        if self.world.is_first and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        reason, remedy = described
        steps, free = [], "free space unknown"
        with suppress(OSError):
            # the folder itself may be what cannot be read
            steps = self.steps()
            free = f"{shutil.disk_usage(self.folder).free / 1e6:.0f} MB free"
        intact = f"step-{steps[0]} before it is intact" if steps else "there is none before it"
        then = f"{remedy}, then" if remedy else "To continue"
        raise RunError(
            f"the checkpoint step-{step} could not be written to {self.folder} ({free}): {reason}. "
            f"{intact.capitalize()}. {then}: {resume_command(self.folder.parent)}"
        )


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Good checkpoints must not give way to one that no run can go on from."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds values that are not finite")


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, newest first."""
    if not folder.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted((int(name[1]) for name in names if name), reverse=True)


def verify(folder: Path, step: int, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of every `num_parts`-th file, from `part` on."""
    try:
        manifest = read_json(folder / MANIFEST, MAX_MANIFEST_BYTES)
        if manifest["step"] != step:
            return f"{MANIFEST} is of step {manifest['step']}"
        files = dict(manifest["files"])
        if STATE not in files:
            return f"{MANIFEST} does not list {STATE}"
        for name, expected in sorted(files.items())[part::num_parts]:
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


def _set_aside(folder: Path) -> None:
    """Out of the way, so that the run can save under this name again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def require_same_shapes(saved: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str) -> None:
    """RunError that lists what differs, where names or shapes do."""
    lines = [f"{name} is not in the checkpoint" for name in expected if name not in saved]
    lines += [f"{name} is only in the checkpoint" for name in saved if name not in expected]
    lines += [
        f"{name} is {list(saved[name])} in the checkpoint and {list(shape)} in the model"
        for name, shape in expected.items()
        if name in saved and list(saved[name]) != list(shape)
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
