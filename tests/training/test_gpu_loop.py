"""The training loop on a GPU, with captured steps and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2v_fast.data import Step, StepLoader
from d2v_fast.files import faults
from tests.helpers.runs import figures, run_here, tiny_file


def poison_batches(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the inputs of these steps, counted from 1, NaN: captured steps read them, and call no function again."""
    original = StepLoader.__iter__

    def poisoned(loader: StepLoader) -> Iterator[Step]:
        for number, step in enumerate(original(loader), start=1):
            if number in steps:
                batches = [replace(one, inputs=torch.full_like(one.inputs, torch.nan)) for one in step.micro_batches]
                step = replace(step, micro_batches=batches)
            yield step

    monkeypatch.setattr(StepLoader, "__iter__", poisoned)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_loop_never_waits_for_the_gpu(
    tmp_path: Path, device: torch.device, monkeypatch, capsys, captured: bool
) -> None:
    """No call waits for the GPU between two logged steps, and a step that is not finite changes nothing."""
    run = {"device": device.type, "log_every": 16, "save_every": 100, "compile": captured, "cuda_graph": captured}
    changes = {f"d2v__run__{key}": value for key, value in run.items()}
    # so short a run learns nothing
    changes |= {"d2v__schedule__steps": 24, "d2v__guard__min_prediction_std": 0.0}
    file = tiny_file(tmp_path, **changes)
    steps = []

    def watch(point: str) -> None:
        if point == "step":
            steps.append(point)
            waits = len(steps) in (15, 23) or len(steps) >= 24
            torch.cuda.set_sync_debug_mode("default" if waits else "error")

    monkeypatch.setattr(faults, "fault_point", watch)
    poison_batches(monkeypatch, {5, 12})
    try:
        assert run_here("--ds_config", file, "--run", "r") == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [entry[8] for entry in figures(tmp_path, "r")] == [0, 2, 2]
    assert all(entry[2] is not None for entry in figures(tmp_path, "r"))
    said = capsys.readouterr().out
    # nothing was refused by the compiler or the capture
    assert "d2v.run.cuda_graph`" not in said
    assert ("blocks are compiled" in said) == captured
