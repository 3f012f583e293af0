"""Memory per process: the arithmetic by hand, activations against what autograd saves, runs against predictions."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from d2v_fast.commands import check as check_module
from d2v_fast.config import RunConfig, SpeechConfig, load_config, parse_config
from d2v_fast.data.batch import Batch
from d2v_fast.memory.peak import format_bytes
from d2v_fast.memory.predict import Prediction, predict, predict_from
from d2v_fast.memory.sizes import Shapes, shapes_of
from d2v_fast.memory.step import Arrival, StepMemory, step_memory
from d2v_fast.modalities import modality_of
from d2v_fast.objectives.build import build_model
from d2v_fast.ops import attention
from d2v_fast.training.engine import PlainEngine
from tests.helpers.common import run_python
from tests.helpers.marks import needs_deepspeed
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT, free_port, run_here, tiny_file
from tests.helpers.saved_tensors import Saved

FP32, BF16 = torch.float32, torch.bfloat16
# matrices of 6 and 10 elements, of which the first is averaged, and a bias of 3: P = 19, S = 9
SHAPES = Shapes(((6, 10), (3,)), ((6,), (3,)))
# 100 bytes are saved; the last layer's gradient comes first
STEP = StepMemory(8, 100, 120, 130, 140, (Arrival(10, 130, 60), Arrival(3, 80, 30), Arrival(6, 50, 0)))


def config_of(**changes: Any) -> RunConfig:
    raw = copy.deepcopy(TINY)
    raw["train_batch_size"] = 8
    return parse_config({**raw, **changes}, changes.pop("processes", 1))


def found(processes: int, zero: dict[str, Any], dtype: torch.dtype, device_type: str = "cpu") -> Prediction:
    config = config_of(zero_optimization=zero)
    return predict_from(config, processes, dtype, device_type, SHAPES, STEP)


def device(prediction: Prediction) -> dict[str, int]:
    return {part.name: part.device for part in prediction.parts if part.device}


def host(prediction: Prediction) -> dict[str, int]:
    return {part.name: part.host for part in prediction.parts if part.host}


def on_top(prediction: Prediction) -> dict[str, int]:
    return {phase.name: phase.device for phase in prediction.phases}


def test_plain() -> None:
    fp32 = found(1, {"stage": 0}, FP32)
    assert device(fp32) == {"parameters": 4 * 19, "optimizer": 8 * 19, "teacher": 4 * 9}
    # nothing is larger than activations and gradients together
    assert on_top(fp32) == {"forward and backward": 140}
    assert fp32.device_peak == 12 * 19 + 4 * 9 + 140
    assert fp32.build == 4 * 19 + 4 * 9
    # on a CPU the copy is made for a save in the background only
    assert fp32.save == 12 * 19 + 4 * 9
    bf16 = found(1, {"stage": 0}, BF16)
    assert device(bf16) == {**device(fp32), "teacher's copy": 2 * 9}


def test_captured_steps_keep_gradients_and_working_memory() -> None:
    plain_run = {**TINY["d2v"], "run": {**TINY["d2v"]["run"], "cuda_graph": False}}
    plain = predict_from(config_of(d2v=plain_run), 1, BF16, "cuda", SHAPES, STEP)
    captured = found(1, {"stage": 0}, BF16, "cuda")
    assert device(captured) == {**device(plain), "gradients": 4 * 19, "graphs": 130}
    assert on_top(plain) == {"forward and backward": 140}
    assert on_top(captured) == {"forward and backward": 130}
    assert device(found(1, {"stage": 0}, BF16)) == device(plain)


def test_captured_steps_have_padded_rows() -> None:
    config = config_of().d2v
    plain, captured = (step_memory(config, 7, FP32, captured=captured) for captured in (False, True))
    with torch.device("meta"):
        rows = len(modality_of(config).largest_batch(config, 7).rows)
    assert captured.batch == plain.batch + 8 * (-rows % (2 ** (rows - 1).bit_length() // 16)) > plain.batch


def test_stage_0() -> None:
    fp32 = found(2, {"stage": 0}, FP32)
    assert device(fp32) == {"parameters": 4 * 19, "optimizer": 8 * 19, "teacher": 4 * 9}
    # all gradients, and the flat copy that is reduced
    assert on_top(fp32)["gradient exchange"] == 4 * 19 + 4 * 19
    bf16 = found(2, {"stage": 0}, BF16)
    assert device(bf16) == {
        "parameters": 2 * 19,
        "fp32 parameters": 4 * 19,
        "optimizer": 8 * 19,
        "teacher": 4 * 9,
        "teacher's copy": 2 * 9,
    }
    assert on_top(bf16)["optimizer step"] == (2 + 4) * 19


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2(stage: int) -> None:
    # two processes: groups are padded to multiples of 4, so 16 + 4 = 20 elements, 8 + 2 = 10 of them a process's
    fp32 = found(2, {"stage": stage}, FP32)
    assert device(fp32) == {
        "parameters": 4 * 20,
        "fp32 parameters": 4 * 10,
        "optimizer": 8 * 10,
        "teacher": 4 * 20,
    }
    bf16 = found(2, {"stage": stage}, BF16)
    assert device(bf16) == {
        "parameters": 2 * 20,
        "fp32 parameters": 4 * 10,
        "optimizer": 8 * 10,
        "teacher": 2 * 20,
        # of the first shard of 8 matrix elements 6 are averaged, of the second shard of 2 both
        "teacher's average": 4 * (6 + 2),
    }
    # process 0 has all of the first matrix, a part of the second, and a part of the bias: 6 + 10 + 3 gradients whole
    assert on_top(fp32)["optimizer step"] == 4 * 19 + 4 * 8
    assert on_top(bf16)["optimizer step"] == 2 * 19 + (2 + 4) * 8


def test_stage_1_reduces_after_the_backward_pass() -> None:
    fp32 = on_top(found(2, {"stage": 1}, FP32))
    assert fp32["forward and backward"] == 140
    # all gradients, in a bucket as large as the model, and its flat copy
    assert fp32["gradient exchange"] == 4 * 19 + 4 * 19
    # one process has no flat copy, but what it keeps
    assert on_top(found(1, {"stage": 1}, FP32))["gradient exchange"] == 4 * 19 + 4 * 19
    # buckets of 10: when the second is copied into one, 13 are still in the parameters, and what is kept is there
    small = on_top(found(2, {"stage": 1, "reduce_bucket_size": 10}, FP32))
    assert small["gradient exchange"] == 4 * (13 + 10 + 19)


def test_stage_2_reduces_in_the_backward_pass() -> None:
    # a bucket as large as the model: full when the activations are gone
    assert on_top(found(2, {"stage": 2}, FP32))["forward and backward"] == max(130 + 4 * 10, 4 * 19 * 2)
    # a GPU gives the bucket its memory at once
    assert on_top(found(2, {"stage": 2}, FP32, "cuda"))["forward and backward"] == max(130 + 4 * 19, 4 * 19 * 2)
    # buckets of 10: the first is reduced when the second gradient comes, and what is kept is there from then on
    small = on_top(found(2, {"stage": 2, "reduce_bucket_size": 10}, FP32))["forward and backward"]
    assert small == max(130 + 40, 80 + 40 + 40, 80 + 40 + 4 * 19, 50 + 40 + 4 * 19)


def test_stage_3() -> None:
    # two processes: 3 + 5 + 2 elements, of which the teacher's are 3 + 2
    zero = {"stage": 3, "stage3_param_persistence_threshold": 3}
    fp32 = found(2, zero, FP32)
    assert device(fp32) == {
        "parameters": 4 * 10,
        "small parameters": 4 * 3,
        "fp32 parameters": 4 * 10,
        "optimizer": 8 * 10,
        "gradients": 4 * 10,
        "teacher": 4 * 5,
        "gradient bucket": 4 * 19,
    }
    bf16 = found(2, zero, BF16)
    assert device(bf16)["teacher"] == 2 * 5
    assert device(bf16)["teacher's average"] == 4 * 5
    # everything is fetched at once: gloo copies the shards, gathers into memory of its own, then into a flat tensor
    assert on_top(fp32)["forward and backward"] == int(4 * 19 * 3.5)
    # in two parts the second comes while 12 elements and their share of the activations are there
    halves = found(2, {**zero, "stage3_prefetch_bucket_size": 12}, FP32)
    assert on_top(halves)["forward and backward"] == max(int(100 * 12 / 19 + 4 * (12 + 3.5 * 7)), 120 + 4 * 19)
    # NCCL needs the flat tensor only, and the backward pass begins with everything gathered
    assert on_top(found(2, zero, FP32, "cuda"))["forward and backward"] == 130 + 4 * 19
    # the bucket's copy, and that of gloo; NCCL makes none
    assert on_top(fp32)["gradient exchange"] == 4 * 19 * 2
    assert on_top(found(2, zero, FP32, "cuda"))["gradient exchange"] == 4 * 19
    assert on_top(fp32)["optimizer step"] == 4 * 10


def test_offload() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    second = found(2, {"stage": 2, **offload}, BF16, "cuda")
    assert device(second) == {"parameters": 2 * 20, "teacher": 2 * 20, "offload transfer": 2 * 10}
    assert host(second) == {
        "fp32 parameters": 4 * 10,
        "optimizer": 8 * 10,
        "teacher's average": 4 * 8,
        "offload gradients": 4 * 10,
        "offload buffer": 2 * 10,
        "offload transfer": 2 * 10,
    }
    third = found(2, {"stage": 3, **offload, "offload_param": {"device": "cpu"}}, BF16, "cuda")
    # the bias persists, and the bucket
    assert device(third) == {"small parameters": 2 * 19, "gradient bucket": 2 * 19}
    assert host(third)["parameters"] == 2 * 10
    assert host(third)["teacher"] == 2 * 5
    # a CPU has one memory
    both = found(2, {"stage": 2, **offload}, BF16, "cpu")
    assert both.host_state == 0
    assert both.device_state == second.device_state + second.host_state


def test_shards_shrink_with_processes() -> None:
    config = config_of(zero_optimization={"stage": 3}, train_batch_size=24)
    shapes = shapes_of(config)
    model = build_model(config.d2v)
    assert shapes.trained == sum(p.numel() for p in model.parameters())
    assert shapes.teacher == sum(p.numel() for p in model.student.parameters())
    assert shapes.largest == max(p.numel() for p in model.parameters())
    sizes = [device(predict_from(config, n, FP32, "cpu", shapes, STEP))["optimizer"] for n in (1, 2, 4, 8)]
    assert sizes[0] == 8 * shapes.trained
    for n, size in zip((2, 4, 8), sizes[1:], strict=True):
        assert size == pytest.approx(8 * shapes.trained / n, rel=0.1)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast", "dropout", "instance", "no blocks dropped", "fused"])
def test_activations_are_what_autograd_saves(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = copy.deepcopy(TINY)
    raw["d2v"]["model"] |= {"width": 32, "depth": 4, "drop_path": 0.0, "attention_dropout": 0.0}
    if mode == "dropout":
        raw["d2v"]["model"] |= {"dropout": 0.1, "attention_dropout": 0.1}
    if mode == "fused":
        raw["d2v"]["model"]["attention"] = "fused"
    if mode == "instance":
        raw["d2v"]["target"]["layer_norm"] = "instance"
    if mode == "no blocks dropped":
        raw["d2v"]["model"]["drop_path"] = 1e-9
    config = parse_config(raw).d2v
    dtype = BF16 if mode in ("bf16", "autocast") else FP32
    predicted = step_memory(
        config, 8, dtype, autocast=mode == "autocast", device_type="cuda" if mode == "fused" else "cpu"
    )
    if mode == "fused":
        # what the operation saves does not depend on the device
        monkeypatch.setattr(attention, "_WITH_KERNELS", {"cpu"})

    model, teacher = build_model(config), build_model(config).student.eval().requires_grad_(False).to(dtype)
    if mode == "bf16":
        model.to(BF16)
    num_rows = 8 * config.mask.num_patches
    batch = Batch(torch.randn(8, 1, 8, 8), torch.arange(num_rows), torch.arange(8))
    saved = Saved(model)
    enabled = mode == "autocast"
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x),
        torch.autocast("cpu", BF16, enabled=enabled),
    ):
        loss = model(batch, teacher).loss_sum
    loss.backward()
    # the loss itself, and rows of tokens that the batch's rows became, are a few hundred bytes
    assert predicted.saved == pytest.approx(saved.bytes, rel=0.01)
    assert sum(arrival.elements for arrival in predicted.arrivals) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_speech_activations(mode: str, recompute: bool) -> None:
    raw = copy.deepcopy(TINY_SPEECH)
    raw["d2v"]["model"] |= {"conv_width": 32, "width": 32, "layer_drop": 0.0, "front_end_checkpointing": recompute}
    config = parse_config(raw).d2v
    assert isinstance(config, SpeechConfig)
    dtype = FP32 if mode == "fp32" else BF16
    predicted = step_memory(config, 8, dtype, autocast=mode == "autocast")

    model, teacher = build_model(config), build_model(config).student.averaged.eval().requires_grad_(False).to(dtype)
    if mode == "bf16":
        model.to(BF16)
    num_samples = int(config.data.max_seconds * config.model.sample_rate)
    num_rows = int(8 * config.model.num_frames(num_samples) * (1 - math.exp(-config.mask.prob)))
    batch = Batch(torch.randn(8, num_samples), torch.arange(num_rows), torch.arange(8))
    saved = Saved(model)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x),
        torch.autocast("cpu", BF16, enabled=mode == "autocast"),
    ):
        loss = model(batch, teacher).loss_sum
    loss.backward()
    assert predicted.saved == pytest.approx(saved.bytes, rel=0.03)


@pytest.mark.parametrize("base", [TINY_SPEECH, TINY_TEXT], ids=["speech", "text"])
def test_layer_drop_is_not_relied_on(base: dict[str, Any]) -> None:
    """A step in which every sample keeps every block is what is predicted, and the same each time."""
    raw = copy.deepcopy(base)
    raw["d2v"]["model"]["layer_drop"] = 0.0
    expected = step_memory(parse_config(raw).d2v, 8, FP32)
    raw["d2v"]["model"]["layer_drop"] = 0.5
    assert {step_memory(parse_config(raw).d2v, 8, FP32) for _ in range(3)} == {expected}


def test_checkpointing_saves_the_inputs_of_blocks_only() -> None:
    raw = copy.deepcopy(TINY)
    raw["d2v"]["model"] |= {"depth": 8, "drop_path": 0.0}
    plain = step_memory(parse_config(raw).d2v, 8, FP32)
    raw["d2v"]["model"]["gradient_checkpointing"] = True
    recomputed = step_memory(parse_config(raw).d2v, 8, FP32)
    inputs = 8 * 8 * 17 * 16 * 4
    assert inputs <= recomputed.saved < 0.1 * plain.saved
    # one block at a time comes back
    assert plain.saved / 8 < recomputed.backward < plain.saved / 4 + recomputed.saved


def test_accumulation_keeps_the_gradients() -> None:
    once, twice = config_of(), config_of(gradient_accumulation_steps=2)
    first = predict_from(once, 1, FP32, "cpu", SHAPES, STEP)
    second = predict_from(twice, 1, FP32, "cpu", SHAPES, STEP)
    assert on_top(first)["forward and backward"] == 140
    assert on_top(second)["forward and backward"] == 130 + 4 * 19


def test_peak_of_a_process() -> None:
    code = """
