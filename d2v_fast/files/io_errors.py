"""Advice about files that could not be read or written, by the number of the system's error."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

_ADVICE = {
    errno.ENOSPC: "Make room on the disk of {place}",
    errno.EDQUOT: "The quota of this user on the disk of {place} is used up: delete files there, or ask for more",
    errno.EROFS: "The file system of {place} is read-only: choose another folder, or mount it writable",
    errno.EACCES: "This user lacks the permission: choose another folder than {place}, or change who may use it",
    errno.EPERM: "This user lacks the permission: choose another folder than {place}, or change who may use it",
    errno.EIO: "The disk of {place} reported a fault, which the system's log describes: use another disk",
    errno.ESTALE: "The network file system of {place} lost this file or folder: mount it again",
    errno.ENOTCONN: "The network file system of {place} is not connected: mount it again",
    errno.ETIMEDOUT: "The network file system of {place} does not answer: try again when it does",
    errno.EMFILE: "This process has too many open files: raise the limit with `ulimit -n`",
    errno.ENFILE: "This machine has too many open files: end other programs, or raise `fs.file-max`",
    errno.EFBIG: "The file is larger than this user, or the file system of {place}, may have: see `ulimit -f`",
    errno.ENAMETOOLONG: "Choose a shorter name than {place}",
}
_NO_INODES = "The disk of {place} has room, but can hold no further file: delete files there (`df -i` counts them)"
# how libraries written in Rust, such as safetensors and tokenizers, show the number
_RUST = re.compile(r"\(os error (\d+)\)")

# errors of the process, machine or network, whatever the file
_OF_SYSTEM = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ESHUTDOWN),
    }
)


def error_number(error: BaseException | None) -> int | None:
    """Return the number of the system's error behind an exception, or None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = None if error is None else _RUST.search(str(error))
    return None if found is None else int(found[1])


def is_of_system(error: BaseException | None) -> bool:
    """Return whether an error is independent of the file: too many open files, a lost network and the like.

    A fault reported by the disk is not: it may concern one sector.
    """
    return error_number(error) in _OF_SYSTEM


def advice(error: BaseException | None, place: str | Path) -> str:
    """Return what the user can do about an error, as a sentence without its period; "" if there is no advice.

    Args:
        error: raised while `place` was read or written.
        place: file or folder named in the sentence.
    """
    number = error_number(error)
    text = _NO_INODES if number == errno.ENOSPC and _lacks_inodes(Path(place)) else _ADVICE.get(number or 0, "")
    return text.format(place=place)


def error_text(error: OSError) -> str:
    """Return the text of an OSError, followed by advice if there is any."""
    remedy = advice(error, error.filename) if isinstance(error.filename, str) else ""
    return f"{error}. {remedy}." if remedy else str(error)


def _lacks_inodes(place: Path) -> bool:
    """Return whether the file system has free blocks but no free inode. `place` may not exist yet."""
    for folder in (place, *place.absolute().parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        # file systems that create inodes on demand report a total of 0
        return found.f_files > 0 and found.f_favail == 0 and found.f_bavail > 0
    return False
