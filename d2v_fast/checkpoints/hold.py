"""A lock that keeps a run from deleting a checkpoint while another process reads it.

A reader holds a shared lock on the manifest. The run deletes a checkpoint only while it holds the lock exclusively, and
otherwise leaves it until the next save. The system releases the locks of a process that dies, and Linux supports
`flock` between the machines of an NFS mount. On a file system without locks, a reader that loses its checkpoint raises
an error.
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
    """Keep a checkpoint from being deleted while the block runs, without writing anything.

    Raises:
        FileNotFoundError: It is being deleted, or is gone.
    """
    path = checkpoint / _MANIFEST
    try:
        # O_NONBLOCK: do not wait for a pipe in the place of the manifest; the caller refuses a folder
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if checkpoint.is_dir():
            # damaged, as the reader will find
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
    """Yield whether no process reads a checkpoint. If so, none can begin while the block runs."""
    lock = None
    # NFS needs a writable file for an exclusive lock; other file systems lock read-only ones as well
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
