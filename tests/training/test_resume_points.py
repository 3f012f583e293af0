"""Interrupted at any point, a resumed run continues bit for bit as the uninterrupted one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.files import faults
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, leave_out_reports, run_forked, run_here, tiny_file
from tests.helpers.witness import Witness, same_bits

pytestmark = pytest.mark.usefixtures("quick_runs")


# five steps an epoch, two micro-steps a step
CHANGES: dict[str, Any] = {"train_batch_size": 280, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        assert run_here("--ds_config", tiny_file(folder, **CHANGES), "--run", "whole") == 0
    torch.set_num_threads(threads)
    found = figures(folder, "whole")
    assert [entry[1] for entry in found][4:6] == [1.0, 1.2]
    return found


def signal_in_step(step: int, patch: pytest.MonkeyPatch, micro_step: int = 1) -> None:
    """Request a stop in the middle of this step, counted from the start of the process; it becomes the last one."""
    forward, calls = Data2Vec.forward, []

    def forward_and_signal(self: Data2Vec, *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2 * (step - 1) + micro_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    patch.setattr(Data2Vec, "forward", forward_and_signal)


# the first step, in the middle of its micro-steps, the edges of two epochs, the step before the last
@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 5, 10, 11)), 6])
def test_stopped_at(step: int, tmp_path: Path, uninterrupted, capsys) -> None:
    file = tiny_file(tmp_path, **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(step, patch, micro_step=1 + step % 2)
        assert run_here("--ds_config", file, "--run", "r") == 0
    assert f"saved after step {step};" in capsys.readouterr().out
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert f"resumed after step {step}" in capsys.readouterr().out
    assert figures(tmp_path, "r") == uninterrupted


def test_stopped_in_the_last_step(tmp_path: Path, uninterrupted, capsys) -> None:
    file = tiny_file(tmp_path, **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(12, patch)
        assert run_here("--ds_config", file, "--run", "r") == 0
    # nothing was left to do, so it is finished
    assert (tmp_path / "runs/r/result.json").exists()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert "this run is finished" in capsys.readouterr().out
    assert figures(tmp_path, "r") == uninterrupted


def test_killed_before_the_first_save_and_within_a_step(tmp_path: Path, uninterrupted) -> None:
    """Kill a run before anything is saved, and between the micro-steps of a step, whose gradient is lost."""
    file, output = tiny_file(tmp_path, **CHANGES), tmp_path / "output"

    def kill_in(step: int) -> None:
        forward, calls = Data2Vec.forward, []

        def forward_or_die(self: Data2Vec, *arguments: Any) -> Any:
            calls.append(None)
            if len(calls) == 2 * step:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(self, *arguments)

        Data2Vec.forward = forward_or_die

    arguments = ["--ds_config", file, "--run", "r"]
    assert run_forked(*arguments, output=output, before=lambda: kill_in(2)) == [-signal.SIGKILL]
    assert run_forked(*arguments, "--resume", output=output, before=lambda: kill_in(5)) == [-signal.SIGKILL]
    assert "nothing has been saved yet" in output.read_text()
    assert run_forked(*arguments, "--resume", output=output) == [0], output.read_text()
    assert "resumed after step 3" in output.read_text()
    assert figures(tmp_path, "r") == uninterrupted


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_other_number_of_workers(tmp_path: Path, uninterrupted) -> None:
    """Resume in the middle of an epoch with four, no and one data loader workers."""
    for step, num_workers in ((2, 4), (4, 0), (12, 1)):
        file = tiny_file(tmp_path, **CHANGES, d2v__data__num_workers=num_workers)
        resume = ["--resume"] if num_workers != 4 else []
        with pytest.MonkeyPatch.context() as patch:
            made = 0 if num_workers == 4 else {0: 2, 1: 4}[num_workers]
            signal_in_step(step - made, patch)
            assert run_here("--ds_config", file, "--run", "r", *resume) == 0
    assert figures(tmp_path, "r") == uninterrupted


def test_strays_among_the_checkpoints(tmp_path: Path, uninterrupted, capsys) -> None:
    """Other files among the checkpoints are ignored whatever their name, and no file outside is touched."""
    file = tiny_file(tmp_path, **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(7, patch)
        assert run_here("--ds_config", file, "--run", "r") == 0
    folder, outside = tmp_path / "runs/r/checkpoints", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (folder / "step-900").mkdir()
    (folder / "step-901").symlink_to("nowhere")
    (folder / "step-902").symlink_to(outside, target_is_directory=True)
    (folder / "step-903").write_bytes(os.urandom(100))
    (folder / "latest").write_text("../../../outside")
    (folder / "latest.tmp").write_bytes(b"")
    (folder / "step-7 copy").mkdir()
    (folder / "step--1").mkdir()
    capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert "resumed after step 7" in capsys.readouterr().out
    assert figures(tmp_path, "r") == uninterrupted
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert {"step-12", "step-9"} <= {path.name for path in folder.iterdir()}


def test_folder_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    """A read-only file system or a file in the way is reported before the first step, without a traceback."""
    # /proc refuses new entries to every user
    for place in ("/proc/runs", tmp_path / "file" / "runs"):
        (tmp_path / "file").write_text("")
        file = tiny_file(tmp_path, d2v__run__dir=str(place))
        assert run_here("--ds_config", file, "--run", "r") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: the run folder cannot be made in {place}: ")
        assert "Traceback" not in error


def test_folder_that_is_gone_or_read_only_on_resume(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tiny_file(tmp_path, **CHANGES)
    with monkeypatch.context() as patch:
        signal_in_step(2, patch)
        assert run_here("--ds_config", file, "--run", "r") == 0
    steps = []
    monkeypatch.setattr(faults, "fault_point", lambda point: steps.append(point))
    run = tmp_path / "runs/r"
    checkpoints = run / "checkpoints"
    # a link that leads to a place where nothing can be written, as to a disk that was mounted read-only
    checkpoints.rename(tmp_path / "moved")
    checkpoints.symlink_to("/proc/self")
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 1
    assert f"error: {checkpoints} cannot be written" in capsys.readouterr().err
    checkpoints.unlink()
    run.rename(tmp_path / "elsewhere")
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 1
    assert f"there is no run r in {tmp_path / 'runs'} to resume" in capsys.readouterr().err
    assert steps == []


def test_teacher_after_resume_is_the_saved_average(tmp_path: Path, monkeypatch) -> None:
    """The restored teacher is the saved average, not a copy of the student."""
    file = tiny_file(tmp_path)
    with monkeypatch.context() as patch:
        first = Witness({}, patch.setattr)
        assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=6") == 0
    assert first.step == 6
    with monkeypatch.context() as patch:
        second = Witness({}, patch.setattr)
        second.step = 6
        start = {}

        def look(self: Any, batch: Any) -> Any:
            start.setdefault("teacher", second.average())
            start.setdefault("student", second.student())
            return begin(self, batch)

        begin = Witness.begin_step
        patch.setattr(Witness, "begin_step", look)
        assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert second.step == 12
    assert same_bits(start["teacher"], first.average())
    assert same_bits(start["student"], first.student())
    assert not same_bits(start["teacher"], start["student"])


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_processes_resume_bit_for_bit(stage: int, tmp_path: Path) -> None:
    """Before and after the resume the teacher matches an fp64 average on every rank, and the log an unbroken run."""
    file = tiny_file(tmp_path, zero_optimization__stage=stage, d2v__run__save_every=5)
    output = tmp_path / "output"

    def watch(first: int = 0, note: str = "") -> None:
        witness = Witness({}, note=tmp_path / f"{note}-{os.environ['RANK']}")
        witness.step = first

    options = {"output": output, "num_processes": 2}
    arguments = ["--ds_config", file, "--run"]
    assert run_forked(*arguments, "whole", **options, before=lambda: watch(note="whole")) == [0, 0], output.read_text()

    def kill_after_step_7() -> None:
        watch(note="r")
        end_step = faults.fault_point
        passed = []

        def fault_point(point: str) -> None:
            end_step(point)
            passed.append(point)
            if passed.count("step") == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        faults.fault_point = fault_point

    killed = run_forked(*arguments, "r", **options, before=kill_after_step_7)
    assert killed == [-signal.SIGKILL] * 2, output.read_text()
    resumed = run_forked(*arguments, "r", "--resume", **options, before=lambda: watch(5, "r"))
    assert resumed == [0, 0], output.read_text()
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")
    for rank in (0, 1):
        whole = (tmp_path / f"whole-{rank}").read_text().splitlines()
        parts = (tmp_path / f"r-{rank}").read_text().splitlines()
        assert parts == whole[:7] + whole[5:]
