"""The configuration that a run saved, also where its `config.json` was damaged."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from d2v_fast.config.errors import ConfigError
from d2v_fast.config.file import read_sections
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.files.reading import NotRegularError, read_text


def saved_config(run_folder: Path, *, warn: bool = True) -> dict[str, Any]:
    """Return what the `config.json` of a run holds, unchecked.

    Where the file is missing, empty, cut off or no text, as a full disk or a power cut leaves it, the newest good
    checkpoint has the configuration too; a warning says that it was taken from there.

    Args:
        run_folder: `runs/NAME`.
        warn: in one of the processes of a run is enough.
    Raises:
        ConfigError: the file cannot be read, or is not one that a run wrote; or it is damaged, and there is no
            checkpoint.
    """
    path = run_folder / "config.json"
    text, reason = "", None
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        reason = "is missing"
    except NotRegularError as error:
        reason = f"is {error.strerror}"
    except UnicodeDecodeError:
        reason = "is not UTF-8"
    except (OSError, ValueError) as error:
        raise ConfigError([f"not a configuration: {error}"], str(path)) from None
    else:
        # what a run writes ends with a brace; what its user mistyped does, too, and is not replaced in silence
        stripped = text.strip("\0 \n\r\t")
        if not stripped.endswith("}"):
            reason = "is cut off" if stripped else "is empty"
    if reason is None:
        content = read_sections(text, str(path))
        if "d2v" in content or "model_type" in content:
            return content
        reason = "holds no configuration of a run"
    found = _of_newest_checkpoint(run_folder)
    if found is None:
        raise ConfigError(
            [f"it {reason}, and no good checkpoint holds a copy: give the file that the run began with as `FILE`."],
            str(path),
        )
    config, step = found
    if warn:
        print(f"warning: {path} {reason}; its content is taken from the checkpoint step-{step}", file=sys.stderr)
    return config


def _of_newest_checkpoint(run_folder: Path) -> tuple[dict[str, Any], int] | None:
    # they need torch, which takes longer to import than a good file to be read
    from d2v_fast.checkpoints.files import complete_steps, verified_checkpoint
    from d2v_fast.checkpoints.shard_files import DamageError

    folder = run_folder / "checkpoints"
    for step in complete_steps(folder):
        with suppress(DamageError), verified_checkpoint(folder / f"step-{step}", step) as checkpoint:
            config = checkpoint.state.get("config")
            if isinstance(config, dict):
                return config, step
    return None
