"""Training from the command line: resume, kills, signals, faults and engines."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.cli.train_options import train_parser
from d2v_fast.config import load_config
from d2v_fast.files import faults
from d2v_fast.memory.sizes import shapes_of
from d2v_fast.objectives.data2vec import Data2Vec, StepOutput
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, leave_out_reports, run_forked, run_here, start, tiny_file, wait

pytestmark = pytest.mark.usefixtures("quick_runs")


SAVE_POINTS = ("begin", "copy", "tensors", "manifest", "rename", "retention", "delete")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    """Return the log of the tiny run without an interruption."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        assert run_here("--ds_config", tiny_file(folder), "--run", "whole") == 0
    return figures(folder, "whole")


@pytest.mark.reports
def test_run_leaves_everything_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path), "--profile") == 0
    folder = tmp_path / "runs" / "tiny-1"
    for name in ("config.json", "log.jsonl", "curves.png", "profile.json", "probe.json", "result.json"):
        assert (folder / name).is_file(), name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-12", "step-9"]
    assert (folder / "export" / "model.safetensors").is_file()
    assert any((folder / "tensorboard").iterdir())
    output = capsys.readouterr().out
    assert output.splitlines()[-1] == f"run folder: {folder}"
    assert "raw pixels" in output
    # what takes seconds is announced before it is done
    stages = ["importing the engine", "run folder:", "building the model", "compiling the mask sampler"]
    stages += ["making the first batch", "step 1/12", "exporting the student", "export:", "probing the features"]
    places = [output.index(stage) for stage in stages]
    assert places == sorted(places)
    assert "target + loss" in output
    shares = json.loads((folder / "profile.json").read_text())["percent"]
    assert sum(shares.values()) == pytest.approx(100)
    assert min(shares.values()) > 0
    # what was resolved can be run again, under a name of its own
    assert run_here("--ds_config", folder / "config.json", "--run", "again", "--dry-run") == 0


