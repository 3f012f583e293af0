"""Checkpoints that are read while a run goes on: a lock keeps the run from deleting one.

A reader holds a shared lock on the manifest. The run deletes a checkpoint only while it holds the lock alone, and else
leaves it until the next save. The system drops the locks of a process that dies. Linux keeps `flock` across the
machines of an NFS mount. Where a file system has no locks, a reader that loses its checkpoint says so.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MANIFEST = "manifest.json"


@contextmanager
def hold(checkpoint: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted while the block runs. Writes nothing.

    Raises:
        FileNotFoundError: it is being deleted, or is gone.
    """
    path = checkpoint / _MANIFEST
    try:
        # a pipe in the place of the manifest is not waited for; a folder is for others to refuse
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if checkpoint.is_dir():
            # damaged, which whoever reads it will find
            yield
            return
        raise
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileNotFoundError(f"{checkpoint} is being deleted") from None
        except OSError:
            # a file system without locks
            pass
        if not os.path.samestat(os.fstat(lock), os.stat(path)):
            raise FileNotFoundError(f"{checkpoint} is another one now")
        yield
    finally:
        os.close(lock)


@contextmanager
def alone_with(checkpoint: Path) -> Iterator[bool]:
    """Yield whether nobody reads a checkpoint; if so, nobody begins to while the block runs."""
    lock = None
    # NFS locks alone only what may be written; elsewhere a manifest that is protected from writing is locked as well
    for access in (os.O_RDWR, os.O_RDONLY):
        with suppress(OSError):
            lock = os.open(checkpoint / _MANIFEST, access | os.O_NONBLOCK)
            break
    if lock is None:
        yield True
        return
    try:
        is_free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:
            # a file system without locks
            pass
        yield is_free
    finally:
        os.close(lock)
