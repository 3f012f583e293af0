"""Explain to a user what a path is that was given for a model and is not a Transformers folder."""

from __future__ import annotations

import re
from pathlib import Path

from d2v_fast.command_lines import path_words, tool_command
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.files.reading import MAX_POINTER_BYTES, POINTER, is_pointer, printable, read_bytes, read_json

# pickles of Transformers, DeepSpeed and PyTorch Lightning
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt")
_STEP = re.compile(r"step-\d+")


def explain(path: Path) -> str | None:
    """Return a sentence for an error: what is at a path that should be a Transformers folder, and what to do.

    Returns:
        None if the path may be a Transformers folder, or if nothing is known about it.
    """
    shown = printable(str(path))
    if path.is_file():
        return _explain_file(path, shown)
    if not path.is_dir():
        return f"`{shown}` is neither a file nor a folder." if path.exists() else f"`{shown}` does not exist."
    run = _run_of(path)
    if run is not None:
        return _explain_run(path, run)
    names = {entry.name for entry in path.iterdir()}
    if "latest" in names and any(name.startswith("global_step") for name in names):
        return f"`{shown}` holds checkpoints of DeepSpeed. {_STRIP_DEEPSPEED}"
    if any(name.endswith("_model_states.pt") for name in names):
        return f"`{shown}` is a checkpoint of DeepSpeed. {_STRIP_DEEPSPEED}"
    if "config.json" in names:
        return None
    if "model.safetensors" in names:
        return (
            f"`{shown}` holds weights without their `config.json`: `save_pretrained(folder)` of the model writes both."
        )
    if found := sorted(names & set(_TOKENIZERS)):
        return (
            f"`{shown}` holds a tokenizer ({', '.join(found)}) and no model. Name the folder of the model, and this "
            "one with `--tokenizer`."
        )
    inner = sorted(entry.parent.name for entry in path.glob("*/config.json"))
    if inner:
        named = printable(", ".join(inner[:10]))
        return f"`{shown}` holds no model itself, but folders with a `config.json`. Name one of them: {named}."
    return None


_STRIP_DEEPSPEED = (
    "Its files are pickles of a training process, which are not read. Where it was trained, DeepSpeed's "
    "`zero_to_fp32.py` makes one file of weights of it."
)


def _explain_file(path: Path, shown: str) -> str:
    beside = path.parent / "config.json"
    if path.stat().st_size <= MAX_POINTER_BYTES and is_pointer(read_bytes(path, MAX_POINTER_BYTES)):
        return f"`{shown}` is {POINTER}."
    if path.name == "config.json" or path.suffix == ".safetensors":
        if beside.is_file():
            return f"`{shown}` is a file of a folder: name the folder, `{printable(str(path.parent))}`."
        return f"`{shown}` is a file of weights without its `config.json`: name a folder that holds both."
    if path.name in _TOKENIZERS:
        return f"`{shown}` is the file of a tokenizer and no model."
    if path.suffix == ".bin" and beside.is_file():
        return (
            f"`{shown}` is a pickle beside a `config.json`. Save the model again with Transformers: "
            "`save_pretrained(folder)` writes a folder with `model.safetensors`."
        )
    if path.suffix in _PICKLES:
        command = tool_command("import", path_words(path), "--to", "FOLDER")
        return f"`{shown}` is a checkpoint: `{printable(command)}` makes a Transformers folder of it."
    return f"`{shown}` is a file and no folder."


def _run_of(path: Path) -> Path | None:
    """Return the folder of the run that a folder is, or belongs to."""
    for candidate in (path, path.parent, path.parent.parent):
        if is_run(candidate):
            inside = path.relative_to(candidate).parts
            if not inside or inside[0] == "checkpoints":
                return candidate
    return None


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run: its configuration has a section "d2v"."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "d2v" in raw


def _explain_run(path: Path, run: Path) -> str:
    shown, name = printable(str(path)), printable(str(run))
    if _STEP.fullmatch(path.name):
        step = path.name.removeprefix("step-")
        command = tool_command("export", path_words(run), "--step", step, "--to", "FOLDER")
        return (
            f"`{shown}` is a checkpoint of the run `{name}`. `{printable(command)}` makes a Transformers folder of it, "
            f"and `embed` and `probe` take `{name} --step {step}`."
        )
    what = "is the folder of a run" if path == run else f"belongs to the run `{name}`"
    if (run / "export" / "config.json").is_file():
        return f"`{shown}` {what}: name `{name}/export`, which holds its weights."
    command = tool_command("export", path_words(run))
    return f"`{shown}` {what}: `{printable(command)}` makes a Transformers folder of it, `{name}/export`."
