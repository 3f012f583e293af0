"""The teacher at every ZeRO stage in one, two and four processes, compared with one plain process."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.world import World
from d2v_fast.models import layers
from d2v_fast.teacher import Teacher
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import in_processes
from tests.helpers.sharded_trial import STEPS, Trial, run_config, worst

pytestmark = needs_deepspeed

# what is tried at every number of processes, as changes of the configuration
RUNS: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2},
    "2, round robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "3": {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 2},
    "3, all partitioned": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "3, checkpointing": {"zero_optimization": {"stage": 3}, "gradient_checkpointing": True},
    "1, offload": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "3, offload": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
}
# in every run; DeepSpeed's engine of stage 1 is that of stage 2
STAGES = ["0", "2", "3"]
BF16 = {name: {**RUNS[name], "bf16": {"enabled": True}} for name in ("0", "1", "2", "3", "2, offload", "3, offload")}
# where a NaN is looked for and dropped by code of its own; the others, which are slow, go through one of these
OWN_WAYS = ["0", "2", "3", "3, offload", "0, bf16", "2, bf16", "3, bf16"]


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Tensor]]:
    """Return student and average after `STEPS` steps of one plain process."""
    trial = Trial(run_config({}, 1), World("cpu"))
    for step in range(1, STEPS + 1):
        assert trial.step(step)
    return {"student": trial.student(), "average": trial.average()}


@pytest.mark.parametrize(
    ("processes", "names"),
    [
        pytest.param(1, list(RUNS), marks=pytest.mark.slow),
        (2, STAGES),
        pytest.param(2, [name for name in RUNS if name not in STAGES], marks=pytest.mark.slow),
        pytest.param(4, list(RUNS), marks=pytest.mark.slow),
    ],
    ids=["1", "2", "2, the others", "4"],
)
def test_equals_one_process(processes: int, names: list[str], tmp_path: Path, one_process) -> None:
    def work(world: World, folder: Path) -> Any:
        report = {}
        for name in names:
            changes = RUNS[name]
            trial = Trial(run_config(changes, world.size), world)
            before = trial.seen()
            for step in range(1, STEPS + 1):
                assert trial.step(step)
            student, average, seen = trial.student(), trial.average(), trial.seen()
            # the average of the first process, told to all
            told = {key: world.sum(average.get(key, torch.zeros_like(value))) for key, value in seen.items()}
            report[name] = {
                "stale": [key for key, value in seen.items() if not torch.equal(value, told[key])],
                "still": [key for key, value in seen.items() if torch.equal(value, before[key])],
                "student": worst(student, one_process["student"]) if world.is_first else None,
                "average": worst(average, one_process["average"]) if world.is_first else None,
            }
        return report

    reports = in_processes(processes, tmp_path, work, timeout_s=280)
    print(json.dumps(reports[0]))
    for report in reports:
        for name, found in report.items():
            # on every rank a fresh gather returns the average, and every parameter has moved
            assert found["stale"] == [], name
            assert found["still"] == [], name
    for name, found in reports[0].items():
        assert found["student"][0] <= 1e-6, (name, found)
        assert found["average"][0] <= 1e-6, (name, found)


def test_linear_maps_by_onednn(tmp_path: Path, one_process, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of oneDNN's linear maps reads weights that are partitioned between the passes."""
    monkeypatch.setattr("d2v_fast.models.layers._LARGE", 1)
    original, calls = layers._ONEDNN_LINEAR, []
    if original is None:
        pytest.skip("torch has no oneDNN")
    monkeypatch.setattr("d2v_fast.models.layers._ONEDNN_LINEAR", lambda *inputs: calls.append(1) or original(*inputs))

    def work(world: World, folder: Path) -> Any:
        trial = Trial(run_config(RUNS["3, all partitioned"], world.size), world)
        for step in range(1, STEPS + 1):
            assert trial.step(step)
        assert len(calls) > STEPS
        found = {"student": trial.student(), "average": trial.average()}
        return {key: worst(found[key], one_process[key]) for key in found} if world.is_first else None

    for error, where in in_processes(2, tmp_path, work)[0].values():
        assert error <= 1e-6, where


