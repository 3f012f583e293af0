"""An exception in words for the user, or none where it is a fault of this library."""

from __future__ import annotations

from d2v_fast.io_errors import error_text

_TRAIN = "pip install 'd2v_fast[train]'"


def in_words(error: Exception) -> str | None:
    """What to tell; None where `error` is a fault of this library."""
    if isinstance(error, ImportError):
        from d2v_fast.commands import tool_command

        name = (error.name or "a package").partition(".")[0]
        advice = (
            ""
            if name == "d2v_fast"
            else f" `{_TRAIN}` installs what is needed, and `{tool_command('doctor')}` looks at it."
        )
        return f"{name} cannot be imported: {error}.{advice}"
    if isinstance(error, OSError):
        return error_text(error)
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, RuntimeError):
        import torch

        from d2v_fast.world import RunError

        if isinstance(error, (RunError, torch.OutOfMemoryError)):
            return str(error)
    return None
