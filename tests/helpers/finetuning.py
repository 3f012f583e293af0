"""Tiny runs that fine-tune, and what is compared of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from d2v_fast.training import step as training_step
from tests.helpers.checkpoint_files import opened
from tests.helpers.runs import TINY, run_forked

# what depends on time or on the place of a run
_VARYING = ("samples_per_s", "seconds", "peak_memory_bytes")

TINY_CLASSIFY: dict[str, Any] = {
    **TINY,
    "d2v": {
        "objective": "classify",
        "model": TINY["d2v"]["model"],
        "finetune": {"layer_decay": 0.8, "average_decay": 0.9},
        "schedule": {"steps": 6, "warmup_steps": 1, "kind": "constant"},
        "data": {key: value for key, value in TINY["d2v"]["data"].items() if key not in ("crop_scale", "flip_prob")},
        "valid": {"every_epochs": 0, "every_steps": 2, "batch_size": 100},
        "run": TINY["d2v"]["run"],
    },
}


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the log of a run without the values that depend on time."""
    lines = (folder / "runs" / name / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _VARYING} for line in lines]


def validations(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the validations of a run."""
    return [json.loads(line) for line in (folder / "runs" / name / "valid.jsonl").read_text().splitlines()]


def result(folder: Path, name: str) -> dict[str, Any]:
    """Return `result.json` of a run."""
    found: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return found


def saved(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, whole, by `KIND/NAME`."""
    reader = opened(folder / "runs" / name / "checkpoints" / f"step-{step}").reader()
    return {one: reader.whole(one) for one in reader.shapes}


def check_killed_run(folder: Path, file: Path) -> None:
    """Kill a run of 7 steps in its sixth one, resume it, and compare all of it with one that was not killed."""
    arguments, output = ["--ds_config", file, "--run"], folder / "output"
    assert run_forked(*arguments, "whole", output=output) == [0], output.read_text()

    def kill_in_step_6() -> None:
        made = training_step.TrainStep.update

        def update(self: training_step.TrainStep, number: int, lr: float) -> torch.Tensor:
            if number == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(self, number, lr)

        training_step.TrainStep.update = update  # type: ignore[method-assign]

    assert run_forked(*arguments, "r", output=output, before=kill_in_step_6) == [-signal.SIGKILL]
    assert run_forked(*arguments, "r", "--resume", output=output) == [0], output.read_text()
    assert logged(folder, "r") == logged(folder, "whole")
    assert validations(folder, "r") == validations(folder, "whole")
    assert result(folder, "r") == result(folder, "whole")
    whole, resumed = saved(folder, "whole", 7), saved(folder, "r", 7)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def check_two_processes(folder: Path, file: Path) -> None:
    """Compare the weights after 4 steps in two processes ("two") with those of one without ZeRO ("one")."""
    output = folder / "output"
    assert run_forked("--ds_config", file, "--run", "two", output=output, num_processes=2) == [0, 0], output.read_text()
    alone = ["--set", "zero_optimization.stage=0"]
    assert run_forked("--ds_config", file, "--run", "one", *alone, output=output) == [0], output.read_text()
    one, two = (saved(folder, name, 4) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-4, atol=2e-6, msg=name)
