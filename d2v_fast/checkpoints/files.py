"""The files of one checkpoint: opened once, checked, and read through the open handles.

Only the files that `manifest.json` lists are opened, and only regular ones. Anything else in the folder is an error:
shards that another save left there would otherwise mix with those of the checkpoint. There are two kinds of failure. A
`DamageError` means that the checkpoint itself is wrong, and stays wrong. An OSError means that it could not be read
this time, which does not make it wrong.
"""

from __future__ import annotations

import os
import re
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from d2v_fast.checkpoints.shard_files import DamageError, HeldFile, ShardReader
from d2v_fast.config.errors import show
from d2v_fast.files.faults import fault_point
from d2v_fast.files.reading import NotRegularError, parse_json, printable

MANIFEST, STATE = "manifest.json", "state.json"
MAX_MANIFEST_BYTES = 64_000_000
MAX_STATE_BYTES = 64_000_000
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")
_DAMAGED = re.compile(rf"{STEP_NAME.pattern}\.damaged(-[0-9]+)?")
_SHARD = re.compile(r"shard-[0-9]{5,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# also what an interrupted save leaves
_OWN = re.compile(rf"({re.escape(MANIFEST)}|{re.escape(STATE)}|{_SHARD.pattern})(\.part)?")


class FileRecord(TypedDict):
    """Size and SHA-256 of a file, as the manifest lists them."""

    bytes: int
    sha256: str


class AbsentError(DamageError):
    """A file of a checkpoint is missing."""


class Checkpoint:
    """An open checkpoint. Close it, or use it in a `with` block.

    Args:
        folder: Folder of the checkpoint. Neither it nor a file in it is opened through a link.
        step: The step that the checkpoint must have.
    Attributes:
        folder: As given.
        step: As given.
        manifest_digest: SHA-256 of `manifest.json`.
        state: Content of `state.json`, after `load`.
    Raises:
        AbsentError: A listed file is missing.
        DamageError: The manifest is wrong, a file has another size than listed, or is not listed.
        OSError: A file could not be read.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.state: dict[str, Any] = {}
        self._held: dict[str, HeldFile] = {}
        try:
            self._expected = self._read_manifest()
            self.manifest_digest = self._held[MANIFEST].digest()
            self._hold_listed()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Readers of them cannot read any more."""
        for held in self._held.values():
            held.close()

    def require_content(self, part: int = 0, num_parts: int = 1) -> None:
        """Compare the SHA-256 of every `num_parts`-th shard, from `part` on, and of `state.json`, with the manifest.

        Raises:
            DamageError: The content of a file has changed since it was written.
            OSError: A file could not be read.
        """
        shards = sorted(self._expected.keys() - {STATE})
        for name in (STATE, *shards[part::num_parts]):
            fault_point("load.read")
            if self._held[name].digest() != self._expected[name]["sha256"]:
                raise DamageError(f"{name} has another content than was written")

    def load(self) -> None:
        """Read `state.json`. Call it after all content has been checked.

        Raises:
            DamageError: It is not a state, or that of another step.
            OSError: It could not be read.
        """
        try:
            state = parse_json(self._held[STATE].read(MAX_STATE_BYTES).decode("utf-8"))
        except ValueError as error:
            raise DamageError(f"{STATE} cannot be read: {error}") from None
        if not isinstance(state, dict):
            raise DamageError(f"{STATE} holds no section {{...}}")
        step, shapes = state.get("step"), state.get("shapes")
        if type(step) is not int or step != self.step:
            raise DamageError(f"`step` in {STATE} must be {self.step} as the folder says, but is {show(step)}")
        if not isinstance(shapes, dict) or not all(map(_is_shape, shapes.values())):
            raise DamageError(f"`shapes` in {STATE} must give a list of sizes for every tensor")
        self.state = state

    def reader(self) -> ShardReader:
        """Return a reader of the tensors. Call it after `load`, which reads their shapes.

        Raises:
            DamageError: The shards do not hold every element of every tensor exactly once.
            OSError: A shard could not be read.
        """
        shards = [self._held[name] for name in sorted(self._expected.keys() - {STATE})]
        return ShardReader(shards, self.state["shapes"])

    def _read_manifest(self) -> dict[str, FileRecord]:
        """Return the expected size and SHA-256 of every file, by its name."""
        held = self._hold(MANIFEST)
        try:
            manifest = parse_json(held.read(MAX_MANIFEST_BYTES).decode("utf-8"))
            step, files = manifest["step"], manifest["files"]
            for name, expected in files.items():
                if not (name == STATE or _SHARD.fullmatch(name)):
                    raise DamageError(f"{MANIFEST} names {show(name)}, which is not a file of a checkpoint")
                if type(expected["bytes"]) is not int or not _SHA256.fullmatch(expected["sha256"]):
                    raise DamageError(f"{MANIFEST} does not give size and SHA-256 of {name}")
        except DamageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from None
        if type(step) is not int or step != self.step:
            raise DamageError(f"{MANIFEST} is of step {show(step)}")
        if STATE not in files:
            raise DamageError(f"{MANIFEST} does not list {STATE}")
        return dict(files)

    def _hold_listed(self) -> None:
        for name, expected in sorted(self._expected.items()):
            held = self._hold(name)
            if held.size != expected["bytes"]:
                raise DamageError(f"{name} has {held.size} bytes instead of {expected['bytes']}")
        # hidden files are left by desktops and network file systems
        others = [name for name in os.listdir(self.folder) if name not in self._held and not name.startswith(".")]
        if others:
            raise DamageError(f"{printable(min(others))} is not listed in {MANIFEST}: move it out of the folder")

    def _hold(self, name: str) -> HeldFile:
        fault_point("load.open")
        try:
            self._held[name] = HeldFile(self.folder / name, self.folder.parent)
        except FileNotFoundError:
            if not self.folder.exists():
                # it was listed before: moved away, or on a file system that this process does not see
                raise
            raise AbsentError(f"{name} is missing") from None
        except NotRegularError as error:
            raise DamageError(f"{name} is {error.strerror}") from None
        return self._held[name]


def verified_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Open a checkpoint, check every byte of it, and read its state.

    Args:
        folder: Folder of the checkpoint.
        step: The step that it must have.
    Raises:
        DamageError: It is damaged.
        OSError: It could not be read.
    """
    checkpoint = Checkpoint(folder, step)
    try:
        checkpoint.require_content()
        checkpoint.load()
        checkpoint.reader()
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def complete_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a `checkpoints` folder, newest first.

    Raises:
        OSError: The folder cannot be listed.
    """
    names = (STEP_NAME.fullmatch(entry.name) for entry in _entries(folder) if entry.is_dir(follow_symlinks=False))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def strays(folder: Path) -> list[str]:
    """Return a sentence for every entry of a `checkpoints` folder that has a checkpoint's name and is not a folder.

    Raises:
        OSError: The folder cannot be listed.
    """
    sentences = []
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        if not STEP_NAME.fullmatch(entry.name) or entry.is_dir(follow_symlinks=False):
            continue
        if entry.is_symlink():
            sentences.append(
                f"{entry.name} is a link, which is not followed: put the folder itself in its place to use it"
            )
        else:
            sentences.append(f"{entry.name} is a file and no checkpoint")
    return sentences


def damaged_names(folder: Path) -> list[tuple[int, str]]:
    """Return step and name of the damaged checkpoints that were set aside in a `checkpoints` folder, newest first.

    Raises:
        OSError: The folder cannot be listed.
    """
    names = (_DAMAGED.fullmatch(entry.name) for entry in _entries(folder) if entry.is_dir(follow_symlinks=False))
    return sorted(((int(name[1]), name[0]) for name in names if name), reverse=True)


def move_aside(folder: Path, step: int, why: str) -> str:
    """Rename `step-<step>` in a `checkpoints` folder to `step-<step>.<why>`, and return the new name.

    A link itself is renamed. Nothing is replaced: if the new name is taken, it gets a number.

    Raises:
        OSError: It cannot be renamed.
    """
    aside = free_path(folder / f"step-{step}.{why}")
    (folder / f"step-{step}").rename(aside)
    return aside.name


def clear_name(folder: Path, step: int) -> str | None:
    """Move away any entry called `step-<step>`; return its new name, or None if there was none.

    Raises:
        OSError: It cannot be renamed.
    """
    return move_aside(folder, step, "in-the-way") if os.path.lexists(folder / f"step-{step}") else None


def free_path(path: Path) -> Path:
    """Return a path that does not exist: this one, or the first free one of PATH-2, PATH-3, and so on."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(candidate for candidate in chain([path], numbered) if not os.path.lexists(candidate))


def fingerprint(path: Path) -> FileRecord:
    """Return the size and the SHA-256 of a file, as the manifest lists them."""
    held = HeldFile(path, path.parent)
    try:
        return {"bytes": held.size, "sha256": held.digest()}
    finally:
        held.close()


def foreign_entries(folder: Path) -> list[str]:
    """Return the sorted names in a checkpoint's folder that no run has written, without hidden ones.

    A pipe, a link or an empty folder with the name of a checkpoint's file is not listed: deleting it loses nothing.

    Raises:
        OSError: The folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and not (_OWN.fullmatch(entry.name) and not _is_filled(entry))
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return list(entries)


def _is_filled(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and bool(os.listdir(entry.path))


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