def test_loss_falls(tmp_path: Path) -> None:
    schedule = {"kind": "constant", "steps": 60, "warmup_steps": 5}
    file = tiny_file(tmp_path, d2v__schedule=schedule, d2v__run__save_every=100, optimizer__params__lr=5e-3)
    assert run_here("--ds_config", file, "--run", "r") == 0
    losses = [entry[2] for entry in figures(tmp_path, "r")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_moments_are_computed_on_logged_steps_only(tmp_path: Path, monkeypatch) -> None:
    objective, computed = Data2Vec.objective, []

    def objective_and_see(self: Data2Vec, *arguments: Any) -> StepOutput:
        output = objective(self, *arguments)
        computed.append(output.moments is not None)
        return output

    monkeypatch.setattr(Data2Vec, "objective", objective_and_see)
    for name, log_every in (("some", 5), ("all", 1)):
        file = tiny_file(tmp_path, gradient_accumulation_steps=2, d2v__run__log_every=log_every)
        assert run_here("--ds_config", file, "--run", name) == 0
    # two micro-steps of each step
    logged = [1, 5, 10, 12]
    assert computed == [step in logged for step in range(1, 13) for _ in range(2)] + 24 * [True]
    assert figures(tmp_path, "some") == [entry for entry in figures(tmp_path, "all") if entry[0] in logged]


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_kill_during_save(point: str, tmp_path: Path, uninterrupted) -> None:
    # the third save is the first that deletes an old checkpoint
    count = {"retention": 2, "delete": 1}.get(point, 2)
    file = tiny_file(tmp_path)

    def arm() -> None:
        faults._fault = faults.Fault(f"save.{point}:{count}")

    output = tmp_path / "output"
    assert run_forked("--ds_config", file, "--run", "r", output=output, before=arm) == [-signal.SIGKILL]
    assert run_forked("--run", "r", "--resume", "--set", f"d2v.run.dir={tmp_path / 'runs'}", output=output) == [0]
    assert "resumed after step" in output.read_text()
    assert figures(tmp_path, "r") == uninterrupted
    left = sorted(path.name for path in (tmp_path / "runs/r/checkpoints").iterdir())
    assert left == ["step-12", "step-9"]


def test_kill_at_random_moments(tmp_path: Path, uninterrupted) -> None:
    file, output = tiny_file(tmp_path), tmp_path / "output"
    started = time.monotonic()
    assert run_forked("--ds_config", file, "--run", "run-0", output=output) == [0]
    whole_s = time.monotonic() - started
    draw, delays, finished, killed = random.Random(), [], 0, 0
    while killed < 5:
        delays.append(draw.uniform(0, whole_s))
        name = f"run-{finished + 1}"
        resume = ["--resume"] if (tmp_path / "runs" / name).is_dir() else []
        child = start(["--ds_config", file, "--run", name, *resume], output)
        time.sleep(delays[-1])
        os.kill(child, signal.SIGKILL)
        [status] = wait(child)
        assert status in (0, -signal.SIGKILL), output.read_text()
        killed += status != 0
        finished += status == 0
    name = f"run-{finished + 1}"
    resume = ["--resume"] if (tmp_path / "runs" / name).is_dir() else []
    assert run_forked("--ds_config", file, "--run", name, *resume, output=output) == [0], output.read_text()
    for number in range(finished + 2):
        assert figures(tmp_path, f"run-{number}") == uninterrupted, f"delays {delays}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_then_ends(
    number: signal.Signals, tmp_path: Path, uninterrupted, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    passed = []

    def signal_at_step_5(point: str) -> None:
        passed.append(point)
        if point == "step" and passed.count(point) == 5:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(faults, "fault_point", signal_at_step_5)
        assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r") == 0
    assert "saved after step 6; to continue: " in capsys.readouterr().out
    assert (tmp_path / "runs/r/checkpoints/step-6").is_dir()
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r", "--resume") == 0
    assert figures(tmp_path, "r") == uninterrupted


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    output = tmp_path / "output"

    def slow_steps() -> None:
        faults.fault_point = lambda point: time.sleep(60) if point == "step" else None

    child = start(["--ds_config", tiny_file(tmp_path), "--run", "r"], output, before=slow_steps)
    deadline = time.monotonic() + 60
    while "step 1/12" not in (output.read_text() if output.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    time.sleep(1.2)
    os.kill(child, signal.SIGTERM)
    assert wait(child, timeout_s=10) == [128 + signal.SIGTERM]


def test_nothing_but_damage_stops_the_run(tmp_path: Path, capsys) -> None:
    file = tiny_file(tmp_path)
    assert run_here("--ds_config", file, "--run", "r") == 0
    for step in (12, 9):
        damage(tmp_path / f"runs/r/checkpoints/step-{step}/shard-00000.safetensors")
    (tmp_path / "runs/r/result.json").unlink()
    # the second time as well: beginning again in silence would lose the run
    for _ in range(2):
        assert run_here("--ds_config", file, "--run", "r", "--resume") == 1
        assert "no usable checkpoint" in capsys.readouterr().err


def test_resume_ignores_the_number_of_workers(tmp_path: Path, uninterrupted, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(faults, "_fault", faults.Fault("save.manifest:2:ENOSPC"))
        assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r") == 1
    changed = tiny_file(tmp_path, d2v__data__num_workers=2)
    assert run_here("--ds_config", changed, "--run", "r", "--resume") == 0
    assert figures(tmp_path, "r") == uninterrupted


def test_damaged_checkpoint_falls_back(tmp_path: Path, uninterrupted, capsys) -> None:
    file = tiny_file(tmp_path)
    assert run_here("--ds_config", file, "--run", "r") == 0
    damage(tmp_path / "runs/r/checkpoints/step-12/shard-00000.safetensors")
    (tmp_path / "runs/r/result.json").unlink()
    capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    output = capsys.readouterr().out
    assert "step-12 is damaged (shard-00000.safetensors has another content than was written)" in output
    assert "resumed after step 9" in output
    assert figures(tmp_path, "r") == uninterrupted


def test_full_disk_leaves_the_last_checkpoint(tmp_path: Path, uninterrupted, monkeypatch, capsys) -> None:
    monkeypatch.setattr(faults, "_fault", faults.Fault("save.manifest:2:ENOSPC"))
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r") == 1
    error = capsys.readouterr().err
    assert "step-6 could not be written" in error
    assert "No space left" in error
    assert [path.name for path in (tmp_path / "runs/r/checkpoints").iterdir()] == ["step-3"]
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r", "--resume") == 0
    assert figures(tmp_path, "r") == uninterrupted


def test_finished_run_says_so(tmp_path: Path, capsys) -> None:
    file = tiny_file(tmp_path, d2v__schedule__steps=3)
    assert run_here("--ds_config", file, "--run", "r") == 0
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert "finished" in capsys.readouterr().out
    # a longer schedule is a reason to go on
    assert run_here("--ds_config", file, "--run", "r", "--resume", "--set", "d2v.schedule.steps=5") == 0
    output = capsys.readouterr().out
    assert "d2v.schedule.steps: 3 -> 5" in output
    assert "resumed after step 3" in output


def test_names_of_runs(tmp_path: Path, capsys) -> None:
    file = tiny_file(tmp_path, d2v__schedule={"steps": 1})
    assert run_here("--ds_config", file) == 0
    assert run_here("--ds_config", file) == 0
    assert (tmp_path / "runs/tiny-2/result.json").exists()
    assert run_here("--ds_config", file, "--run", "tiny-1") == 1
    assert "or continue it: " in capsys.readouterr().err
    assert run_here("--ds_config", file, "--run", "tiny-7", "--resume") == 1
    assert "Runs there: tiny-1, tiny-2" in capsys.readouterr().err
    assert run_here("--ds_config", file, "--resume") == 2
    assert "--run NAME" in capsys.readouterr().err
    # no name leads out of the folder of runs, also not to what could be resumed there
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text(file.read_text())
    for name in ("../outside", str(outside)):
        assert run_here("--run", name, "--resume", "--set", f"d2v.run.dir={tmp_path / 'runs'}") == 2
        assert "`d2v.run.name` must be letters, digits" in capsys.readouterr().err
        assert run_here("--ds_config", file, "--run", name) == 2
    assert [path.name for path in outside.iterdir()] == ["config.json"]


def test_lock_keeps_a_second_process_out(tmp_path: Path, capsys) -> None:
    file, output = tiny_file(tmp_path), tmp_path / "output"

    def slow_steps() -> None:
        faults.fault_point = lambda point: time.sleep(60) if point == "step" else None

    child = start(["--ds_config", file, "--run", "r"], output, before=slow_steps)
    try:
        deadline = time.monotonic() + 60
        while "step 1/12" not in (output.read_text() if output.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert run_here("--ds_config", file, "--run", "r", "--resume") == 1
        assert f"another process (pid {child} on" in capsys.readouterr().err
    finally:
        os.kill(child, signal.SIGKILL)
        wait(child)


def test_changed_model_is_refused(tmp_path: Path, capsys) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r", "--set", "d2v.schedule.steps=3") == 0
    changes = ["--set", "d2v.schedule.steps=6", "--set", "d2v.model.depth=3"]
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r", "--resume", *changes) == 1
    error = capsys.readouterr().err
    assert "student.encoder.blocks.2.gamma1 is not in the checkpoint" in error
    # the file of the run is still the one that fits
    saved = json.loads((tmp_path / "runs/r/config.json").read_text())
    assert saved["d2v"]["model"]["depth"] == 2


def poison_objective(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the loss of these steps, counted from 1, infinite with finite gradients."""
    original, calls = Data2Vec.objective, [0]

    def objective(self, *arguments) -> StepOutput:
        calls[0] += 1
        output = original(self, *arguments)
        if calls[0] in steps:
            output = output._replace(loss_sum=output.loss_sum + torch.inf)
        return output

    monkeypatch.setattr(Data2Vec, "objective", objective)


def test_nonfinite_step_changes_nothing(tmp_path: Path, monkeypatch) -> None:
    file = tiny_file(tmp_path, d2v__run__save_every=1, d2v__run__keep=12)
    with monkeypatch.context() as patch:
        poison_objective(patch, {4, 5, 8})
        assert run_here("--ds_config", file, "--run", "r") == 0
    entries = figures(tmp_path, "r")
    assert [entry[2] is None for entry in entries] == [step in (4, 5, 8) for step in range(1, 13)]
    assert [entry[8] for entry in entries] == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3]

    def saved(step: int) -> dict[str, bytes]:
        folder = tmp_path / f"runs/r/checkpoints/step-{step}"
        values = {
            name: value.numpy().tobytes() for name, value in load_file(folder / "shard-00000.safetensors").items()
        }
        return values | {"engine": json.dumps(json.loads((folder / "state.json").read_text())["engine"]).encode()}

    assert saved(3) == saved(4) == saved(5)
    before, after = saved(5), saved(6)
    assert {name.split("/")[0] for name in before} == {"student", "teacher", "exp_avg", "exp_avg_sq", "engine"}
    assert [name for name in before if before[name] == after[name]] == []


def test_too_many_nonfinite_steps_stop_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        poison_objective(patch, {5, 6, 7})
        assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r") == 1
    assert "not finite in 3 steps in a row, up to step 7" in capsys.readouterr().err
    assert (tmp_path / "runs/r/checkpoints/step-6").is_dir()


def test_collapse_stops_the_run(tmp_path: Path, capsys) -> None:
    file = tiny_file(tmp_path, d2v__guard={"after_steps": 7, "min_prediction_std": 5.0})
    assert run_here("--ds_config", file, "--run", "r") == 1
    error = capsys.readouterr().err
    assert "collapsed: at step 7" in error
    assert "`d2v.guard.min_prediction_std` (5.0)" in error
    assert "optimizer.params.lr" in error
    assert sorted(path.name for path in (tmp_path / "runs/r/checkpoints").iterdir()) == ["step-3", "step-6"]


def test_dry_run(tmp_path: Path, capsys) -> None:
    file = tiny_file(tmp_path, d2v__schedule={"epochs": 4})
    assert run_here("--ds_config", file, "--dry-run") == 0
    output = capsys.readouterr().out
    assert "24 = 24 per micro-step x 1 micro-steps x 1 processes" in output
    assert "59 per epoch" in output
    assert "236 optimizer steps" in output
    assert not (tmp_path / "runs").exists()


def test_dry_run_counts_the_published_models(tmp_path: Path, capsys) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.new("RGB", (40, 40), (index, 9, 9)).save(tmp_path / f"images/{index}.png")
    overrides = [f"d2v.data.path={tmp_path / 'images'}", "train_batch_size=2", "train_micro_batch_size_per_gpu=1"]
    options = [word for override in overrides for word in ("--set", override)]
    assert run_here("--ds_config", "configs/vision_base.json", "--dry-run", *options) == 0
    words = capsys.readouterr().out.replace(",", "").split()
    assert int(words[words.index("student") + 1]) + int(words[words.index("head") + 1]) == 86_256_720
    # as the dry run counts, without the memory of a step, which takes seconds
    assert shapes_of(load_config("configs/vision_large.json", overrides)).trained == 304_186_816


def test_help_is_light() -> None:
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('d2v_fast/train.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'numba', 'deepspeed', 'sklearn', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--ds_config" in done.stdout


def test_flags_are_frozen() -> None:
    flags = {flag for action in train_parser()._actions for flag in action.option_strings}
    assert flags == {
        *("-h", "--help", "--ds_config", "--set", "--run", "--run-name"),
        *("--resume", "--supervise", "--dry-run", "--profile", "--local_rank", "--version"),
    }


def test_plain_run_needs_no_deepspeed(tmp_path: Path) -> None:
    def take_it_away() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules["deepspeed"] = None  # type: ignore[assignment]

    file = tiny_file(tmp_path, d2v__schedule={"steps": 2})
    assert run_forked("--ds_config", file, output=tmp_path / "output", before=take_it_away) == [0]


def test_wrong_file_is_refused_in_words(tmp_path: Path, capsys) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path), "--set", "d2v.model.dpeth=3") == 2
    assert "Did you mean `d2v.model.depth`?" in capsys.readouterr().err
    assert run_here("--ds_config", tmp_path / "no.json") == 2
    assert run_here() == 2
    assert run_here("--ds_config", tiny_file(tmp_path), "--set", "train_batch_size=100000") == 1
    assert "it has 1438 samples" in capsys.readouterr().err


def damage(path: Path) -> None:
    """Flip a random bit of the file."""
    content = bytearray(path.read_bytes())
    place = random.randrange(len(content))
    content[place] ^= 1 << random.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict]:
    """Return the losses of one process without element-wise dropout, which would depend on how a batch is split."""
    torch.set_num_threads(1)
    changes = {"d2v__model__drop_path": 0.25, "d2v__model__attention_dropout": 0.0, "d2v__schedule__steps": 6}
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        assert run_here("--ds_config", tiny_file(folder, **changes), "--run", "r") == 0
    return [entry[2] for entry in figures(folder, "r")], changes


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_changes_nothing(accumulation: int, tmp_path: Path, without_dropout) -> None:
    losses, changes = without_dropout
    file = tiny_file(tmp_path, **changes, gradient_accumulation_steps=accumulation)
    assert run_here("--ds_config", file, "--run", "r") == 0
    assert [entry[2] for entry in figures(tmp_path, "r")] == pytest.approx(losses, rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "accumulation", "fault"),
    [(0, 1, "ENOSPC"), pytest.param(1, 1, "kill", marks=pytest.mark.slow), (2, 2, "kill")],
)
def test_two_processes_change_nothing(
    stage: int, accumulation: int, fault: str, tmp_path: Path, without_dropout
) -> None:
    """Two processes have the losses of one, also when the first fails or dies during a save."""
    losses, changes = without_dropout
    changes = changes | {"zero_optimization__stage": stage, "gradient_accumulation_steps": accumulation}
    file, output = tiny_file(tmp_path, **changes), tmp_path / "output"

    def arm() -> None:
        faults._fault = faults.Fault(f"save.rename:2:{fault}")

    statuses = run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2, before=arm)
    assert statuses == ([1, 1] if fault == "ENOSPC" else [-signal.SIGKILL, 1]), output.read_text()
    assert ("step-6 could not be written" in output.read_text()) == (fault == "ENOSPC")
    statuses = run_forked("--ds_config", file, "--run", "r", "--resume", output=output, num_processes=2)
    assert statuses == [0, 0], output.read_text()
    assert "resumed after step 3" in output.read_text()
    assert [entry[2] for entry in figures(tmp_path, "r")] == pytest.approx(losses, rel=1e-5)


@needs_deepspeed
def test_signal_to_one_process_stops_all(tmp_path: Path, without_dropout) -> None:
    losses, changes = without_dropout
    file, output = tiny_file(tmp_path, **changes), tmp_path / "output"

    def signal_the_second() -> None:
        passed = []

        def at_step_4(point: str) -> None:
            passed.append(point)
            if point == "step" and passed.count(point) == 4 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        faults.fault_point = at_step_4

    arguments = ["--ds_config", file, "--run", "r"]
    assert run_forked(*arguments, output=output, num_processes=2, before=signal_the_second) == [0, 0]
    assert "saved after step 5" in output.read_text()
    assert run_forked(*arguments, "--resume", output=output, num_processes=2) == [0, 0], output.read_text()
    assert [entry[2] for entry in figures(tmp_path, "r")] == pytest.approx(losses, rel=1e-5)
