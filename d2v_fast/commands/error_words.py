"""An exception in words for the user, or none where it is a fault of this library."""

from __future__ import annotations

from d2v_fast.files.io_errors import error_text
from d2v_fast.packages import import_problem


def in_words(error: Exception) -> str | None:
    """What to tell; None where `error` is a fault of this library."""
    if isinstance(error, ImportError):
        return import_problem(error)
    if isinstance(error, OSError):
        return error_text(error)
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, RuntimeError):
        import torch

        from d2v_fast.distributed.world import RunError

        if isinstance(error, (RunError, torch.OutOfMemoryError)):
            return str(error)
    return None
