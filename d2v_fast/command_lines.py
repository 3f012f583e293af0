"""Commands for messages, which the user can paste into a shell in the folder where the program was started."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# environment variable in which `--supervise` tells the training process how it was started
COMMAND = "D2V_COMMAND"
# environment variable of `--supervise`: the mark of its run, which a file in the run folder holds as well
SUPERVISION = "D2V_SUPERVISION"
_TOOL = "d2v-fast"
_SCRIPT = Path(__file__).resolve().with_name("train.py")
# `python -m d2v_fast` sets sys.argv[0] to the full path of this file
_MAIN = Path(__file__).with_name("__main__.py")
_PROCESSES = Path("/proc")


def tool_command(*arguments: object) -> str:
    """Return a `d2v-fast` command, quoted for a shell."""
    return shlex.join([*_tool(), *map(str, arguments)])


def resume_command(run_folder: Path) -> str:
    """Return the command that continues the run in `run_folder`, quoted for a shell.

    It starts the program as this process was started: by `d2v-fast`, as a file, or by a launcher.
    """
    started, launched = _started_as()
    # torchrun takes --run for its own option
    option = "--run-name" if launched else "--run"
    name = run_folder.name
    arguments = [f"{option}={name}"] if name.startswith("-") else [option, name]
    arguments.append("--resume")
    if run_folder.parent != Path("runs"):
        arguments += path_override("d2v.run.dir", run_folder.parent)
    if SUPERVISION in os.environ:
        arguments.append("--supervise")
    return shlex.join([*started, *arguments])


def pass_on_command() -> None:
    """Record in the environment how this process was started, for the processes that it starts."""
    os.environ[COMMAND] = json.dumps(_started_as())


def path_words(path: Path) -> str:
    """Return a path as an argument that `expand_path` leaves unchanged."""
    text = str(path)
    return f"./{text}" if text.startswith(("~", "-")) else text


def path_override(key: str, path: Path) -> list[str]:
    """Return the two arguments that set a key of the configuration to a path."""
    text = path_words(path)
    with contextlib.suppress(ValueError):
        # an override that is valid JSON is read as JSON
        json.loads(text)
        text = json.dumps(text)
    return ["--set", f"{key}={text}"]


def _started_as() -> tuple[list[str], bool]:
    """Return the words before the options of training, and whether a launcher is among them."""
    if COMMAND in os.environ:
        words, launched = json.loads(os.environ[COMMAND])
        return words, launched
    above = _launcher() if "WORLD_SIZE" in os.environ else None
    if above is not None:
        return above, True
    script = Path(sys.argv[0]).name
    if script in ("train.py", "console.py") or Path(sys.argv[0]) == _MAIN:
        given = len(sys.argv) - 1
        words = sys.orig_argv[: len(sys.orig_argv) - given]
        return [_short(Path(sys.executable)), *words[1:], *([] if script == "train.py" else ["train"])], False
    return [*_tool(), "train"], False


def _launcher() -> list[str] | None:
    """Return the command line, up to this program, of the outermost process that launched it; None without one."""
    found, process = None, os.getppid()
    while process > 1:
        folder = _PROCESSES / str(process)
        try:
            words = [os.fsdecode(word) for word in (folder / "cmdline").read_bytes().split(b"\0")[:-1]]
            directory = Path(os.readlink(folder / "cwd"))
            process = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        place = next((i for i, word in enumerate(words) if i and _is_program(directory / word)), None)
        if place is not None:
            found = _without_interpreter(words[: place + 1]) + (["train"] if Path(words[place]).name == _TOOL else [])
    return found


def _is_program(path: Path) -> bool:
    return path.name == _TOOL or (path.name == _SCRIPT.name and path.resolve() == _SCRIPT)


def _without_interpreter(words: Sequence[str]) -> list[str]:
    """Leave out the interpreter of a script that pip installed beside it."""
    first = Path(words[0])
    if first.name.startswith("python") and Path(words[1]).parent == first.parent:
        return [_short(Path(words[1])), *words[2:]]
    return [_short(first) if first.is_absolute() else words[0], *words[1:]]


def _tool() -> list[str]:
    """Return the words that start `d2v-fast`."""
    own, beside = Path(sys.argv[0]), Path(sys.executable).with_name(_TOOL)
    for path in (own, beside):
        if path.name == _TOOL and path.is_file():
            return [_short(path)]
    return [_short(Path(sys.executable)), "-m", "d2v_fast"]


def _short(path: Path) -> str:
    """Return the name if the search path finds the same file, else the path, relative if it is below this folder."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        # the working directory has been deleted
        return str(path)
    path = Path(os.path.abspath(path))
    found = shutil.which(path.name)
    if found is not None and os.path.abspath(found) == str(path):
        return path.name
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
