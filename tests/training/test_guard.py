"""Steps that are not finite, collapse and spikes: when they stop a run, and what is written about them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.config import BatchSplit, GuardConfig, load_config
from d2v_fast.data.order import StepOrder
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.training import guard as guard_module
from d2v_fast.training.guard import Guard, check_collapse, first_judged_step, judge_end
from d2v_fast.training.run_folder import RunFolder
from d2v_fast.training.step import SkipCounts, StepResult
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, run_forked, run_here, tiny_file
from tests.helpers.witness import Witness

pytestmark = pytest.mark.usefixtures("quick_runs")


NUM_DIGITS = 1438


def dump_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "runs/r/nonfinite.json").read_text())


def expected_samples(step: int, world_size: int, accumulation: int = 1) -> list[list[list[int]]]:
    """Return the sample ids of a step of the tiny run, by rank and micro-step."""
    split = BatchSplit.of(24 // world_size // accumulation, accumulation, world_size)
    ranks = []
    for rank in range(world_size):
        order = StepOrder(NUM_DIGITS, split, rank=rank, seed=0, start_step=step - 1, num_steps=step)
        ranks.append([micro.sample_ids.tolist() for micro in order])
    return ranks


@pytest.mark.parametrize("kind", ["nan pixel", "inf pixel", "gradient", "weights", "teacher"])
def test_one_process(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A step with a NaN from any source changes nothing, and three in a row stop the run with a description."""
    spoilt = dict.fromkeys((7, 8, 9), (kind, 0))
    if kind in ("nan pixel", "inf pixel", "gradient"):
        spoilt[3] = (kind, 0)
    file = tiny_file(tmp_path)
    with monkeypatch.context() as patch:
        witness = Witness(spoilt, patch.setattr)
        assert run_here("--ds_config", file, "--run", "r") == 1
    # the ninth step ended the run before it was witnessed
    assert witness.step == 8
    assert "in 3 steps in a row, up to step 9" in (error := capsys.readouterr().err)
    assert str(tmp_path / "runs/r/nonfinite.json") in error
    dump = dump_of(tmp_path)
    steps = dump.pop("steps")
    config = load_config(file)
    assert dump == {
        "stopped_at_step": 9,
        "seed": 0,
        "configuration": config.digest(),
        "processes": 1,
        "micro_batch": 24,
        "accumulation": 1,
    }
    assert [one["step"] for one in steps] == [7, 8, 9]
    for one in steps:
        assert one["epoch"] == 0
        assert one["ranks_with_loss_not_finite"] == ([] if kind == "gradient" else [0])
        assert one["ranks_with_gradient_not_finite"] == [0]
        assert one["sample_ids_by_rank_and_micro_step"] == expected_samples(one["step"], 1)
    # what was saved before is good to go on with
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert all(entry[2] is not None for entry in figures(tmp_path, "r")[6:])


def test_stop_at_the_first(tmp_path: Path, monkeypatch, capsys) -> None:
    """`nonfinite` "stop" stops at the first such step, also in the second epoch and with accumulation."""
    changes = {"d2v__data__test_fraction": 0.9, "gradient_accumulation_steps": 2}
    file = tiny_file(tmp_path, d2v__guard={"nonfinite": "stop"}, **changes)
    forward, calls = Data2Vec.forward, []

    def forward_at_step_9(self: Data2Vec, batch: Any, *others: Any) -> Any:
        calls.append(batch)
        output = forward(self, batch, *others)
        # the second micro-step alone
        return output._replace(loss_sum=output.loss_sum * torch.nan) if len(calls) == 18 else output

    monkeypatch.setattr(Data2Vec, "forward", forward_at_step_9)
    assert run_here("--ds_config", file, "--run", "r") == 1
    assert "in 1 steps in a row, up to step 9" in capsys.readouterr().err
    [step] = dump_of(tmp_path)["steps"]
    assert (step["step"], step["epoch"], step["ranks_with_loss_not_finite"]) == (9, 1, [0])
    assert step["sample_ids_by_rank_and_micro_step"] == [[batch.sample_ids.tolist() for batch in calls[-2:]]]