@pytest.mark.parametrize(
    "names",
    # slow: on a CPU offload moves nothing, and its engine is tried with a NaN in every run
    [STAGES, pytest.param(["1", "2, offload", "3, offload"], marks=pytest.mark.slow)],
    ids=["stages", "the others"],
)
def test_half_precision_follows_the_fp32_values(names: list[str], tmp_path: Path) -> None:
    """In bf16 the average follows the optimizer's fp32 values.

    On every process, the module holds the nearest bf16 values of the average."""

    def work(world: World, folder: Path) -> Any:
        report = {}
        for name in names:
            trial = Trial(run_config(BF16[name], world.size), world)
            expected = {key: value.double() for key, value in trial.student().items()}
            for step in range(1, 5):
                assert trial.step(step)
                decay = trial.teacher.decay(step)
                for key, value in trial.student().items():
                    expected[key].lerp_(value.double(), 1 - decay)
            average, seen = trial.average(), trial.seen()
            rounded = {key: world.sum(average.get(key, torch.zeros_like(value))) for key, value in seen.items()}
            report[name] = {
                "dtypes": sorted({str(p.dtype) for p in trial.teacher.module.parameters()}),
                "stale": [
                    key for key, value in seen.items() if not torch.equal(value, rounded[key].bfloat16().float())
                ],
                "average": worst({key: value.double() for key, value in average.items()}, expected)
                if world.is_first
                else None,
            }
        return report

    for rank, report in enumerate(in_processes(2, tmp_path, work, timeout_s=280)):
        for name, found in report.items():
            assert found["dtypes"] == ["torch.bfloat16"], name
            assert found["stale"] == [], name
            if rank == 0:
                assert found["average"][0] <= 1e-6, (name, found)


@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["own ways", "the others"])
def test_nan_of_one_process_reaches_nothing(own: bool, tmp_path: Path) -> None:
    """A NaN in the last process's images changes neither student, optimizer nor teacher, at every stage."""
    every = {**RUNS, **{f"{name}, bf16": changes for name, changes in BF16.items()}}
    assert set(OWN_WAYS) <= set(every)

    def held(trial: Trial) -> list[Tensor]:
        tensors = [kept.shard.master for kept in trial.engine.kept()]
        return [tensor.clone() for tensor in (*tensors, *(shard.master for shard in trial.teacher.shards))]

    def work(world: World, folder: Path) -> Any:
        report = {}
        for name in [name for name in every if (name in OWN_WAYS) == own]:
            trial = Trial(run_config(every[name], world.size), world)
            assert trial.step(1)
            before, seen = held(trial), trial.seen()
            refused = not trial.step(2, poison=True)
            after, seen_after = held(trial), trial.seen()
            assert trial.step(3)
            report[name] = [
                refused,
                all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
                all(torch.equal(seen[key], seen_after[key]) for key in seen),
                all(bool(tensor.isfinite().all()) for tensor in held(trial)),
            ]
        return report

    for report in in_processes(2, tmp_path, work, timeout_s=280):
        assert report
        for name, found in report.items():
            assert found == [True] * 4, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_process_without_a_part_of_the_student(stage: int, tmp_path: Path) -> None:
    """The averaged part is so small that the second process holds none of it, but still takes part in the exchange and
    sees the average."""

    def work(world: World, folder: Path) -> Any:
        import deepspeed

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 500))
        copied = copy.deepcopy(model[0])
        before = copied.weight.item()
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000},
        }
        adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)
        schedule = TeacherConfig(decay_start=0.5, decay_end=0.5)
        teacher = Teacher(engine.module[0], schedule, module=copied, engine=engine)
        for step in (1, 2):
            engine.backward(engine(torch.ones(1, 1)).square().mean())
            engine.step()
            teacher.update(step)
        return [len(teacher.shards), before, teacher.module(torch.ones(1, 1)).item()]

    first, second = in_processes(2, tmp_path, work)
    assert (first[0], second[0]) == (1, 0)
    assert first[1:] == second[1:]
    assert first[2] != first[1]
