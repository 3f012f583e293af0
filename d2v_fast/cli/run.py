"""How every command ends: the exit status and the message for what it raised."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from d2v_fast.errors import OptionError, UserError
from d2v_fast.files.io_errors import error_text
from d2v_fast.packages import import_problem
from d2v_fast.processes.signals import EndOnSignal

# a wrong configuration is a wrong option of these commands; for the others it is a damaged run folder
_TAKE_CONFIG = ("train", "finetune", "check", "import", "tokenize")
_FEWER_SAMPLES = (
    "Lower `train_micro_batch_size_per_gpu` (accumulation makes up for it), or set `d2v.model.gradient_checkpointing`."
)
# command -> advice after an out-of-memory error
_OUT_OF_MEMORY = {
    **dict.fromkeys(("train", "finetune", "check"), _FEWER_SAMPLES),
    **dict.fromkeys(("embed", "predict"), "Lower `--batch-size`."),
}


def run_command(name: str, work: Callable[[], int]) -> int:
    """Run a command; print an error that its user can mend instead of raising it.

    Args:
        name: of the command, such as "train".
        work: the command itself; returns the exit status.
    Returns:
        The exit status: 0 done, 1 failed, 2 wrong options or configuration, 128 plus the number of a signal.
    Raises:
        Exception: a fault of this library, which deserves its traceback.
    """
    try:
        with EndOnSignal():
            return work()
    except KeyboardInterrupt as error:
        print(_interrupted(name, str(error)), file=sys.stderr)
        return getattr(error, "status", 130)
    except Exception as error:
        message = explain(error, name)
        if message is None:
            raise
        # all processes of a run raise such an error
        if is_first_process() or not (isinstance(error, UserError) and error.by_all):
            print(f"error: {message}", file=sys.stderr)
        return _status(error, name)


def explain(error: Exception, command: str = "") -> str | None:
    """Return the message for an error that the user can mend, or None for a fault of this library."""
    if isinstance(error, ImportError):
        return import_problem(error)
    if isinstance(error, OSError):
        return error_text(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValueError):
        # training reads only what has been checked: there a plain ValueError is a fault
        return None if command == "train" else str(error)
    return _runtime_problem(error, command) if isinstance(error, RuntimeError) else None


def is_first_process() -> bool:
    """Return whether this process prints for the run; known before the processes are connected."""
    return os.environ.get("RANK", "0") == "0"


def _runtime_problem(error: RuntimeError, command: str) -> str | None:
    """Return the message for a RuntimeError of torch that the user can mend, or None for any other."""
    import torch

    from d2v_fast.data import worker_died
    from d2v_fast.distributed.world import lost_connection

    if isinstance(error, torch.OutOfMemoryError):
        return "\n".join(filter(None, (str(error), _OUT_OF_MEMORY.get(command))))
    return lost_connection(error) or worker_died(error)


def _status(error: Exception, command: str) -> int:
    if isinstance(error, UserError) and (isinstance(error, OptionError) or command in _TAKE_CONFIG):
        return error.status
    return 1


def _interrupted(command: str, signal: str) -> str:
    if not signal:
        return "interrupted"
    if command in ("train", "finetune"):
        return f"{signal} before a step was made; the same command begins again"
    return f"{signal}; what was half written is removed"
