"""`--supervise` restarts failed runs from their last checkpoint. Most workers here are scripts of a few lines."""

from __future__ import annotations

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from d2v_fast.cli.train_options import train_parser
from d2v_fast.config import load_config
from d2v_fast.files import faults
from d2v_fast.training import supervise
from tests.helpers.runs import (
    figures,
    fork,
    free_port,
    leave_out_reports,
    logged_steps,
    run_here,
    tiny_file,
    until,
    wait,
)

pytestmark = pytest.mark.waits

# beginning of every script: counts attempts and offers to mark a run folder and to save
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
root, rank = Path(sys.argv[1]), os.environ.get("RANK")
log = root / f"attempts-{rank}"
with log.open("a") as file:
    file.write(" ".join(os.environ[n] for n in ("D2V_SUPERVISION", "MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE")) + "\\n")
attempt = len(log.read_text().splitlines())
def save(step):
    (root / "runs/tiny-1/checkpoints" / f"step-{step}").mkdir(parents=True)
    (root / "runs/tiny-1/supervision").write_text(os.environ["D2V_SUPERVISION"])
def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
"""


def start(folder: Path, script: str, limit: int = 2, **environment: str) -> int:
    """Fork a supervisor whose worker is `script` instead of a training; return its process id."""
    config = load_config(tiny_file(folder))
    original = supervise._worker
    # the agent looks for its name in all modules, of which tests have thousands; those that were seen are remembered
    inspect.getmodule(compile("", "nowhere.py", "exec"))

    def work() -> int:
        os.environ.update(environment)

        def worker(*arguments: Any) -> Any:
            spec = original(*arguments)
            place = spec.args.index(sys.executable)
            local, command = spec.args[:place], (sys.executable, "-c", PRELUDE + script, str(folder))
            return dataclasses.replace(spec, args=(*local, *command))

        supervise._worker = worker
        return supervise.supervise(config, [], limit) or 0

    return fork(work, folder / f"output-{environment.get('RANK', '0')}")


def attempts(folder: Path, rank: int = 0) -> list[list[str]]:
    """Return mark, port, local rank and world size from the environment of each attempt of this rank."""
    path = folder / f"attempts-{rank}"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def test_starts_again_until_it_works(tmp_path: Path) -> None:
    """Every attempt reaches a new checkpoint, so a limit of one allows two restarts."""
    child = start(tmp_path, "if attempt < 3:\n    save(attempt)\n    die()", limit=1)
    assert wait(child) == [0]
    output = (tmp_path / "output-0").read_text()
    assert output.count("was killed by SIGKILL") == 2
    for step in (1, 2):
        assert f"restart 1 of 1 in 1 s, from the checkpoint step-{step}" in output
    seen = attempts(tmp_path)
    assert len(seen) == 3
    assert len({mark for mark, *_ in seen}) == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_gives_up_without_progress_and_waits_longer_each_time(tmp_path: Path) -> None:
    started = time.monotonic()
    child = start(tmp_path, "attempt == 1 and save(6)\nsys.exit(3)", limit=2)
    assert wait(child) == [1]
    assert time.monotonic() - started >= 1 + 2
    output = (tmp_path / "output-0").read_text()
    assert output.count("failed with status 3") == 3
    assert "restart 1 of 2 in 1 s, from the checkpoint step-6" in output
    assert "restart 2 of 2 in 2 s, from the checkpoint step-6" in output
    assert "giving up after 2 restarts from the checkpoint step-6" in output
    assert "--resume --run tiny-1" in output
    assert len(attempts(tmp_path)) == 3


def test_wrong_configuration_is_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = start(tmp_path, "sys.exit(2)")
    assert wait(child) == [2]
    assert len(attempts(tmp_path)) == 1
    assert "no restart, because the configuration is wrong" in (tmp_path / "output-0").read_text()
    # what can be seen before anything is started is not started
    assert run_here("--ds_config", tiny_file(tmp_path), "--supervise", "--set", "d2v.model.dpeth=3") == 2
    assert "Did you mean `d2v.model.depth`?" in capsys.readouterr().err


# the signals share one handler: the others are slow
OTHER_SIGNALS = [pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHER_SIGNALS])
def test_request_to_stop_is_passed_on(number: signal.Signals, tmp_path: Path) -> None:
    script = """