import torch
from d2v_fast.modalities import modality_of
from d2v_fast.memory.peak import PeakMemory
memory = PeakMemory(torch.device("cpu"))
block = torch.ones(64 << 20, dtype=torch.uint8)
del block
print(memory.bytes(), memory.bytes())
"""
    grown, again = map(int, run_python(code).split())
    assert 63 << 20 < grown < 80 << 20
    # it is a peak: what was freed stays in it
    assert again == grown


def test_what_is_resident_besides_tensors() -> None:
    step = STEP._replace(small=100)
    config = config_of(zero_optimization={"stage": 0})
    on_cpu = predict_from(config, 1, FP32, "cpu", SHAPES, step)
    assert on_cpu.resident_peak == on_cpu.device_peak + 60 + 40_000_000
    on_gpu = predict_from(config, 1, FP32, "cuda", SHAPES, step)
    assert on_gpu.resident_peak == on_gpu.device_peak


def test_small_blocks() -> None:
    """All of a tiny step is in small blocks, and next to nothing of a step with large ones."""
    tiny = step_memory(config_of().d2v, 8, FP32)
    # with the gradients that the parameters keep
    assert tiny.with_gradients <= tiny.small <= tiny.with_gradients + 8 * shapes_of(config_of()).trained
    large = step_memory(config_of().d2v, 40_000, FP32)
    assert large.small < 0.2 * large.with_gradients


def test_memory_of_a_given_batch() -> None:
    config = parse_config(copy.deepcopy(TINY_TEXT)).d2v
    tokens = torch.zeros(24, 8, dtype=torch.int64)
    batch = Batch(tokens, torch.arange(20), torch.arange(24), masked_inputs=tokens)
    short, longest = step_memory(config, 24, FP32, like=batch), step_memory(config, 24, FP32)
    assert short.saved < 0.35 * longest.saved


def test_check_predicts_no_less_than_it_measures(tmp_path: Path) -> None:
    """In a process of its own, with the malloc that users have; a build without the margin predicts 1.2 times less."""
    config = str(ROOT / "configs" / "digits.json")
    code = "from d2v_fast.commands import check; check.MIN_STEPS, check.ENOUGH_SECONDS = 1, 0.0; "
    code += f"check.check({config!r}, ['train_batch_size=128'])"
    line = next(line for line in run_python(code).splitlines() if line.startswith("peak memory"))
    measured, predicted = (
        float(number) * {"MB": 1, "GB": 1000}[unit] for number, unit in re.findall(r"([\d.]+) (MB|GB)", line)
    )
    assert 0.4 * predicted < measured <= predicted


def test_check_measures_the_moments_beside_the_activations(tmp_path: Path, monkeypatch, capsys) -> None:
    """A large model is tried for one step, in which the optimizer has no moments yet unless they are made before."""
    monkeypatch.setattr(check_module, "MAX_STEPS", 1)
    forward, found = PlainEngine.forward, []

    def forward_that_looks(self: PlainEngine, *arguments: Any) -> Any:
        moments = [value for state in self.optimizer.state.values() for value in state.values() if value.dim() > 0]
        weights = [float(p.detach().square().sum()) for p in self.model.parameters()]
        found.append((sum(value.numel() for value in moments), weights))
        return forward(self, *arguments)

    monkeypatch.setattr(PlainEngine, "forward", forward_that_looks)
    file = tiny_file(tmp_path)
    assert check_module.check(file)
    assert "measured in these steps" in capsys.readouterr().out
    config = load_config(file)
    torch.manual_seed(config.d2v.run.seed)
    untouched = build_model(config.d2v)
    assert found == [
        (2 * shapes_of(config).trained, [float(p.detach().square().sum()) for p in untouched.parameters()])
    ]


def test_check_says_that_it_does_not_capture() -> None:
    assert "but in the run" in (check_module._about_capture(config_of(), 1, "cuda") or "")
    assert check_module._about_capture(config_of(), 1, "cpu") is None
    uncaptured = config_of(d2v={**TINY["d2v"], "run": {**TINY["d2v"]["run"], "cuda_graph": False}})
    assert check_module._about_capture(uncaptured, 1, "cuda") is None


def test_sizes_are_readable() -> None:
    assert [format_bytes(size) for size in (0, 999, 1000, 345e6, 1.377e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "345 MB",
        "1.38 GB",
    ]


def test_dry_run_prints_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--ds_config", tiny_file(tmp_path), "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (
        "parameters ",
        "optimizer ",
        "teacher ",
        "activations ",
        "+ forward and backward",
        "while the model is built",
    ):
        assert any(line.strip().startswith(name) for line in lines), lines


# width 512, depth 7: 22 M parameters
LARGE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "d2v__model": {**TINY["d2v"]["model"], "width": 512, "depth": 7, "heads": 8, "drop_path": 0.0},
    "d2v__schedule": {"steps": 3, "warmup_steps": 1},
    "d2v__run__save_every": 100,
}


def run_fresh(arguments: list[str], processes: int) -> str:
    """Run the command line in new interpreters, whose C library returns freed memory at once: what a forked process has
    of its parent would be measured, too. Returns what the first one prints."""
    common = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "d2v_fast" / "train.py"), *arguments]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    return outputs[0]


def measured_and_predicted(folder: Path, processes: int, stage: int, bf16: bool) -> tuple[int, int]:
    images = folder / "images"
    images.mkdir()
    for index in range(8):
        Image.new("L", (8, 8), 30 * index).save(images / f"{index}.png")
    # without labels there is no probe, which would take longer than the run
    data = {**TINY["d2v"]["data"], "kind": "images", "path": str(images)}
    changes = {
        **LARGE,
        "d2v__data": data,
        "train_batch_size": processes,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    path = tiny_file(folder, **changes)
    output = run_fresh(["--ds_config", str(path), "--run-name", "r"], processes)
    assert "peak memory per process" in output
    entries = [json.loads(line) for line in (folder / "runs" / "r" / "log.jsonl").read_text().splitlines()]
    config = load_config(path, world_size=processes)
    assert shapes_of(config).trained > 20e6
    return entries[-1]["peak_memory_bytes"], predict(config, processes, BF16 if bf16 else FP32, "cpu").device_peak


@pytest.mark.slow
def test_a_run_needs_what_was_predicted(tmp_path: Path) -> None:
    measured, predicted = measured_and_predicted(tmp_path, 1, 0, bf16=False)
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_sharded_runs_need_what_was_predicted(tmp_path: Path, processes: int, stage: int, bf16: bool) -> None:
    measured, predicted = measured_and_predicted(tmp_path, processes, stage, bf16)
    assert predicted == pytest.approx(measured, rel=0.15)
