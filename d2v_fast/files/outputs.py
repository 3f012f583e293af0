"""Write to a place that the user named, and replace nothing there without being asked.

A model folder holds a record of the files that were exported into it, with size and SHA-256 of each. A later export
replaces files of an earlier one, and no file that somebody else wrote or changed.
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
# files that a reader of the folder would load as weights of the model
_WEIGHTS = "model*.safetensors*"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# files that every export writes, or that would mix with them
_ALWAYS = (RECORD, "config.json", "README.md", _WEIGHTS)
# files that an export without a record may have written
_NAMES = (*_ALWAYS, "preprocessor_config.json", *_TOKENIZER)
# files in every checkpoint
_CHECKPOINT = ("manifest.json", "state.json")
_MAX_RECORD_BYTES = 2**20
_NUM_NAMED = 5
# longest time between weights and config.json in an export without a record; config.json is written last
_MOST_SECONDS = 10
# age at which an unlocked folder counts as left by a dead process; a new one may not be locked yet
_LEFTOVER_SECONDS = 60


def require_free(path: Path, overwrite: bool = False) -> None:
    """Check that the folder of `--to` may be written to.

    Args:
        path: the folder; it may exist if it is empty.
        overwrite: whether the user asked to replace its content.
    Raises:
        OptionError: the folder is not empty and `overwrite` is false; `path` is a file, or in a checkpoint.
    """
    _require_no_checkpoint(path, "`--to`")
    shown = printable(str(path))
    if os.path.lexists(path) and not path.is_dir():
        raise OptionError(f"`--to` must be a new or empty folder, but {shown} is not a folder.")
    if not overwrite and path.is_dir() and (there := sorted(entry.name for entry in path.iterdir())):
        raise OptionError(
            f"`--to` must be a new or empty folder, but {shown} holds {_listed(there)}. `--overwrite` replaces what "
            "an earlier export wrote there, and keeps the rest."
        )


def require_file(path: Path, overwrite: bool = False, option: str = "`--to`") -> None:
    """Check that a file may be written.

    Args:
        path: the file.
        overwrite: whether the user asked to replace it.
        option: option that names the path, for the message.
    Raises:
        OptionError: the file exists and `overwrite` is false; `path` is a folder, below a file, or in a checkpoint.
    """
    _require_no_checkpoint(path, option)
    shown = printable(str(path))
    if path.is_dir():
        raise OptionError(f"{option} must be a file, but {shown} is a folder.")
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise OptionError(f"{option} must be in a folder, but {printable(str(parent))} is not a folder.")
    if not overwrite and os.path.lexists(path):
        raise OptionError(f"{option} must be a new file, but {shown} exists. `--overwrite` replaces it.")


def require_writable(folder: Path, option: str = "`--to`") -> None:
    """Check that a run folder, the default place for output, can be written to.

    Args:
        folder: the run folder.
        option: option that names another place, for the message.
    Raises:
        ValueError: the file system is read-only, or the user lacks the permission.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`{printable(str(folder))}` cannot be written: name another place with {option}.")


@contextmanager
def model_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder, and move its files to `folder` at the end of the block.

    Files of an earlier export are replaced, or removed if there is no new one; its tokenizer stays. Other files stay.
    If the block raises, nothing changes.

    Args:
        folder: destination; created if it does not exist.
    Yields:
        A folder on the same file system.
    Raises:
        OptionError: a file of a model folder was not written by an export, or was changed since.
    """
    target = Path(folder)
    if os.path.lexists(target) and not target.is_dir():
        raise OptionError(f"`{printable(str(target))}` must be a folder, but is not one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    own = _own_files(target)
    _require_own(target, own)
    # inside an existing folder, which may be on another disk than its parent
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
    """Rename a folder whose files were not written by an export, and return a line for the log, or None.

    For the folder that a run exports to by itself, without a user to ask.
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
    """Raise OptionError if the path is in a checkpoint, which another file would damage."""
    real = path.resolve()
    for folder in (real, *real.parents):
        if all((folder / name).is_file() for name in _CHECKPOINT):
            raise OptionError(
                f"{option} must be outside of checkpoints, but {printable(str(path))} is in {printable(str(folder))}. "
                "Choose another place."
            )


def _own_files(target: Path) -> dict[str, dict[str, Any]]:
    """Return fingerprints of the unchanged files of earlier exports, by name."""
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
    """Return the same for an export without a record, or nothing if anything was written there since.

    Such an export is recognized by the names of its files, the text of its model card, and `config.json`, which is the
    newest file and hardly newer than the weights.
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
    """Raise OptionError if files that are not `own` would be replaced by `names` or mix with a model."""
    if not target.is_dir():
        return
    written = set(names)
    there = sorted(entry.name for entry in target.iterdir() if entry.name in written or _fits(entry.name, _ALWAYS))
    if foreign := [name for name in there if name not in own]:
        raise OptionError(
            f"`{printable(str(target))}` holds {_listed(foreign)}, which no export wrote, or which was changed since. "
            "Move this away, or choose another folder: an export replaces only unchanged files of an earlier one."
        )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _move(aside: Path, target: Path, own: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Move the files of `aside` to `target`. The record lists all files in `target` at every moment."""
    write_text(target / RECORD, _record(files, before={name: own[name] for name in own if name != RECORD}))
    for name in own:
        if name not in files and name != RECORD:
            (target / name).unlink()
    # config.json is last: a folder without it is no model
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
    """Remove folders left by dead processes; a live process holds a lock on its folder."""
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