def stop(number, frame):
    (root / "got").write_text(signal.Signals(number).name)
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
(root / "ready").touch()
time.sleep(60)
"""
    child = start(tmp_path, script)
    until((tmp_path / "ready").exists)
    time.sleep(0.2)
    os.kill(child, number)
    assert wait(child, timeout_s=20) == [0]
    assert len(attempts(tmp_path)) == 1
    # a training knows the first three
    assert (tmp_path / "got").read_text() == ("SIGTERM" if number == signal.SIGHUP else number.name)


def test_a_worker_that_fails_while_it_stops_is_not_started_again(tmp_path: Path) -> None:
    script = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n(root / 'ready').touch()\ntime.sleep(60)"
    child = start(tmp_path, script)
    until((tmp_path / "ready").exists)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert wait(child, timeout_s=20) == [5]
    assert len(attempts(tmp_path)) == 1


@pytest.mark.slow
def test_request_to_stop_between_two_attempts(tmp_path: Path) -> None:
    child = start(tmp_path, "sys.exit(1)", limit=9)
    output = tmp_path / "output-0"
    until(lambda: output.exists() and "restart 4 of 9 in 8 s" in output.read_text())
    started = time.monotonic()
    os.kill(child, signal.SIGTERM)
    assert wait(child, timeout_s=20) == [0]
    assert time.monotonic() - started < 6
    assert len(attempts(tmp_path)) == 4


def start_two(folder: Path, script: str, limit: int = 2) -> list[int]:
    """Start two supervisors as a launcher of two processes on one machine does."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # in order, since the rank follows from the process id
    return [start(folder, script, limit, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


# slow: six processes. The restart of a single one is tested in every run
@pytest.mark.slow
def test_a_fault_of_one_restarts_all(tmp_path: Path) -> None:
    script = """
if attempt == 1:
    if rank == "1":
        time.sleep(1)
        die()
    time.sleep(60)
"""
    children = start_two(tmp_path, script)
    assert wait(*children) == [0, 0], [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    seen = [attempts(tmp_path, rank) for rank in range(2)]
    assert [len(one) for one in seen] == [2, 2]
    assert len({mark for one in seen for mark, *_ in one}) == 1
    # both attempts meet at a port of their own, and a process keeps its GPU
    assert [one[1] for one in seen[0]] == [one[1] for one in seen[1]]
    assert seen[0][0][1] != seen[0][1][1]
    assert {one[3] for both in seen for one in both} == {"2"}
    assert sorted({one[2] for one in both} for both in seen) == [{"0"}, {"1"}]
    assert "was killed by SIGKILL" in (tmp_path / "output-1").read_text()
    assert "restart 1 of 2 in 1 s" in (tmp_path / "output-0").read_text()


@pytest.mark.slow
def test_no_attempt_of_two_is_one_too_many(tmp_path: Path) -> None:
    children = start_two(tmp_path, "rank == '1' and sys.exit(1)\ntime.sleep(60)", limit=1)
    # the other one, which waits for another attempt, is told that there is none
    assert wait(*children) == [1, 1]
    assert "giving up after 1 restarts from the beginning" in (tmp_path / "output-0").read_text()
    assert "cannot reach the other processes" in (tmp_path / "output-1").read_text()
    assert [len(attempts(tmp_path, rank)) for rank in range(2)] == [2, 2]


def test_number_of_restarts() -> None:
    def parsed(*arguments: str) -> int | None:
        number: int | None = train_parser().parse_args(["--ds_config", "x.json", *arguments]).supervise
        return number

    assert parsed() is None
    assert parsed("--supervise") == 3
    assert parsed("--supervise", "7") == 7
    assert parsed("--supervise", "--resume") == 3
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit) as raised:
            parsed(f"--supervise={wrong}")
        assert raised.value.code == 2


def test_later_attempts_find_their_run_by_its_mark(tmp_path: Path, monkeypatch, capsys) -> None:
    leave_out_reports(monkeypatch.setattr)
    arguments = ["--ds_config", tiny_file(tmp_path)]
    assert run_here(*arguments, "--run", "whole") == 0
    monkeypatch.setenv("D2V_SUPERVISION", "first")
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_fault", faults.Fault("save.manifest:2:ENOSPC"))
        assert run_here(*arguments) == 1
    assert run_here(*arguments) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    assert figures(tmp_path, "tiny-1") == figures(tmp_path, "whole")
    monkeypatch.setenv("D2V_SUPERVISION", "second")
    assert run_here(*arguments, "--set", 'd2v.schedule={"steps": 1}') == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-1", "tiny-2", "whole"]
    # a name that was taken before is as wrong as ever
    monkeypatch.setenv("D2V_SUPERVISION", "third")
    assert run_here(*arguments, "--run", "whole") == 1
    assert "or continue it: " in capsys.readouterr().err


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "d2v_fast/train.py", "--ds_config", str(tiny_file(folder)), *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


@pytest.mark.slow
def test_a_real_run_comes_to_the_same_end(tmp_path: Path) -> None:
    """A run without a name or `--resume`, each attempt of which dies in its fifth step, ends as an unbroken one."""
    done = subprocess.run(
        command(tmp_path, "--supervise", "1"), capture_output=True, text=True, env=environment(D2V_FAULT="step:5")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("was killed by SIGKILL") == 3
    for step in (3, 6, 9):
        assert f"from the checkpoint step-{step}" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-1"]
    whole = subprocess.run(command(tmp_path, "--run", "whole"), capture_output=True, text=True, env=environment())
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert figures(tmp_path, "tiny-1") == figures(tmp_path, "whole")
    # supervised again it is another run, and a finished one stays as it is
    again = subprocess.run(
        command(tmp_path, "--supervise", "--run", "tiny-1", "--resume"),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "this run is finished" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_run_saves_when_its_supervisor_ends(number: signal.Signals, tmp_path: Path) -> None:
    with (tmp_path / "output").open("w") as output:
        arguments = command(tmp_path, "--supervise", "--run", "r", "--set", "d2v.schedule.steps=100000")
        child = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment())
        until(lambda: logged_steps(tmp_path, "r") > 5, timeout_s=120)
        child.send_signal(number)
        assert child.wait(60) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    until(lambda: "saved after step" in (tmp_path / "output").read_text())
    saved = max(int(path.name.partition("-")[2]) for path in (tmp_path / "runs/r/checkpoints").iterdir())
    assert logged_steps(tmp_path, "r") == saved
