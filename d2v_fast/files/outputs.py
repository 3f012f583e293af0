"""What a command writes to a place that its user named: nothing that is there is replaced unless the user asks for it.

A model folder holds a record of the files that were written into it, with size and SHA-256 of each. So a later export
replaces what an earlier one wrote, and nothing that somebody else wrote or changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

from d2v_fast.errors import OptionError
from d2v_fast.files.atomic import make_beside, write_text
from d2v_fast.files.reading import open_regular, printable, read_json

RECORD = "d2v_fast_export.json"
# what a reader of the folder would take for weights of the same model, whoever wrote it
_WEIGHTS = "model*.safetensors*"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# what every export writes, or what would be mixed up with it
_ALWAYS = (RECORD, "config.json", "README.md", _WEIGHTS)
# what an export without a record may have written
_NAMES = (*_ALWAYS, "preprocessor_config.json", *_TOKENIZER)
# what every checkpoint holds
_CHECKPOINT = ("manifest.json", "state.json")
_MAX_RECORD_BYTES = 2**20
_NUM_NAMED = 5
# of an export from before there were records: the time from its weights to its configuration, which it wrote last
_MOST_SECONDS = 10
# a folder of a process that died; one that was just made may not be locked yet
_LEFTOVER_SECONDS = 60


def require_free(path: Path, overwrite: bool = False, option: str = "`--to`") -> None:
    """Check that a folder may be written.

    Args:
        path: of the folder, which may exist if it is empty.
        overwrite: the user asked to replace what is there.
        option: that names the path, for the message.
    Raises:
        OptionError: it holds something, and the user did not ask; it is a file; or it is in a checkpoint.
    """
    _require_no_checkpoint(path, option)
    shown = printable(str(path))
    if os.path.lexists(path) and not path.is_dir():
        raise OptionError(f"{option} must be a new or empty folder, but {shown} is none.")
    if not overwrite and path.is_dir() and (there := sorted(entry.name for entry in path.iterdir())):
        raise OptionError(
            f"{option} must be a new or empty folder, but {shown} holds {_listed(there)}. `--overwrite` replaces what "
            "an earlier export wrote there, and keeps the rest."
        )


def require_file(path: Path, overwrite: bool = False, option: str = "`--to`") -> None:
    """Check that a file may be written; see `require_free`.

    Raises:
        OptionError: it exists, and the user did not ask; it is a folder; its folder is a file, or that of a checkpoint.
    """
    _require_no_checkpoint(path, option)
    shown = printable(str(path))
    if path.is_dir():
        raise OptionError(f"{option} must be a file, but {shown} is a folder.")
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise OptionError(f"{option} must be in a folder, but {printable(str(parent))} is none.")
    if not overwrite and os.path.lexists(path):
        raise OptionError(f"{option} must be a new file, but {shown} exists. `--overwrite` replaces it.")


def require_writable(folder: Path, option: str = "`--to`") -> None:
    """Check that the folder of a default place can be written.

    Args:
        folder: of a run.
        option: that names another place, for the message.
    Raises:
        ValueError: the file system is read-only, or the user may not write to the folder.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`{printable(str(folder))}` cannot be written: name another place with {option}.")


