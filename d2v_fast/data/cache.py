"""Folders that are made once and used again: complete or absent, whoever else makes the same one at the same time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2v_fast.atomic import make_beside
from d2v_fast.data.batch import DataError
from d2v_fast.faults import fault_point
from d2v_fast.io_errors import advice
from d2v_fast.untrusted import printable

__all__ = ["made_once"]

_log = logging.getLogger(__name__)


def made_once(root: str | None, name: str, make: Callable[[Path], None], key: str = "`d2v.data.tokens_path`") -> Path:
    """The folder `name` below `root`, made if there is none yet.

    It is written under another name, flushed to the disk, and renamed last. A second process that wants the same one
    waits for the first; where the file system knows no locks both make it, and the first to be through wins.

    Args:
        root: may not exist yet, and may be read-only if the folder is there. None: `d2v_fast` in the user's cache
            folder, or else one of the user's own in the folder for temporary files.
        name: a single part of a path, which stands for the content.
        make: fills an empty folder; what it raises is handed on, and nothing is left behind.
        key: what says where, for messages.
    Raises:
        DataError: the folder cannot be written.
    """
    roots = [Path(os.path.abspath(root))] if root is not None else list(_default_roots())
    for place in roots:
        if (place / name).is_dir():
            return place / name
    failures = []
    for place in roots:
        try:
            _prepare(place, own=root is None)
        except OSError as error:
            failures.append(printable(f"'{place}': {error.strerror or error}"))
            continue
        if failures:
            _log.info("writing to '%s', for there is no writing to %s", printable(str(place)), failures[0])
        try:
            with _locked(place / f".{name}.lock") as is_locked:
                _make(place, name, make, is_locked)
        except OSError as error:
            folder = printable(str(place))
            remedy = advice(error, folder)
            raise DataError(
                f"{key} must be a folder that can be written, but '{folder}' is not: {printable(str(error))}. "
                + (f"{remedy}, or set it to another folder." if remedy else "Set it to another folder.")
            ) from error
        return place / name
    raise DataError(
        f"{key} must be a folder that can be written, but there is no writing to " + ", nor to ".join(failures) + "."
    )


def _default_roots() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        yield Path(home) / "d2v_fast"
    yield Path(tempfile.gettempdir()) / f"d2v_fast-{os.getuid()}"


def _prepare(root: Path, own: bool) -> None:
    """Make the folder; `own`: nobody else may write to it, for its name can be guessed."""
    root.mkdir(mode=0o700 if own else 0o777, parents=True, exist_ok=True)
    status = os.lstat(root) if own else os.stat(root)
    if own and (not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise PermissionError(errno.EPERM, "others may write to it")
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _make(root: Path, name: str, make: Callable[[Path], None], is_locked: bool) -> None:
    if (root / name).is_dir():
        return
    if is_locked:
        # whoever made them is dead: it would hold the lock
        for leftover in root.glob(f".{name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    aside = make_beside(root, name)
    try:
        make(aside)
        fault_point("cache.written")
        for folder, _, files in os.walk(aside):
            for file in files:
                _flush(os.path.join(folder, file))
            _flush(folder)
        fault_point("cache.rename")
        try:
            aside.rename(root / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fault_point("cache.renamed")
        _flush(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock for the block, having waited for it; False where the file system knows none."""
    file, is_locked = _open_lock(path)
    try:
        yield is_locked
    finally:
        if is_locked:
            path.unlink(missing_ok=True)
        os.close(file)


def _open_lock(path: Path) -> tuple[int, bool]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            is_locked = _lock(file, path)
            if not is_locked or os.path.samestat(os.fstat(file), os.stat(path)):
                return file, is_locked
        except FileNotFoundError:
            # removed by the one that held it while this one waited, as below
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.info("waiting for another process, which writes '%s'", printable(path.name[1 : -len(".lock")]))
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