def test_dumped_step_can_be_made_again(tmp_path: Path, monkeypatch) -> None:
    """Seed, step and sample ids of the dump give the batches of the step, bit for bit."""
    from d2v_fast.modalities.vision.batches import image_dataset

    seen = {}
    forward = Data2Vec.forward

    def forward_and_see(self: Data2Vec, batch: Any, *others: Any) -> Any:
        seen[len(seen) + 1] = batch
        output = forward(self, batch, *others)
        return output._replace(loss_sum=output.loss_sum * torch.nan) if len(seen) == 6 else output

    monkeypatch.setattr(Data2Vec, "forward", forward_and_see)
    file = tiny_file(tmp_path, d2v__guard={"nonfinite": "stop"})
    assert run_here("--ds_config", file, "--run", "r") == 1
    dump, config = dump_of(tmp_path), load_config(tmp_path / "runs/r/config.json")
    assert dump["configuration"] == config.digest()
    [step] = dump["steps"]
    [[ids]] = step["sample_ids_by_rank_and_micro_step"]
    dataset = image_dataset(config.d2v)
    pixels, _ = dataset.augmented(torch.tensor(ids).numpy(), dump["seed"], step["epoch"])
    assert torch.equal(pixels, seen[6].inputs)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "last"), [(0, "gradient"), pytest.param(1, "weights", marks=pytest.mark.slow), (2, "teacher")]
)
def test_one_of_two_processes(stage: int, last: str, tmp_path: Path) -> None:
    """Both ranks decide alike when one has a bad step, and the teacher stays the student's average."""
    spoilt = {3: ("nan pixel", 1), 5: ("gradient", 1), 7: ("inf pixel", 0), **dict.fromkeys((9, 10, 11), (last, 1))}
    file, output = tiny_file(tmp_path, zero_optimization__stage=stage), tmp_path / "output"

    def watch() -> None:
        Witness(spoilt, note=tmp_path / f"rank-{os.environ['RANK']}")

    arguments = ["--ds_config", file, "--run", "r"]
    assert run_forked(*arguments, output=output, num_processes=2, before=watch) == [1, 1], output.read_text()
    assert "in 3 steps in a row, up to step 11" in output.read_text()
    # one run, one message
    assert output.read_text().count("error:") == 1
    notes = [(tmp_path / f"rank-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert len(notes[0]) == len(notes[1]) == 10
    assert notes[0][:8] == notes[1][:8]
    entries = figures(tmp_path, "r")
    assert [entry[8] for entry in entries] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6]
    # the logged loss is that of all ranks
    unknown = [3, 7] if last == "gradient" else [3, 7, 9, 10, 11]
    assert [entry[0] for entry in entries if entry[2] is None] == unknown
    dump = dump_of(tmp_path)
    assert [one["step"] for one in dump["steps"]] == [9, 10, 11]
    for one in dump["steps"]:
        assert one["ranks_with_loss_not_finite"] == ([] if last == "gradient" else [1])
        assert one["ranks_with_gradient_not_finite"] == [1]
        assert one["sample_ids_by_rank_and_micro_step"] == expected_samples(one["step"], 2)


@pytest.mark.parametrize(("nonfinite", "allowed"), [("skip", 2 + 5 + 2), ("stop", 0 + 5 + 2)])
def test_loss_scale_that_never_fits(nonfinite: str, allowed: int, tmp_path: Path) -> None:
    """An fp16 loss scale may overflow as often as it can be halved; one more time in a row stops the run."""
    fp16 = {"enabled": True, "initial_scale_power": 5, "hysteresis": 2}
    file = tiny_file(tmp_path, fp16=fp16, zero_optimization__stage=1, d2v__guard={"nonfinite": nonfinite})
    config, yes, no = load_config(file), torch.tensor(True), torch.tensor(False)
    (tmp_path / "runs/r").mkdir(parents=True)
    folder = RunFolder(tmp_path / "runs/r")
    model, none = Data2Vec(config.d2v), SkipCounts()
    guard = Guard(config, World("cpu"), folder, model, counts=none, steps_per_epoch=59, say=print)
    for step in range(1, allowed + 2):
        guard.record(StepResult(step, [torch.arange(24)], 1, yes, no, torch.tensor(1.0), [], []))
        assert guard.counts() == (step, step)
        if step <= allowed:
            guard.check(step)
    with pytest.raises(RunError, match=f"in {allowed + 1} steps in a row"):
        guard.check(step)
    assert [one["step"] for one in dump_of(tmp_path)["steps"]] == list(range(1, allowed + 2))


def entry(step: int, **changes: float) -> dict[str, float]:
    figures = {"loss": 0.5, "target_std": 0.9, "prediction_std": 0.4, "lr": 1e-3, "grad_norm": 1.0}
    return {"step": step, **figures, **changes}


def test_collapse_guard() -> None:
    guard = GuardConfig(after_steps=10, min_target_std=0.1, min_prediction_std=0.01)
    long = 1000
    check_collapse(entry(9, target_std=0.0, prediction_std=0.0), guard, long)
    check_collapse(entry(10), guard, long)
    # a step that was skipped for a NaN says nothing about a collapse
    check_collapse(entry(10, target_std=math.nan, prediction_std=math.nan), guard, long)
    check_collapse(entry(10, target_std=None, prediction_std=None), guard, long)
    with pytest.raises(RunError, match=r"targets over the masked positions is 0\.0500"):
        check_collapse(entry(10, target_std=0.05), guard, long)
    with pytest.raises(RunError, match="min_prediction_std"):
        check_collapse(entry(11, prediction_std=0.005), guard, long)


@pytest.mark.parametrize(("num_steps", "first"), [(400_000, 5000), (7500, 5000), (36, 24), (24, 20)])
def test_short_run_is_judged_within_itself(num_steps: int, first: int) -> None:
    guard = GuardConfig()
    assert first_judged_step(guard, num_steps) == first
    check_collapse(entry(first - 1, prediction_std=0.002), guard, num_steps)
    with pytest.raises(RunError, match=r"the predictions over the masked positions is 0\.0020") as caught:
        check_collapse(entry(first, prediction_std=0.002), guard, num_steps)
    assert ("too short to have learned anything" in str(caught.value)) == (num_steps < 5000)
    # what never was above the limit may not have begun to learn: it has until the end, or until `after_steps`
    late = min(num_steps, 5000)
    check_collapse(entry(late - 1, prediction_std=0.002), guard, num_steps, has_varied=False)
    with pytest.raises(RunError):
        check_collapse(entry(late, prediction_std=0.002), guard, num_steps, has_varied=False)
    # an earlier step can be asked for, and a limit of 0 asks for none
    assert first_judged_step(GuardConfig(after_steps=1), 1000) == 1
    check_collapse(entry(1000, prediction_std=0.0), GuardConfig(min_prediction_std=0), 1000)


def without_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all predictions equal from the third step on, as after a collapse."""
    forward, calls = Data2Vec.forward, []

    def forward_of_a_collapse(self: Data2Vec, batch: Any, teacher: Any, moments: bool) -> Any:
        calls.append(batch)
        output = forward(self, batch, teacher, moments)
        if not moments:
            return output
        sums = output.moments.clone()
        sums[:2] = 0 if len(calls) > 2 else sums[2:]
        return output._replace(moments=sums)

    monkeypatch.setattr(Data2Vec, "forward", forward_of_a_collapse)


def test_short_run_that_collapses_is_not_finished(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tiny_file(tmp_path, d2v__run__log_every=100, d2v__guard__after_steps=12)
    with monkeypatch.context() as patch:
        without_learning(patch)
        assert run_here("--ds_config", file, "--run", "r") == 1
    told = capsys.readouterr()
    assert "the run has collapsed: at step 12 the standard deviation of the predictions" in told.err
    assert "The checkpoint of step 12 is saved, and nothing was exported" in told.err
    assert "export" not in told.out
    assert (tmp_path / "runs/r/checkpoints/step-12").is_dir()
    assert not (tmp_path / "runs/r/result.json").exists()
    # to resume it does not make it look finished
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 1
    assert "the run has collapsed: at step 12" in capsys.readouterr().err
    assert not (tmp_path / "runs/r/result.json").exists()
    # whoever wants it all the same says so
    lower = ["--set", "d2v.guard.min_prediction_std=0"]
    assert run_here("--ds_config", file, "--run", "r", "--resume", *lower) == 0
    assert (tmp_path / "runs/r/result.json").exists()


def test_short_run_that_learns_is_finished(tmp_path: Path, capsys) -> None:
    """As the published models are initialized, predictions are the same everywhere for the first steps."""
    learning = {"d2v__schedule": {"steps": 60, "warmup_steps": 3}, "d2v__run__save_every": 100}
    faster = {"lr": 1e-2, "weight_decay": 0.0}
    file = tiny_file(tmp_path, **learning, optimizer__params=faster, d2v__loss={"beta": 0})
    assert run_here("--ds_config", file, "--run", "r") == 0
    assert "collapsed" not in capsys.readouterr().out
    logged = [one[4] for one in figures(tmp_path, "r")]
    assert logged[0] < 0.01 < logged[39]


@pytest.mark.parametrize(("collapses", "step"), [(False, 36), (True, 24)])
def test_run_that_learns_nothing_is_not_finished(
    collapses: bool, step: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A run whose predictions never vary fails at its end; one that collapses later is stopped on the way."""
    if collapses:
        without_learning(monkeypatch)
    still = {"lr": 1e-9, "weight_decay": 0.0}
    file = tiny_file(tmp_path, optimizer__params=still, d2v__schedule={"steps": 36, "warmup_steps": 3})
    assert run_here("--ds_config", file, "--run", "r") == 1
    assert f"the run has collapsed: at step {step} the standard deviation of the predict" in capsys.readouterr().err
    assert not (tmp_path / "runs/r/result.json").exists()
    last = max(int(path.name[5:]) for path in (tmp_path / "runs/r/checkpoints").iterdir())
    assert last == (21 if collapses else 36)


def test_trial_of_a_few_steps_is_finished_with_a_note(tmp_path: Path, capsys) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path), "--run", "r") == 0
    assert "nothing has been learned so far" in capsys.readouterr().out