@contextmanager
def model_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to fill, whose files become those of `folder` when the block has ended.

    Files that an earlier export wrote are replaced, or removed where there is no new one; a tokenizer stays. Files of
    others stay. If the block raises, nothing has changed.

    Args:
        folder: made if it is missing.
    Yields:
        A folder on the same file system.
    Raises:
        OptionError: a file that no export wrote, or that was changed since, has a name of a model folder.
    """
    target = Path(folder)
    if os.path.lexists(target) and not target.is_dir():
        raise OptionError(f"`{printable(str(target))}` must be a folder to write to, but is none.")
    target.parent.mkdir(parents=True, exist_ok=True)
    own = _own_files(target)
    _require_own(target, own)
    # inside of a folder that exists: it may be on another disk than its parent
    place = target if target.is_dir() else target.parent
    _remove_leftovers(place, target.name)
    aside = make_beside(place, target.name)
    lock = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield aside
        written = {path.name: _fingerprint(path) for path in aside.iterdir()}
        _require_own(target, own, written)
        stay = {name: own[name] for name in _TOKENIZER if name in own and name not in written}
        _write_record(aside, written | stay)
        if place is target:
            _move(aside, target, own, written | stay)
        else:
            aside.rename(target)
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def set_aside_changed(folder: Path) -> str | None:
    """Move a folder out of the way whose files are not those that an export wrote; return a line that says so.

    For the place where a run exports to by itself: no user is there to be asked.
    """
    if not os.path.lexists(folder):
        return None
    if folder.is_dir():
        try:
            _require_own(folder, _own_files(folder))
        except OptionError:
            pass
        else:
            return None
    other = next(
        path for path in (folder.with_name(f"{folder.name}.old-{n}") for n in count(1)) if not os.path.lexists(path)
    )
    folder.rename(other)
    return f"kept what was in {folder} as {other}: it was not written by an export, or was changed since"


def _require_no_checkpoint(path: Path, option: str) -> None:
    """OptionError if the path is in a checkpoint, which counts as damaged once it holds anything else."""
    real = path.resolve()
    for folder in (real, *real.parents):
        if all((folder / name).is_file() for name in _CHECKPOINT):
            raise OptionError(
                f"{option} must be outside of checkpoints, but {printable(str(path))} is in {printable(str(folder))}. "
                "Choose another place."
            )


def _own_files(target: Path) -> dict[str, dict[str, Any]]:
    """Fingerprints by name of the files in a folder that an export wrote, and that are as it wrote them."""
    if not target.is_dir():
        return {}
    try:
        record = read_json(target / RECORD, _MAX_RECORD_BYTES)
        recorded = [files for files in (record["files"], record.get("before", {})) if isinstance(files, dict)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _files_without_record(target)
    own = {RECORD: _fingerprint(target / RECORD)}
    for name in dict.fromkeys(name for files in recorded for name in files):
        path = target / name
        if Path(name).name == name and _is_file(path):
            found = _fingerprint(path)
            if any(files.get(name) == found for files in recorded):
                own[name] = found
    return own


def _files_without_record(target: Path) -> dict[str, dict[str, Any]]:
    """The same of an export from before there were records: only if nothing was written there since.

    Its files are known by their names, its card by what it says, and its `config.json`, which it wrote last, is at
    least as new as every other file and hardly newer than the weights.
    """
    if os.path.lexists(target / RECORD):
        return {}
    names = [entry.name for entry in target.iterdir() if _fits(entry.name, _NAMES)]
    if not {"config.json", "README.md"} <= set(names) or not all(_is_file(target / name) for name in names):
        return {}
    times = {name: (target / name).stat().st_mtime for name in names}
    weights = max((time for name, time in times.items() if fnmatch(name, _WEIGHTS)), default=0.0)
    last = times["config.json"]
    card = (target / "README.md").read_bytes()
    if last < max(times.values()) or last - weights > _MOST_SECONDS or b"data2vec" not in card or card[:3] != b"---":
        return {}
    return {name: _fingerprint(target / name) for name in names}


def _require_own(target: Path, own: Mapping[str, Any], names: Iterable[str] = ()) -> None:
    """OptionError that names the files in a folder that would be replaced, or mixed up with it, and are not `own`."""
    if not target.is_dir():
        return
    written = set(names)
    there = sorted(entry.name for entry in target.iterdir() if entry.name in written or _fits(entry.name, _ALWAYS))
    if foreign := [name for name in there if name not in own]:
        raise OptionError(
            f"`{printable(str(target))}` holds {_listed(foreign)}, which no export wrote, or which was changed since. "
            "Move this away, or choose another folder: only what an export wrote itself is replaced."
        )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _move(aside: Path, target: Path, own: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Put the files of `aside` in place of those in `target`; at every moment the record knows all that are there."""
    write_text(target / RECORD, _record(files, before={name: own[name] for name in own if name != RECORD}))
    for name in own:
        if name not in files and name != RECORD:
            (target / name).unlink()
    # last: a folder without it is no model
    for name in sorted(
        (path.name for path in aside.iterdir()), key=lambda name: (name == RECORD, name == "config.json")
    ):
        os.replace(aside / name, target / name)


def _write_record(folder: Path, files: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(_record(files), encoding="utf-8")


def _record(files: Mapping[str, Any], **more: Mapping[str, Any]) -> str:
    about = "files that d2v_fast wrote here: a later export replaces those that are unchanged, and no others"
    return json.dumps({"about": about, "files": dict(sorted(files.items())), **more}, indent=1) + "\n"


def _remove_leftovers(place: Path, name: str) -> None:
    """Remove folders that a dead process has left; one that lives holds a lock."""
    for leftover in place.glob(f".{name}.tmp-*"):
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime < _LEFTOVER_SECONDS:
                continue
            lock = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _fingerprint(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while block := file.read(2**20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _listed(names: list[str]) -> str:
    more = len(names) - _NUM_NAMED
    named = ", ".join(printable(name) for name in names[:_NUM_NAMED])
    return f"{named} and {more} more" if more > 0 else named
