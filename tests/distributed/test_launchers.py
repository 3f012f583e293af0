"""Real launchers: the processes they start, signals and restarts. See docs/launch.md."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import (
    figures,
    free_port,
    leave_out_reports,
    logged_steps,
    processes,
    run_forked,
    tiny_file,
    until,
)

pytestmark = [
    pytest.mark.waits,
    pytest.mark.slow,
    needs_deepspeed,
]

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"],
}


def command(launcher: str, folder: Path, *arguments: str, **changes: object) -> list[str]:
    """Return the command by which two processes train the tiny model as the run `r`."""
    words = [sys.executable, "-m", *LAUNCHERS[launcher]]
    if launcher == "deepspeed":
        words.append(str(free_port()))
    file = tiny_file(folder, **changes)
    return [*words, "d2v_fast/train.py", "--ds_config", str(file), "--run-name", "r", *arguments]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}


@contextlib.contextmanager
def running(words: list[str], output: Path) -> Iterator[subprocess.Popen]:
    """Run a launcher in its own process group, and end all of the group afterwards."""
    with output.open("w") as file:
        launcher = subprocess.Popen(words, stdout=file, stderr=file, env=environment(), start_new_session=True)
    try:
        yield launcher
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
        for left in processes(str(output.parent)):
            os.kill(left, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Return the log of two processes that were forked, not launched."""
    folder = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    file = tiny_file(folder, d2v__schedule__steps=40, d2v__guard__min_prediction_std=0)
    output = folder / "output"
    statuses = run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2, before=leave_out_reports)
    assert statuses == [0, 0], output.read_text()
    return figures(folder, "r")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, tmp_path: Path, undisturbed: list[tuple]) -> None:
    words = command(launcher, tmp_path, d2v__schedule__steps=40, d2v__guard__min_prediction_std=0)
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr
    assert figures(tmp_path, "r") == undisturbed


@pytest.mark.parametrize(
    ("launcher", "target", "supervised"),
    [
        ("torchrun", "launcher", False),
        ("torchrun", "launcher", True),
        ("torchrun", "rank", False),
        ("deepspeed", "launch.py", False),
        ("deepspeed", "launch.py", True),
        ("deepspeed", "rank", False),
        ("deepspeed", "group", False),
    ],
)
def test_sigterm_saves_and_ends(launcher: str, target: str, supervised: bool, tmp_path: Path) -> None:
    changes = {"d2v__schedule__steps": 100_000, "d2v__run__save_every": 1000}
    words = command(launcher, tmp_path, *(["--supervise"] if supervised else []), **changes)
    output = tmp_path / "output"
    with running(words, output) as process:
        until(lambda: logged_steps(tmp_path, "r") > 5 or process.poll() is not None, timeout_s=120)
        if target == "launcher":
            process.terminate()
        elif target == "launch.py":
            [pid] = processes("deepspeed.launcher.launch", str(tmp_path))
            os.kill(pid, signal.SIGTERM)
        elif target == "rank":
            ranks = processes("d2v_fast/train.py", str(tmp_path))
            [pid] = [pid for pid, found in ranks.items() if found.get("RANK") == "1"]
            os.kill(pid, signal.SIGTERM)
        else:
            # the command alone does not pass it on: it ends, and the training goes on
            process.terminate()
            process.wait(30)
            before = logged_steps(tmp_path, "r")
            until(lambda: logged_steps(tmp_path, "r") > before + 5)
            os.killpg(process.pid, signal.SIGTERM)
        until(lambda: not processes(str(tmp_path)), timeout_s=60)
        status = process.wait(30)
    text = output.read_text()
    assert "stopped on request and saved after step" in text, text
    [saved] = (tmp_path / "runs/r/checkpoints").iterdir()
    assert saved.name == f"step-{logged_steps(tmp_path, 'r')}"
    # the command that did not pass the signal on has died of it
    assert status == {"rank": 0, "group": -signal.SIGTERM}.get(target, 1)
    assert "supervise: restart" not in text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_below_a_launcher_is_started_again(launcher: str, tmp_path: Path, undisturbed: list[tuple]) -> None:
    output = tmp_path / "output"
    words = command(launcher, tmp_path, "--supervise", d2v__schedule__steps=40, d2v__guard__min_prediction_std=0)
    with running(words, output) as process:
        until(lambda: logged_steps(tmp_path, "r") > 5 or process.poll() is not None, timeout_s=120)
        ranks = processes("d2v_fast/train.py", str(tmp_path))
        [victim] = [pid for pid, found in ranks.items() if found.get("RANK") == "1" and "D2V_SUPERVISION" in found]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(200) == 0, output.read_text()
    text = output.read_text()
    assert f"supervise: rank 1 (pid {victim}) was killed by SIGKILL" in text
    assert "supervise: restart 1 of 3 in 1 s, from the checkpoint step-" in text
    assert figures(tmp_path, "r") == undisturbed


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_rank_without_supervision_ends_the_run(launcher: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with running(command(launcher, tmp_path, d2v__schedule__steps=100_000), output) as process:
        until(lambda: logged_steps(tmp_path, "r") > 5 or process.poll() is not None, timeout_s=120)
        ranks = processes("d2v_fast/train.py", str(tmp_path))
        [victim] = [pid for pid, found in ranks.items() if found.get("RANK") == "1"]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(60) != 0
        until(lambda: not processes(str(tmp_path)), timeout_s=60)
