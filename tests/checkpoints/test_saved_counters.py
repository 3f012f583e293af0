"""Impossible counters in a checkpoint are found before they are used."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d2v_fast.checkpoints.saved_counters import check_counters
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.training.optimizers import restore_optimizer, steps_until_unbiased
from tests.helpers.checkpoint_files import edit_state
from tests.helpers.runs import figures, leave_out_reports, run_here, tiny_file

# a run of 12 steps, 3 of them skipped, 2 of these at the end
GOOD: dict[str, Any] = {
    "step": 12,
    "shapes": {},
    "global_batch": 24,
    "vocabulary": None,
    "samples": {"what": "image", "number": 5, "names": "a", "sizes": "b"},
    "skipped": 3,
    "streak": 2,
    "teacher_step": 10,
    "engine": {
        "engine": "DeepSpeed",
        "processes": 2,
        "zero_stage": 2,
        "optimizer": "Adam",
        "optimizer_step": 9,
        "loss_scale": {"cur_scale": 65536.0, "cur_iter": 12, "last_overflow_iter": -1, "cur_hysteresis": 2},
    },
    "digest": "x",
    "config": {"d2v": {"data": {}}},
    "conditions": {},
}
IMPOSSIBLE = (-1, 13, 10**9, 10**17, 1.0, 1e9, math.nan, math.inf, True, "9", None, [], {})


def problem(edit: Callable[[dict[str, Any]], object], step: int = 12) -> str | None:
    state = json.loads(json.dumps(GOOD))
    edit(state)
    checkpoint: Any = SimpleNamespace(step=step, state=state)
    try:
        check_counters(checkpoint)
    except DamageError as error:
        return str(error)
    return None


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        *sections, last = path.split(".")
        for section in sections:
            state = state[section]
        state[last] = value

    return edit


def test_good_counters() -> None:
    assert problem(lambda state: None) is None
    # on a GPU the teacher is called at every step, and some optimizers count skipped steps
    assert problem(put("teacher_step", 12)) is None
    assert problem(put("engine.optimizer_step", 12)) is None
    # written by earlier versions, and by an import of weights
    assert problem(lambda state: state.pop("samples")) is None
    assert problem(put("samples", None)) is None
    assert problem(lambda state: state["engine"].pop("loss_scale")) is None
    start = {"skipped": 0, "streak": 0, "teacher_step": 0, "engine": {**GOOD["engine"], "optimizer_step": 0}}
    start["engine"]["loss_scale"] = {}
    assert problem(lambda state: state.update(start), step=0) is None


@pytest.mark.parametrize("value", IMPOSSIBLE, ids=repr)
@pytest.mark.parametrize("path", ["skipped", "streak", "teacher_step", "engine.optimizer_step"])
def test_impossible_counter(path: str, value: object) -> None:
    said = problem(put(path, value))
    assert said is not None
    assert said.startswith(f"`{path}` in state.json must be a whole number in [")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("skipped", 1),
        ("streak", 4),
        ("teacher_step", 9),
        ("engine.optimizer_step", 8),
        ("global_batch", 0),
        ("global_batch", 24.0),
        ("engine.loss_scale.cur_iter", 13),
        ("engine.loss_scale.last_overflow_iter", -2),
        ("engine.loss_scale.cur_hysteresis", 10**17),
        ("engine.loss_scale.cur_scale", 0),
        ("engine.loss_scale.cur_scale", math.nan),
        ("engine.loss_scale.update_scale", 1),
        ("engine.loss_scale", []),
        ("engine", None),
        ("config", {"d2v": []}),
        ("conditions", 3),
        ("samples", {"number": 5}),
        ("samples", {**GOOD["samples"], "number": "5"}),
    ],
)
def test_what_contradicts_another_counter(path: str, value: object) -> None:
    assert problem(put(path, value)) is not None


@pytest.mark.parametrize("path", [*(key for key in GOOD if key not in ("samples", "step", "shapes")), *GOOD["engine"]])
def test_missing_key(path: str) -> None:
    if path == "loss_scale":
        return
    within = GOOD if path in GOOD else GOOD["engine"]
    said = problem(lambda state: (state if within is GOOD else state["engine"]).pop(path))
    assert said == f"state.json lacks `{path if within is GOOD else f'engine.{path}'}`"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", 10**17),
        ("step", 1e17),
        ("step", 6.0),
        ("step", True),
        ("engine", {"optimizer_step": 10**9}),
        ("skipped", 7),
        ("teacher_step", 10**6),
    ],
)
def test_resume_falls_back_with_words(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resume goes back to an older checkpoint at once, with a message, and logs what an unbroken run logs."""
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, d2v__schedule__kind="constant")
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=6") == 0
    whole = figures(tmp_path, "r")
    folder = tmp_path / "runs/r/checkpoints/step-6"
    edit_state(folder, lambda state: state.update({key: {**state[key], **value} if key == "engine" else value}))
    (tmp_path / "runs/r/result.json").unlink()
    capsys.readouterr()
    started = time.monotonic()
    assert run_here("--ds_config", file, "--run", "r", "--resume", "--set", "d2v.schedule.steps=6") == 0
    assert time.monotonic() - started < 60
    said = capsys.readouterr().out
    assert "checkpoint step-6 is damaged (`" in said
    assert "kept as step-6.damaged, falling back to the one before it" in said
    assert "resumed after step 3" in said
    assert figures(tmp_path, "r") == whole


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.98), (0.9, 0.999), (0.0, 0.9999), (0.99, 0.99)])
def test_bias_corrections_are_exactly_one_from_then_on(betas: tuple[float, float]) -> None:
    """After enough steps the correction is exactly 1, also for products rounded to fp32 at every step."""
    steps = steps_until_unbiased(betas)
    for beta in betas:
        product = np.multiply.accumulate(np.full(steps + 1000, beta, dtype=np.float32), dtype=np.float32)
        assert (np.float32(1) - product[steps - 1 :] == 1).all()
    assert steps < 200_000


class _Counting:
    """Stands in for DeepSpeed's CPU optimizer."""

    def __init__(self, betas: tuple[float, float]) -> None:
        self.param_groups = [{"betas": betas, "eps": 1e-8}]
        self.state: dict[Any, Any] = {}
        self.opt_id, self.ds_opt_adam, self.counts = 0, self, []

    def adam_update(self, opt_id: int, count: int, *others: object) -> None:
        self.counts.append(count)


def test_no_loop_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = SimpleNamespace(DeepSpeedCPUAdam=_Counting)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", adam)  # type: ignore[arg-type]
    few, many = _Counting((0.9, 0.98)), _Counting((0.9, 0.98))
    restore_optimizer(few, [torch.zeros(2)], 100)
    assert few.counts == list(range(1, 101))
    restore_optimizer(many, [torch.zeros(2)], 10**9)
    assert many.counts == [10**9]
