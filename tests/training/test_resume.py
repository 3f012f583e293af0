"""Resume bit for bit with the same processes and stage, and with other ones without losing a sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.data import StepLoader
from tests.helpers.checkpoint_files import opened
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import (
    TINY,
    TINY_2,
    TINY_2_SPEECH,
    TINY_2_TEXT,
    figures,
    import_deepspeed,
    run_forked,
    run_here,
    tiny_file,
)

pytestmark = pytest.mark.usefixtures("quick_runs")


# stochastic depth at its published rate stays: it does not depend on the split
NO_DROPOUT = {"d2v__model__drop_path": 0.25, "d2v__model__attention_dropout": 0.0}
NO_DROPOUT_2 = {"d2v__model__attention_dropout": 0.0, "d2v__model__decoder__dropout": 0.0}
NO_DROPOUT_2_SEQUENCES = {**NO_DROPOUT_2, "d2v__model__dropout": 0.0, "d2v__model__context_dropout": 0.0}


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, whole, by `KIND/NAME`."""
    reader = opened(folder).reader()
    return {name: reader.whole(name) for name in reader.shapes}


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return folder / "runs" / name / "checkpoints" / f"step-{step}"


def fp16_is_supported() -> bool:
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def resume_bit_exactly(
    base: dict[str, Any], stage: int, changes: dict[str, Any], stops: tuple[int, int], folder: Path
) -> dict[str, Any]:
    """Train with two processes, at once and with a stop, compare all that is saved, and return the engine's state."""
    stopped, steps = stops
    changes = {
        **changes,
        "zero_optimization__stage": stage,
        "d2v__schedule__kind": "constant",
        "d2v__schedule__warmup_steps": 1,
    }
    file, output = tiny_file(folder, base, **changes, d2v__schedule__steps=steps), folder / "output"
    arguments = ["--ds_config", file, "--run"]
    assert run_forked(*arguments, "whole", output=output, num_processes=2) == [0, 0], output.read_text()
    shorter = ["--set", f"d2v.schedule.steps={stopped}"]
    assert run_forked(*arguments, "r", *shorter, output=output, num_processes=2) == [0, 0], output.read_text()
    assert run_forked(*arguments, "r", "--resume", output=output, num_processes=2) == [0, 0], output.read_text()
    assert f"resumed after step {stopped}" in output.read_text()
    assert figures(folder, "r") == figures(folder, "whole")
    engines = [
        json.loads((checkpoint(folder, name, steps) / "state.json").read_text())["engine"] for name in ("r", "whole")
    ]
    assert engines[0] == engines[1]
    whole, resumed = (saved_tensors(checkpoint(folder, name, steps)) for name in ("whole", "r"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    weights = SavedWeights(opened(checkpoint(folder, "r", steps)), "teacher")
    # what student and teacher share is saved once
    averaged = [name for name in weights if f"teacher/{name}" in whole]
    assert averaged
    assert all(torch.equal(weights[name], whole[f"teacher/{name}"]) for name in averaged)
    return engines[0]


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {}),
        pytest.param(1, {}, marks=pytest.mark.slow),
        # slow: a run of data2vec 2.0 resumes at this stage in every run
        pytest.param(2, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        (3, {"gradient_accumulation_steps": 2}),
        pytest.param(3, {"bf16__enabled": True}, marks=pytest.mark.slow),
        (0, {"fp16": {"enabled": True, "initial_scale_power": 30, "loss_scale_window": 3, "hysteresis": 1}}),
        (2, {"fp16": {"enabled": True, "initial_scale_power": 30, "loss_scale_window": 3, "hysteresis": 1}}),
        pytest.param(
            2,
            {"bf16__enabled": True, "zero_optimization__offload_optimizer": {"device": "cpu"}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_resume_is_bit_exact(stage: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Two processes stop at the end of a shorter schedule with the same rates, and resume."""
    # fp16 lowers its scale in the first steps
    steps, stopped = (9, 6) if "fp16" in changes else (2, 1)
    if "fp16" in changes and not fp16_is_supported():
        pytest.skip("DeepSpeed has no fp16 on this CPU")
    engine = resume_bit_exactly(TINY, stage, changes, (stopped, steps), tmp_path)
    if "fp16" in changes:
        # the scale has been lowered, so that there is something to restore
        assert engine["loss_scale"]["cur_scale"] < 2**30


@needs_deepspeed
@pytest.mark.parametrize(
    ("base", "stage"),
    [(TINY_2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((TINY_2_SPEECH, 3), (TINY_2_TEXT, 1)))],
    ids=["images", "speech", "text"],
)
def test_resume_of_data2vec_2_is_bit_exact(base: dict[str, Any], stage: int, tmp_path: Path) -> None:
    """With dropout, layer drop and noise."""
    # slow: a second and a third modality, with the same code
    resume_bit_exactly(base, stage, {"gradient_accumulation_steps": 2}, (1, 2), tmp_path)


@needs_deepspeed
@pytest.mark.parametrize(
    ("base", "smooth", "batch"),
    [
        (TINY, NO_DROPOUT, 144),
        # slow: the same code with another objective and other data
        pytest.param(TINY_2, NO_DROPOUT_2, 144, marks=pytest.mark.slow),
        pytest.param(TINY_2_SPEECH, NO_DROPOUT_2_SEQUENCES, 12, marks=pytest.mark.slow),
        pytest.param(TINY_2_TEXT, NO_DROPOUT_2_SEQUENCES, 12, marks=pytest.mark.slow),
    ],
    ids=["data2vec", "data2vec2", "speech data2vec2", "text data2vec2"],
)
def test_resume_with_other_processes_and_stages(
    base: dict[str, Any], smooth: dict[str, Any], batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that changes its number of processes, stage, accumulation and workers keeps the losses of one process.

    It sees every sample of an epoch once."""
    steps = 2
    changes = {**smooth, "d2v__schedule__kind": "constant", "train_batch_size": batch}
    changes |= {"d2v__run__save_every": steps, "d2v__schedule__warmup_steps": steps, "optimizer__params__eps": 1e-6}
    # processes, stage, accumulation, workers
    legs = [(1, 0, 1, 0), (2, 3, 2, 1), (4, 1, 1, 0), (2, 2, 3, 2), (1, 3, 4, 0)]
    total = steps * len(legs)
    record = tmp_path / "ids"
    record.mkdir()
    iterate = StepLoader.__iter__

    def recorded(self: StepLoader) -> Any:
        for number, step in enumerate(iterate(self), start=self.order.start_step + 1):
            ids = [int(i) for batch in step.micro_batches for i in batch.sample_ids]
            (record / f"{number}-{self.order.rank}").write_text(json.dumps(ids))
            yield step

    monkeypatch.setattr(StepLoader, "__iter__", recorded)
    file, output = tiny_file(tmp_path, base, **changes, d2v__schedule__steps=total), tmp_path / "output"
    assert run_here("--ds_config", file, "--run", "whole") == 0
    for path in record.iterdir():
        path.unlink()
    for leg, (processes, stage, accumulation, workers) in enumerate(legs, start=1):
        options = ["--set", f"d2v.schedule.steps={steps * leg}", "--set", f"zero_optimization.stage={stage}"]
        options += ["--set", f"gradient_accumulation_steps={accumulation}"]
        options += ["--set", f"d2v.data.num_workers={workers}"]
        resume = ["--resume"] if leg > 1 else []
        statuses = run_forked(
            "--ds_config", file, "--run", "r", *options, *resume, output=output, num_processes=processes
        )
        assert statuses == [0] * processes, output.read_text()

    losses = [[entry[2] for entry in figures(tmp_path, name)] for name in ("r", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for kind in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        moved, whole = (saved_tensors(checkpoint(tmp_path, name, total)) for name in ("r", "whole"))
        names = [name for name in whole if name.startswith(f"{kind}/")]
        assert names
        for name in names:
            assert (moved[name] - whole[name]).norm() <= 1e-4 * whole[name].norm(), name

    seen: dict[int, list[int]] = {step: [] for step in range(1, total + 1)}
    for path in record.iterdir():
        seen[int(path.name.split("-")[0])] += json.loads(path.read_text())
    assert all(len(ids) == batch for ids in seen.values())
    # there are 1438 digits, and more of the other samples than a run sees
    in_epoch = min(1438 // batch, total)
    first_epoch = [i for step in range(1, in_epoch + 1) for i in seen[step]]
    assert len(first_epoch) == len(set(first_epoch)) == in_epoch * batch


def test_other_global_batch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path)
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=3") == 0
    assert run_here("--ds_config", file, "--run", "r", "--resume", "--set", "train_batch_size=48") == 1
    assert "`train_batch_size` must be 24 as in the checkpoint, but is 48 instead" in capsys.readouterr().err


# slow: the run of one process in `test_train.py` leaves the same in every run
@pytest.mark.slow
@needs_deepspeed
@pytest.mark.reports
def test_partitioned_run_leaves_everything(tmp_path: Path) -> None:
    """Under ZeRO-3, where no process has the whole network, the probe and the export gather it."""
    changes = {"zero_optimization__stage": 3, "d2v__schedule__steps": 3, **NO_DROPOUT}
    file, output = tiny_file(tmp_path, **changes), tmp_path / "output"
    assert run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2) == [0, 0], output.read_text()
    plain = tiny_file(tmp_path, **{**changes, "zero_optimization__stage": 0})
    assert run_here("--ds_config", plain, "--run", "plain") == 0
    reports = [json.loads((tmp_path / "runs" / name / "probe.json").read_text()) for name in ("r", "plain")]
    assert [entry["step"] for entry in reports[0]] == [3]
    for features, scores in reports[1][0].items():
        # one of 359 images may fall on the other side of a boundary
        assert reports[0][0][features] == pytest.approx(scores, abs=0.6), features
    exported = [load_file(tmp_path / "runs" / name / "export" / "model.safetensors") for name in ("r", "plain")]
    for key, value in exported[1].items():
        torch.testing.assert_close(exported[0][key], value, rtol=1e-5, atol=1e-6)


@needs_deepspeed
def test_what_deepspeed_refuses_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if fp16_is_supported():
        pytest.skip("DeepSpeed has fp16 on this CPU")
    file = tiny_file(tmp_path, fp16={"enabled": True}, zero_optimization__stage=1)
    assert run_here("--ds_config", file, "--run", "r") == 1
    assert "DeepSpeed cannot run this configuration here: Type fp16 is not supported" in capsys.readouterr().err