def test_run_without_deviations_says_that_it_is_not_judged(tmp_path: Path) -> None:
    lines = [json.dumps(entry(step, target_std=None, prediction_std=None)) for step in range(1, 10)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    for num_steps in (9, 900):
        assert "is not known" in str(judge_end(tmp_path, GuardConfig(), num_steps))
    (tmp_path / "log.jsonl").write_text(json.dumps(entry(9)) + "\n")
    assert judge_end(tmp_path, GuardConfig(), 9) is None
    assert "is not known" in str(judge_end(tmp_path, GuardConfig(), 900))


def spikes(folder: Path) -> dict[int, float]:
    """Return the ratio of every logged step that is marked as a spike."""
    entries = [json.loads(line) for line in (folder / "runs/r/log.jsonl").read_text().splitlines()]
    assert [one["step"] for one in entries] == list(range(1, 13))
    return {one["step"]: one["loss_spike"] for one in entries if "loss_spike" in one}


@pytest.mark.parametrize("limit", [None, 5.0])
def test_spike_is_told_and_nothing_else(limit: float | None, tmp_path: Path, monkeypatch, capsys) -> None:
    """A loss ten times as large is logged as a spike if `loss_spike` is set; every step is applied."""
    monkeypatch.setattr(guard_module, "SPIKE_HISTORY", 4)
    forward, calls = Data2Vec.forward, []

    def forward_with_spikes(self: Data2Vec, batch: Any, *others: Any) -> Any:
        calls.append(batch)
        output = forward(self, batch, *others)
        # the third comes before there is anything to compare it with
        return output._replace(loss_sum=output.loss_sum * 10) if len(calls) in (3, 7, 11) else output

    monkeypatch.setattr(Data2Vec, "forward", forward_with_spikes)
    file = tiny_file(tmp_path, d2v__guard={"loss_spike": limit})
    assert run_here("--ds_config", file, "--run", "r") == 0
    found = spikes(tmp_path)
    said = capsys.readouterr().out
    assert [one[8] for one in figures(tmp_path, "r")] == [0] * 12
    if limit is None:
        assert found == {}
        assert "its median" not in said
        return
    assert list(found) == [7, 11]
    assert all(5 < ratio < 20 for ratio in found.values())
    assert "step 7: the loss" in said
    # the history is that of the whole run, also after a resume
    (tmp_path / "runs/r/result.json").unlink()
    (tmp_path / "runs/r/checkpoints/step-12").rename(tmp_path / "gone")
    del calls[9:]
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0
    assert spikes(tmp_path) == found


def test_report_of_micro_batches_of_different_sizes(tmp_path: Path) -> None:
    """Steps on sequences hold fewer samples than others, and their micro-batches may differ by one."""
    (folder := tmp_path / "runs" / "r").mkdir(parents=True)
    config = load_config(tiny_file(tmp_path, d2v__guard={"nonfinite_patience": 2}))
    none, reports = SkipCounts(), RunFolder(folder)
    guard = Guard(
        config, World("cpu"), reports, build_objective(config.d2v), counts=none, steps_per_epoch=9, say=print
    )  # fmt: skip
    sizes = [[4, 3], [2, 2]]
    for number, of_step in enumerate(sizes, 1):
        ids, wrong = [torch.arange(size) for size in of_step], torch.tensor(False)
        guard.record(StepResult(number, ids, 1, wrong, wrong, torch.tensor(torch.nan), [], []))
    with pytest.raises(RunError, match="in 2 steps in a row, up to step 2"):
        guard.check(2)
    found = dump_of(tmp_path)["steps"]
    assert [[[len(ids) for ids in one] for one in step["sample_ids_by_rank_and_micro_step"]] for step in found] == [
        [of_step] for of_step in sizes
    ]
