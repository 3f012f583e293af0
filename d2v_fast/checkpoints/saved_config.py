"""Read the configuration of a run, from a checkpoint if its `config.json` is damaged."""

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
    """Return the content of a run's `config.json`, unchecked.

    If the file is missing, empty, cut off or not text, as after a full disk or a power cut, the configuration in the
    newest good checkpoint is returned, with a warning.

    Args:
        run_folder: `runs/NAME`.
        warn: Print the warning; one process of a run is enough.
    Raises:
        ConfigError: The file cannot be read or was not written by a run; or it is damaged, and there is no checkpoint.
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
        # a complete file ends with a brace, and so does one that a user edited, which must not be replaced in silence
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
    # these import torch, which a good file does not need
    from d2v_fast.checkpoints.files import complete_steps, verified_checkpoint
    from d2v_fast.checkpoints.shard_files import DamageError

    folder = run_folder / "checkpoints"
    for step in complete_steps(folder):
        with suppress(DamageError), verified_checkpoint(folder / f"step-{step}", step) as checkpoint:
            config = checkpoint.state.get("config")
            if isinstance(config, dict):
                return config, step
    return None
