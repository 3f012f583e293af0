"""Write checkpoints atomically, verify them before use, and delete old ones.

`checkpoints/step-N/` is written under a temporary name, flushed to the disk, and renamed last, so that a process that
dies at any moment leaves the earlier checkpoints intact. `manifest.json` holds size and SHA-256 of every file. A
checkpoint that does not match them is renamed to `step-N.damaged`, and the one before it is used. A system error while
reading is not damage: the run stops, and nothing is renamed. Tensors are in safetensors files and the rest is JSON, so
that pickle is never used.

Entries of the `checkpoints` folder that no run has written are never followed, overwritten or deleted. One whose name
a checkpoint needs is renamed with a message.

Every process writes the ranges that it trains to its own file; see `shard_files.py`. Training waits only for the copy
to host memory. A thread writes it to the disk, and the checkpoint is renamed when all processes have finished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from d2v_fast.checkpoints.files import (
    MANIFEST,
    STATE,
    Checkpoint,
    FileRecord,
    clear_name,
    complete_steps,
    fingerprint,
    foreign_entries,
    free_path,
)
from d2v_fast.checkpoints.hold import alone_with
from d2v_fast.checkpoints.search import find_newest
from d2v_fast.checkpoints.shard_files import Kept, copy_to_host, write_shards
from d2v_fast.command_lines import resume_command
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.files.atomic import flush
from d2v_fast.files.faults import fault_point
from d2v_fast.files.io_errors import advice
from d2v_fast.files.reading import printable

_TEMPORARY = re.compile(r"step-[0-9]+\.tmp-.*", re.DOTALL)
# names of a save: `tmp-` and the process id, or `tmp-old` while an old checkpoint is deleted
_OWN_TEMPORARY = re.compile(r"step-[0-9]+\.tmp-([0-9]+|old)(-[0-9]+)?")


class _Writing:
    """The part of a checkpoint that this process writes to the disk, in a thread or at once."""

    def __init__(
        self, step: int, folder: Path, state: Mapping[str, object], file: str, tensors: dict[str, Tensor]
    ) -> None:
        self.step, self.folder, self.state = step, folder, state
        self.failure: Exception | None = None
        self.written: dict[str, FileRecord] = {}
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
                flush(path)
                self.written = {path.name: fingerprint(path)}
        except Exception as error:
            # the main thread raises it, in agreement with the other processes
            self.failure = error


class Checkpoints:
    """The `checkpoints` folder of a run. Every method is called by all processes.

    Args:
        folder: The folder, which need not exist yet.
        keep: Number of complete checkpoints to keep.
        world: The processes of the run. The first one names and finishes checkpoints; all agree on errors.
        say: Prints a line in the first process.
    Attributes:
        protected: Step of a checkpoint that is kept, however many newer ones there are.
    """

    protected: int | None = None

    def __init__(self, folder: Path, keep: int, world: World, say: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.keep = keep
        self.world = world
        self._say = say
        self._said: set[str] = set()
        # steps that this process has written or read, which need not be written again
        self._known: set[int] = set()
        self._writing: _Writing | None = None

    def save(
        self, step: int, state: Mapping[str, object], kept: Sequence[Kept], *, in_background: bool = False
    ) -> None:
        """Write `step-<step>`, unless this process has written or read it. Wait for an earlier save first.

        Args:
            step: Number of optimizer steps.
            state: Content of `state.json`, which JSON must be able to express.
            kept: The ranges that this process trains.
            in_background: Return when the values are in host memory; `advance` and `finish` do the rest.
        Raises:
            RunError: This checkpoint or the earlier one could not be written. Those before it are untouched.
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
            # a process lacks the shapes of parameters that it trains no part of
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
        """Complete a checkpoint that is written in the background, if all processes have finished writing.

        Raises:
            RunError: It could not be written.
        """
        if self._writing is not None and not self.world.any(self._writing.is_busy):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it.

        Raises:
            RunError: It could not be written.
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

            try:
                self._retire(writing.step)
            except OSError as error:
                # the new checkpoint is complete, and a later save deletes the old ones
                self._say(f"the old checkpoints are kept, because {self.folder} could not be read: {error}")

        self.world.decide(name)

    def newest(
        self, tell: Callable[[str], None], check: Callable[[Checkpoint], None] = lambda checkpoint: None
    ) -> Checkpoint | None:
        """Open the newest undamaged checkpoint; see `find_newest`."""
        found = find_newest(self.folder, self.world, tell, check)
        if found is not None:
            self._known.add(found.step)
        return found

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first.

        Raises:
            OSError: The folder cannot be listed.
        """
        return complete_steps(self.folder)

    def _begin(self, step: int, num_bytes: int) -> str | None:
        """Make the temporary folder and return its name; None if the checkpoint exists already.

        Raises:
            RunError: There is not enough space for it.
            OSError: The folder cannot be made.
        """
        if step in self._known and (self.folder / f"step-{step}").exists():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(self.folder) as entries:
            leftovers = [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name)]
        for leftover in leftovers:
            # left by a process that died: the lock on the run folder excludes other writers
            self._delete(leftover)
        free = shutil.disk_usage(self.folder).free
        if free < num_bytes:
            raise RunError(
                f"the checkpoint step-{step} takes {num_bytes / 1e6:.0f} MB, and {self.folder} has {free / 1e6:.0f} MB "
                f"left. Earlier checkpoints are intact. Make room, then: {resume_command(self.folder.parent)}"
            )
        temporary = free_path(self.folder / f"step-{step}.tmp-{os.getpid()}")
        temporary.mkdir()
        return temporary.name

    def _name(self, writing: _Writing, files: dict[str, FileRecord]) -> None:
        temporary = writing.folder
        state = temporary / STATE
        state.write_text(json.dumps(writing.state))
        flush(state)
        fault_point("save.manifest")
        files[state.name] = fingerprint(state)
        (temporary / MANIFEST).write_text(json.dumps({"step": writing.step, "files": files}, indent=1))
        flush(temporary / MANIFEST)
        flush(temporary)
        fault_point("save.rename")
        final = self.folder / f"step-{writing.step}"
        if (name := clear_name(self.folder, writing.step)) is not None:
            self._say(f"{final} was not written by this run: it was renamed to {name}, and is unchanged")
        temporary.rename(final)
        flush(self.folder)
        self._known.add(writing.step)

    def _retire(self, newest: int) -> None:
        """Delete the oldest checkpoints. One that cannot be deleted stays, and the run goes on.

        Args:
            newest: Step of the checkpoint that was just written. Higher numbers are not of this run.
        """
        fault_point("save.retention")
        older = [step for step in self.steps() if step < newest]
        kept = [step for step in older if (self.folder / f"step-{step}" / MANIFEST).exists()][: self.keep - 1]
        for old in sorted(set(older) - {*kept, self.protected}, reverse=True):
            folder = self.folder / f"step-{old}"
            if self._holds_others(folder):
                continue
            try:
                with alone_with(folder) as is_free:
                    if not is_free:
                        # an export or a probe is reading it, and a later save deletes it
                        continue
                    # renamed first, so that no half-deleted checkpoint has a good name
                    doomed = folder.rename(free_path(self.folder / f"step-{old}.tmp-old"))
            except OSError as error:
                self._say_once(folder, f"the old checkpoint {folder} could not be deleted and is kept: {error}")
                continue
            fault_point("save.delete")
            self._delete(doomed)

    def _delete(self, folder: Path) -> None:
        """Delete the rest of a checkpoint, unless it holds something that no run has written."""
        if folder.is_symlink() or not folder.is_dir() or not _OWN_TEMPORARY.fullmatch(folder.name):
            self._say_once(folder, f"{printable(str(folder))} is not of this run and is kept")
        elif not self._holds_others(folder):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                self._say_once(folder, f"{folder} is a leftover of a save and could not be deleted: {error}")

    def _holds_others(self, folder: Path) -> bool:
        """Return whether a checkpoint's folder holds something that no run has written, and report it once."""
        others = foreign_entries(folder)
        if others:
            found = printable(", ".join(others[:3]))
            self._say_once(
                folder, f"{folder} is not deleted, because it holds entries that no run has written: {found}"
            )
        return bool(others)

    def _say_once(self, path: Path, sentence: str) -> None:
        if path.name not in self._said:
            self._said.add(path.name)
            self._say(sentence)

    def _begin_or_give_up(self, step: int, num_bytes: int) -> str | None:
        try:
            return self._begin(step, num_bytes)
        except OSError as error:
            self._give_up(step, None, self._described(error))

    def _require_success(self, step: int, temporary: Path, failure: Exception | None) -> None:
        """Raise a RunError in every process if one failed, with the rank and the reason of the first failure."""
        for rank, told in enumerate(self.world.collect(failure and self._described(failure))):
            if told is not None:
                reason, remedy = told
                which = f"rank {rank}: " if self.world.size > 1 else ""
                self._give_up(step, temporary, (f"{which}{reason}", remedy))

    def _described(self, error: Exception) -> tuple[str, str]:
        """Return a description of the error, and advice."""
        return f"{type(error).__name__}: {error}", advice(error, self.folder)

    def _give_up(self, step: int, temporary: Path | None, described: Sequence[str]) -> NoReturn:
        if self.world.is_first and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        reason, remedy = described
        steps, free = [], "free space unknown"
        with suppress(OSError):
            # the folder itself may be unreadable
            steps = self.steps()
            free = f"{shutil.disk_usage(self.folder).free / 1e6:.0f} MB free"
        intact = f"the earlier checkpoint step-{steps[0]} is intact" if steps else "there is no earlier checkpoint"
        then = f"{remedy}, then" if remedy else "To continue"
        raise RunError(
            f"the checkpoint step-{step} could not be written to {self.folder} ({free}): {reason}. "
            f"{intact.capitalize()}. {then}: {resume_command(self.folder.parent)}"
        )


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse non-finite values: good checkpoints would be deleted for one that no run can resume from."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds values that are not finite")


def require_same_shapes(saved: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str) -> None:
    """Raise a RunError that lists the differing names and shapes, if there are any."""
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
