"""Fine-tuning runs: they begin with a source's weights, validate, keep the best checkpoint, and resume bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from d2v_fast.config import parse_config
from d2v_fast.errors import RunError
from d2v_fast.modalities import modality_of
from d2v_fast.objectives.base import Objective
from d2v_fast.objectives.build import build_objective
from d2v_fast.training.optimizers import parameter_groups
from d2v_fast.training.prepare import _begin
from tests.helpers.finetuning import (
    TINY_CLASSIFY,
    check_killed_run,
    check_two_processes,
    logged,
    result,
    saved,
    validations,
)
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY, TINY_2, run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")


def classify(folder: Path, **changes: Any) -> Path:
    return tiny_file(folder, TINY_CLASSIFY, **changes)


@pytest.mark.parametrize(("base", "weights"), [(TINY, "teacher"), (TINY_2, "student")])
def test_begins_with_the_source(base: dict[str, Any], weights: str, tmp_path: Path) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path, base, d2v__schedule__steps=3), "--run", "pre") == 0
    source = tmp_path / "runs" / "pre"
    file = classify(tmp_path, d2v__model={}, d2v__finetune={"source": str(source), "weights": weights})
    # a rate that changes no weight
    zero = ["--set", "optimizer.params.lr=1e-30", "--set", "d2v.schedule.steps=1"]
    assert run_here("--ds_config", file, "--run", "r", *zero) == 0
    before, after = saved(tmp_path, "pre", 3), saved(tmp_path, "r", 1)
    encoder = {name for name in before if name.startswith("student/student.")}
    assert encoder == {name for name in after if name.startswith("student/student.")}
    for name in encoder:
        average = name.replace("student/student.", "teacher/")
        assert torch.equal(after[name], before[average if weights == "teacher" else name]), name
    # without the source, the run's own configuration has all that a resumed run needs
    source.rename(tmp_path / "gone")
    assert run_here("--ds_config", file, "--run", "r", "--resume", "--set", "d2v.schedule.steps=2") == 0


def test_best_checkpoint_is_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    # such a rate never improves on the first validation
    file = classify(tmp_path, optimizer__params={"lr": 1e-30}, d2v__valid__patience=2, d2v__run__keep=1)
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=40") == 0
    assert [one["step"] for one in validations(tmp_path, "r")] == [2, 4, 6]
    found = result(tmp_path, "r")
    assert (found["step"], found["best"]["step"], found["patience"]) == (6, 2, 2)
    checkpoints = {path.name for path in (tmp_path / "runs" / "r" / "checkpoints").iterdir()}
    assert checkpoints == {"step-2", "step-6"}
    # it stays ended, unless it is to be more patient
    resume = ["--ds_config", file, "--run", "r", "--resume", "--set", "d2v.schedule.steps=40"]
    assert run_here(*resume) == 0
    assert len(validations(tmp_path, "r")) == 3
    patient = classify(tmp_path, optimizer__params={"lr": 1e-30}, d2v__valid__patience=3, d2v__run__keep=1)
    assert run_here("--ds_config", patient, *resume[2:]) == 0
    assert result(tmp_path, "r")["step"] == 8


def test_learns(tmp_path: Path) -> None:
    still: dict[str, Any] = {"d2v__finetune": {}, "d2v__data__shift_pixels": 0.0, "optimizer__params": {"lr": 1e-2}}
    still["d2v__model"] = {**TINY_CLASSIFY["d2v"]["model"], "absolute_position": True, "layer_scale": 1.0}
    file = classify(tmp_path, d2v__schedule__steps=150, d2v__valid__every_steps=75, **still)
    assert run_here("--ds_config", file, "--run", "r") == 0
    entries = validations(tmp_path, "r")
    assert entries[-1]["accuracy"] > 0.18
    assert entries[-1]["samples"] == 359
    log = logged(tmp_path, "r")
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"accuracy", "grad_norm"} <= log[-1].keys()
    assert "target_std" not in log[-1]
    assert log[-1]["decay"] is None


def test_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = classify(tmp_path, d2v__data__mixup=0.5, d2v__finetune__freeze_encoder_steps=2, d2v__schedule__steps=7)
    check_killed_run(tmp_path, file)


@needs_deepspeed
@pytest.mark.parametrize(
    "stage", [pytest.param(3), *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))]
)
def test_two_processes_equal_one(stage: int, tmp_path: Path) -> None:
    """Also with layers that learn at different rates, a frozen encoder at first, and accumulation."""
    changes = {
        "d2v__model": {**TINY_CLASSIFY["d2v"]["model"], "drop_path": 0.25, "attention_dropout": 0.0},
        "d2v__finetune": {"layer_decay": 0.8, "average_decay": 0.9, "freeze_encoder_steps": 1},
        "d2v__schedule__steps": 4,
        "d2v__data__mixup": 0.8,
        "zero_optimization__stage": stage,
        "gradient_accumulation_steps": 2,
    }
    file = classify(tmp_path, **changes)
    check_two_processes(tmp_path, file)
    for mine, other in zip(validations(tmp_path, "one"), validations(tmp_path, "two"), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_source_that_is_damaged() -> None:
    """Under a launcher as well as by `d2v-fast finetune`, the error is a sentence without a traceback."""

    class Damaged:
        def begin(self) -> None:
            raise ValueError("the checkpoint runs/r/checkpoints/step-1 is damaged.")

    with pytest.raises(RunError, match=r"^the checkpoint runs/r/checkpoints/step-1 is damaged\.$"):
        _begin(cast("Objective", Damaged()))


def test_rates_of_layers() -> None:
    changed = {**TINY_CLASSIFY["d2v"], "finetune": {"layer_decay": 0.5, "freeze_encoder_steps": 3}}
    config = parse_config({**TINY_CLASSIFY, "d2v": changed}).d2v
    model = build_objective(modality_of(config).resolved(config))
    rates = model.rates()
    scales = {
        "student.embedding.cls_token": 0.125,
        "student.encoder.blocks.0.mlp.fc1.weight": 0.25,
        "student.encoder.blocks.1.gamma1": 0.5,
        "student.position_bias.table": 1.0,
        "student.norm.weight": 1.0,
    }
    assert {name: rates[name].scale for name in scales} == scales
    assert all(rate.freezes for rate in rates.values())
    assert not any(name.startswith("head.") for name in rates)
    groups = parameter_groups(model, 0.1, decay_1d=False, rates=rates)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [model.frozen_at(number) for number in (1, 3, 4)] == [True, True, False]
