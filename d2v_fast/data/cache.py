"""Folders that are made once and reused. They are complete or absent, even if two processes make the same one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from d2v_fast.errors import DataError
from d2v_fast.files.atomic import flush, make_beside
from d2v_fast.files.faults import fault_point
from d2v_fast.files.io_errors import advice
from d2v_fast.files.locks import Holder, own_record
from d2v_fast.files.reading import printable
from d2v_fast.processes.idle import alive
from d2v_fast.processes.state import cpu_ticks

__all__ = ["made_once"]

# default time without progress of another process; runs pass `d2v.run.timeout_minutes`
PATIENCE_S = 600.0
# shorter waits are not reported
REPORT_S = 3.0
MAX_RECORD_BYTES = 1000

_log = logging.getLogger(__name__)


def made_once(
    root: str | None,
    name: str,
    make: Callable[[Path], None],
    key: str = "`d2v.data.tokens_path`",
    patience_s: float = PATIENCE_S,
) -> Path:
    """Return the folder `name` below `root`, and make it if it does not exist.

    The folder is written under another name, flushed to disk, and renamed last. A second process waits while the first
    makes progress. On a file system without locks both make the folder, and the first to finish wins.

    Args:
        root: need not exist, and may be read-only if the folder exists. None uses `d2v_fast` in the user's cache
            folder, or else a private folder among the temporary files.
        name: a single path component that identifies the content.
        make: fills an empty folder. Its exceptions are passed on, and nothing is left behind.
        key: the setting that chose `root`, for messages.
        patience_s: seconds that another process may hold the lock without progress.
    Raises:
        DataError: the folder cannot be written, or another process holds its lock and makes no progress.
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
            _log.info("writing to '%s', because %s cannot be written", printable(str(place)), failures[0])
        try:
            with _locked(place / f".{name}.lock", _Wait(place, name, key, patience_s)) as is_locked:
                _make(place, name, make, is_locked)
        except OSError as error:
            folder = printable(str(place))
            remedy = advice(error, folder)
            raise DataError(
                f"{key} must be a folder that can be written, but '{folder}' is not: {printable(str(error))}. "
                + (f"{remedy}, or set it to another folder." if remedy else "Set it to another folder.")
            ) from error
        return place / name
    raise DataError(f"{key} must be a folder that can be written. None of these can: " + "; ".join(failures) + ".")


def _default_roots() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if os.path.isabs(home):
        yield Path(home) / "d2v_fast"
    yield Path(tempfile.gettempdir()) / f"d2v_fast-{os.getuid()}"


def _prepare(root: Path, own: bool) -> None:
    """Make the folder. If it is the user's `own`, with a name that can be guessed, others must not write to it."""
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
        # their maker is dead, or it would hold the lock
        for leftover in root.glob(f".{name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    aside = make_beside(root, name)
    try:
        make(aside)
        fault_point("cache.written")
        for folder, _, files in os.walk(aside):
            for file in files:
                flush(os.path.join(folder, file))
            flush(folder)
        fault_point("cache.rename")
        try:
            aside.rename(root / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fault_point("cache.renamed")
        flush(root)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(path: Path, wait: _Wait) -> Iterator[bool]:
    """Wait for the lock and hold it. Yield False if the file system has no locks."""
    file, is_locked = _open_lock(path, wait)
    try:
        if is_locked:
            os.ftruncate(file, 0)
            os.write(file, os.fsencode(own_record()))
        yield is_locked
    finally:
        if is_locked:
            path.unlink(missing_ok=True)
        os.close(file)


def _open_lock(path: Path, wait: _Wait) -> tuple[int, bool]:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # otherwise the previous holder has removed the file
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file, True
        except FileNotFoundError:
            pass
        except BlockingIOError:
            wait.look(Holder(os.pread(file, MAX_RECORD_BYTES, 0).decode(errors="replace")))
        except OSError:
            return file, False
        except BaseException:
            os.close(file)
            raise
        os.close(file)


class _Wait:
    """Wait for another process while it writes or uses CPU time.

    Checks are counted instead of seconds, so that time for which this process is stopped does not count.
    """

    def __init__(self, root: Path, name: str, key: str, patience_s: float) -> None:
        self._root, self._name, self._key, self._patience_s = root, name, key, patience_s
        self._interval_s = min(0.5, patience_s / 20)
        self._looks = self._looks_without_progress = 0
        self._progress: object = None

    def look(self, holder: Holder) -> None:
        """Sleep for one interval, and report the holder of the lock once after `REPORT_S`.

        Raises:
            DataError: the holder has made no progress for `patience_s`.
        """
        time.sleep(self._interval_s)
        self._looks += 1
        # one process of a run reports for all
        if self._looks == max(1, round(REPORT_S / self._interval_s)) and os.environ.get("RANK", "0") == "0":
            what = printable(self._name)
            _log.warning("waiting for another process that writes '%s' in '%s': %s", what, self._root, holder)
        progress = (holder.pid and cpu_ticks(holder.pid), self._written())
        self._looks_without_progress = 0 if progress != self._progress else self._looks_without_progress + 1
        self._progress = progress
        # not idle: this wait has a limit of its own
        alive()
        if self._looks_without_progress * self._interval_s >= self._patience_s:
            raise DataError(
                f"{self._key} is being written to by another process, which has made no progress for "
                f"{self._patience_s / 60:.3g} minutes: {holder}. {holder.remedy()}, or set another folder."
            )

    def _written(self) -> list[tuple[str, int]]:
        files = sorted(self._root.glob(f".{glob.escape(self._name)}.tmp-*/*"))
        sizes = []
        for file in files:
            # the folder may be renamed at any moment
            with contextlib.suppress(OSError):
                sizes.append((file.name, os.lstat(file).st_size))
        return sizes
