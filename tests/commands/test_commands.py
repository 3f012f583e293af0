"""Every printed command can be pasted as it is, and does what its message says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_fast import command_lines, train
from d2v_fast.checkpoints import store
from d2v_fast.command_lines import path_override, path_words, resume_command, tool_command
from d2v_fast.commands.console import main as console
from d2v_fast.files import faults
from d2v_fast.interop.huggingface import export_model
from d2v_fast.training.supervise import _how_to_continue
from tests.helpers.given_models import given
from tests.helpers.runs import leave_out_reports, run_here, tiny_file

# a folder that no shell reads as it stands
ODD = 'it\'s "so" & more $'


def words_of(text: str) -> list[str]:
    """The words of the command at the end of a message, as a shell reads them: `python -c` prints them."""
    (command,) = re.findall(r": (\S*(?:d2v-fast|python\S*|torchrun) .*)$", text.strip(), re.MULTILINE)
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    done = subprocess.run(["bash", "-c", f"{show} {command}"], capture_output=True, text=True, check=True)
    words: list[str] = json.loads(done.stdout)
    assert shutil.which(words[0]) is not None, words
    return words


def paste(text: str) -> int:
    """Run the command at the end of a message in this process."""
    program, *arguments = words_of(text)
    assert Path(program).name == "d2v-fast"
    return console(arguments)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    leave_out_reports(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_after(step: int) -> Callable[[str], None]:
    passed: list[str] = []

    def point(name: str) -> None:
        passed.append(name)
        if name == "step" and passed.count("step") == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return point


@pytest.mark.parametrize("root", ["runs", ODD, "123"])
def test_stopped_run(root: str, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    file = tiny_file(quick, d2v__schedule__steps=4, d2v__run__dir=root)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "fault_point", stop_after(1))
        assert run_here(file, "--run", "r.1") == 0
    said = capsys.readouterr().out
    assert "to continue: " in said
    assert paste(said) == 0
    said = capsys.readouterr().out
    assert "resumed after step 2" in said
    assert (quick / root / "r.1" / "result.json").is_file()

    # the run exists
    assert run_here(file, "--run", "r.1") == 1
    told = capsys.readouterr().err
    assert "exists: choose another name with --run, or continue it: " in told
    assert paste(told) == 0
    assert "this run is finished" in capsys.readouterr().out


def test_run_that_begins_with_weights(quick: Path, capsys: pytest.CaptureFixture) -> None:
    file = tiny_file(quick, d2v__schedule__steps=1, d2v__schedule__warmup_steps=0)
    config, model, _ = given(file)
    export_model(model.student, config, quick / "weights")
    arguments = ["import", "weights", "--to", f"{ODD}/more", "--ds_config", str(file)]
    assert console(arguments) == 0
    assert paste(capsys.readouterr().out) == 0
    assert "resumed after step 0" in capsys.readouterr().out
    assert console(arguments) == 1
    assert paste(capsys.readouterr().err) == 0


def test_run_that_begins_with_weights_may_change_its_batch(quick: Path, capsys: pytest.CaptureFixture) -> None:
    file = tiny_file(quick, d2v__schedule__steps=1, d2v__schedule__warmup_steps=0)
    config, model, _ = given(file)
    export_model(model.student, config, quick / "weights")
    assert console(["import", "weights", "--to", "runs/more", "--ds_config", str(file)]) == 0
    other = ["--set", "train_batch_size=48", "--set", f"d2v.run.dir={quick}/runs"]
    assert run_here("--run", "more", "--resume", *other) == 0
    said = capsys.readouterr().out
    assert "resumed after step 0" in said
    assert "the conditions differ from the checkpoint" not in said


def test_no_room(quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    file = tiny_file(quick, d2v__schedule__steps=4, d2v__run__save_every=2, d2v__run__dir="a b")
    usage = shutil.disk_usage(quick)
    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert run_here(file, "--run", "r") == 1
    told = capsys.readouterr().err
    assert "Make room, then: " in told
    assert paste(told) == 0
    capsys.readouterr()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shards", fail)
        assert run_here(file, "--run", "s") == 1
    told = capsys.readouterr().err
    assert "could not be written" in told
    assert paste(told) == 0


def test_lost_connection(quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    file = tiny_file(quick, d2v__schedule__steps=2, d2v__schedule__warmup_steps=1, d2v__run__dir="a b")

    def lose(*arguments: object) -> None:
        raise RuntimeError("gloo/transport/tcp/pair.cc: Connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(train, "loop", lose)
        assert run_here(file, "--run", "r") == 1
    told = capsys.readouterr().err
    assert "has lost the connection to another process" in told
    assert paste(told) == 0


def test_supervision_that_gives_up(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _how_to_continue(None) == ""
    monkeypatch.setenv("D2V_SUPERVISION", "mark")
    words = words_of(_how_to_continue(Path("a b/r")))
    assert words[1:] == ["train", "--run", "r", "--resume", "--set", "d2v.run.dir=a b", "--supervise"]


def test_presets_and_tokenizers(quick: Path, capsys: pytest.CaptureFixture) -> None:
    assert console(["presets", "digits", "--to", "./~x y.json"]) == 0
    assert words_of(capsys.readouterr().out)[1:] == ["train", "./~x y.json"]
    assert console(["presets", "text_base", "--to", "b"]) == 0
    assert words_of(capsys.readouterr().out)[2:] == [
        *("b", "--set", "d2v.data.path=...", "--set", "d2v.data.tokenizer=..."),
    ]
    (quick / "t.txt").write_text("ab " * 300)
    assert console(["tokenize", "t.txt", "--train", "--vocab-size", "261", "--to", "300"]) == 0
    option = capsys.readouterr().out.strip().partition("for a run: ")[2]
    assert shlex.split(option) == ["--set", 'd2v.data.tokenizer="300"']
    assert Path("300").is_dir()


def test_paths() -> None:
    assert path_words(Path("a/b")) == "a/b"
    assert path_words(Path("~")) == "./~"
    assert path_override("k", Path("1e3")) == ["--set", 'k="1e3"']
    assert path_override("k", Path("null")) == ["--set", 'k="null"']
    assert path_override("k", Path("a=b")) == ["--set", "k=a=b"]


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["d2v_fast/train.py", "x"], ["python", "d2v_fast/train.py", "x"], ["PYTHON", "d2v_fast/train.py"]),
        (
            ["/a/console.py", "train", "x"],
            ["py", "-m", "d2v_fast.commands.console", "train", "x"],
            ["PYTHON", "-m", "d2v_fast.commands.console", "train"],
        ),
        (
            [str(command_lines._MAIN), "train", "x"],
            ["py", "-m", "d2v_fast", "train", "x"],
            ["PYTHON", "-m", "d2v_fast", "train"],
        ),
        # of another package
        (["/a/__main__.py", "x"], ["py", "-m", "pytest", "x"], ["TOOL", "train"]),
        (["/a/train.py", "x"], ["py", "-u", "-m", "d2v_fast.train", "x"], ["PYTHON", "-u", "-m", "d2v_fast.train"]),
        (["/a/bin/pytest"], ["py", "/a/bin/pytest"], ["TOOL", "train"]),
    ],
)
def test_how_this_process_was_started(
    argv: list[str], orig_argv: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", command_lines.COMMAND, "D2V_SUPERVISION"):
        monkeypatch.delenv(name, raising=False)
    names = {"PYTHON": command_lines._short(Path(sys.executable)), "TOOL": shlex.split(tool_command())[0]}
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    words = shlex.split(resume_command(Path("runs/r")))
    assert words == [*(names.get(word, word) for word in expected), "--run", "r", "--resume"]


def test_below_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the outermost process that names this program: found in a made-up table of processes."""
    parents = {
        10: (["env", "A=1", "python", "-u", "d2v_fast/train.py", "--x"], 20),
        20: (["/env/bin/python", "/env/bin/torchrun", "--nproc_per_node", "2", "d2v_fast/train.py", "--x"], 30),
        30: (["bash", "-c", "torchrun d2v_fast/train.py"], 1),
    }
    root = Path(command_lines.__file__).resolve().parent.parent
    for pid, (words, parent) in parents.items():
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes("\0".join([*words, ""]).encode())
        (folder / "stat").write_text(f"{pid} (a) b) S {parent} 0 0")
        (folder / "cwd").symlink_to(root)
    monkeypatch.setattr(command_lines, "_PROCESSES", tmp_path)
    monkeypatch.setattr(command_lines.os, "getppid", lambda: 10)
    monkeypatch.delenv(command_lines.COMMAND, raising=False)
    monkeypatch.delenv("D2V_SUPERVISION", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command(Path("runs/r")) == (
        "/env/bin/torchrun --nproc_per_node 2 d2v_fast/train.py --run-name r --resume"
    )
    # without one, as it was started itself
    (tmp_path / "10" / "stat").write_text("no")
    assert resume_command(Path("runs/r")).endswith("d2v-fast train --run r --resume")
    # and what `--supervise` passes on goes first
    monkeypatch.setenv(command_lines.COMMAND, json.dumps([["torchrun", "a b.py"], True]))
    assert resume_command(Path("runs/r")) == "torchrun 'a b.py' --run-name r --resume"
    command_lines.pass_on_command()
    assert json.loads(os.environ[command_lines.COMMAND]) == [["torchrun", "a b.py"], True]
