"""A process that ends with its parent."""

from __future__ import annotations

import ctypes
import signal

# loaded here, and not in a child between fork and exec
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let this process receive SIGTERM when its parent dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
