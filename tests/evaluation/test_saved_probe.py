"""The probe of a run and the probe of its checkpoint use the same weights and give the same table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Module

from d2v_fast.checkpoints.saved_weights import load_encoder, load_head, open_checkpoint, read_run_config
from d2v_fast.evaluation import run as evaluation
from d2v_fast.evaluation.run import probe_checkpoint
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import TINY, TINY_SPEECH, leave_out_reports, run_forked, run_here, tiny_file

BF16 = {"bf16__enabled": True}


@pytest.mark.parametrize(
    ("base", "processes", "changes"),
    [
        pytest.param(TINY, 1, {}, marks=pytest.mark.slow),
        (TINY, 1, BF16),
        pytest.param(TINY_SPEECH, 1, BF16, marks=pytest.mark.slow),
        pytest.param(TINY, 2, {**BF16, "zero_optimization__stage": 1}, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param(TINY, 2, {**BF16, "zero_optimization__stage": 3}, marks=needs_deepspeed),
    ],
    ids=["fp32", "bf16", "bf16 speech", "bf16 ZeRO-1", "bf16 ZeRO-3"],
)
def test_weights_are_those_of_the_checkpoint(
    base: dict[str, Any], processes: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """fp32, bit for bit, whatever the run computes in."""

    def keep(config: Any, student: Module, teacher: Module, head: Module) -> Any:
        for name, part in (("student", student), ("teacher", teacher), ("head", head)):
            state = {key: value.contiguous().clone() for key, value in part.state_dict().items()}
            save_file(state, tmp_path / f"{name}.safetensors")
        raise ValueError("that is all")

    def prepare() -> None:
        leave_out_reports()
        evaluation.has_labels, evaluation.probe = lambda config: True, keep

    file, output = tiny_file(tmp_path, base, d2v__schedule={"steps": 3}, **changes), tmp_path / "output"
    statuses = run_forked("--ds_config", file, "--run", "r", output=output, num_processes=processes, before=prepare)
    assert statuses == [0] * processes, output.read_text()
    run = tmp_path / "runs" / "r"
    config = read_run_config(run)
    with open_checkpoint(run, 3) as checkpoint:
        parts: dict[str, Module] = {name: load_encoder(checkpoint, config, name) for name in ("student", "teacher")}
        parts["head"] = load_head(checkpoint, config, load_encoder(checkpoint, config, "student"))
    for name, part in parts.items():
        probed, saved = load_file(tmp_path / f"{name}.safetensors"), part.state_dict()
        assert probed.keys() == saved.keys()
        for key, value in saved.items():
            assert probed[key].dtype == torch.float32, key
            assert torch.equal(probed[key], value), key


def test_table_of_a_run_in_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, d2v__schedule={"steps": 4}, **BF16)
    with pytest.MonkeyPatch.context() as patch:
        has_labels = evaluation.has_labels
        leave_out_reports(patch.setattr)
        patch.setattr(evaluation, "has_labels", has_labels)
        assert run_here("--ds_config", file, "--run", "r") == 0
    printed = capsys.readouterr().out
    assert "\n".join(probe_checkpoint(tmp_path / "runs" / "r").splitlines()[1:]) in printed
