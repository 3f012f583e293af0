"""Captured steps. Without a GPU, a capture runs a function and refuses host reads, and a replay runs it again."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.config import TeacherConfig
from d2v_fast.data import Step
from d2v_fast.distributed.world import World
from d2v_fast.models.encoder import Encoder
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.teacher import Teacher
from d2v_fast.training.capture import CudaCapture
from d2v_fast.training.captured_step import CapturedStep, CaptureOptions
from d2v_fast.training.engine import PlainEngine
from d2v_fast.training.step import StepResult, TrainStep
from tests.helpers.dry_capture import DryCapture, NoCapture, NoHostTensors
from tests.helpers.small_engine import config as engine_config
from tests.helpers.static_steps import ALL_KINDS, make_batch, make_config, make_trial


@dataclasses.dataclass
class Trial:
    """A small run: its step, networks, and the lines it printed."""

    step: TrainStep
    model: Data2Vec
    engine: PlainEngine
    said: list[str]

    def make(self, steps: list[Step], first: int = 1, moments_every: int = 1) -> list[StepResult]:
        return [
            self.step(number, step, 1e-3 * number, moments=number % moments_every == 0)
            for number, step in enumerate(steps, start=first)
        ]

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        tensors = {f"{kind}/{shard.key}": shard.master for kind, shard in self.engine.kept()}
        tensors |= {f"teacher/{shard.key}": shard.master for shard in self.step.teacher.shards}
        return {name: value.clone() for name, value in tensors.items()}


def make_run(
    kind: str, capture: DryCapture | None, *, fixed_counts: bool = False, max_shapes: int = 8, device: str = "cpu"
) -> Trial:
    """Return a run that captures, or with None a plain one. All runs of a kind begin alike."""
    torch.manual_seed(5)
    model, _, _ = make_trial(kind)
    model.to(device)
    # a large eps: some gradients are zero up to rounding, such as that of the bias of keys
    optimizer = {"lr": 1e-3, "eps": 1e-2}
    settings = engine_config(gradient_accumulation_steps=2, optimizer__params=optimizer)
    world = World("cpu" if device == "cpu" else "cuda")
    engine = PlainEngine(model, settings.deepspeed, world, decay_1d=False)
    copied = copy.deepcopy(model.student.averaged)
    teacher = Teacher(model.student.averaged, TeacherConfig(decay_start=0.9, decay_end=0.9), module=copied)
    said: list[str] = []
    if capture is None:
        return Trial(TrainStep(engine, teacher, world, divisor=24, seed=3), model, engine, said)
    options = CaptureOptions(capture, max_shapes, fixed_counts, said.append)
    return Trial(CapturedStep(engine, teacher, world, options, divisor=24, seed=3), model, engine, said)


def make_steps(kind: str, number: int) -> list[Step]:
    """Return steps of two micro-batches, whose numbers of rows differ."""
    config, steps = make_config(kind), []
    for index in range(number):
        batches = [make_batch(kind, config, seed=2 * index + micro) for micro in range(2)]
        # padded to 26 and to 28
        batches = (
            batches
            if kind.endswith("2")
            else [
                dataclasses.replace(batch, rows=batch.rows[:length])
                for batch, length in zip(batches, (25 + index % 2, 27), strict=True)
            ]
        )
        steps.append(Step(batches, sum(len(batch.rows) for batch in batches)))
    return steps


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_captured_steps_train_as_plain_ones(kind: str) -> None:
    """The functions are recorded without reading a value on the host, and replays train like plain steps."""
    capture = DryCapture()
    plain, captured = make_run(kind, None), make_run(kind, capture)
    steps = make_steps(kind, 6)
    expected, actual = plain.make(steps), captured.make(steps)
    # the update, and micro-steps of each shape
    num_shapes = 1 if kind.endswith("2") else 2
    assert captured.said == []
    assert capture.records == 1 + num_shapes
    assert capture.replays > capture.records
    for one, other in zip(actual, expected, strict=True):
        assert one.applied
        torch.testing.assert_close(one.sums(), other.sums(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.grad_norm, other.grad_norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(actual[0].losses, expected[0].losses, rtol=1e-6, atol=0)
    state = plain.state()
    for name, value in captured.state().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)
    assert captured.step.teacher.last_step == len(steps)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_capture_changes_no_bit(kind: str) -> None:
    """So a resumed run, which captures at other steps, equals the uninterrupted one."""
    steps, capture = make_steps(kind, 9), DryCapture()
    whole, never = make_run(kind, capture, fixed_counts=True), make_run(kind, NoCapture(), fixed_counts=True)
    # with and without moments are two captures of each shape
    results = whole.make(steps, moments_every=2)
    assert capture.records == 1 + 2 * (1 if kind.endswith("2") else 2)
    assert [len(result.moments) for result in results] == [0, 2, 0, 2, 0, 2, 0, 2, 0]
    never.make(steps, moments_every=2)
    assert_same_bits(whole.state(), never.state())
    assert never.said == ["some steps run without a CUDA graph (`d2v.run.cuda_graph`): this is refused"]

    first, second = make_run(kind, DryCapture(), fixed_counts=True), make_run(kind, DryCapture(), fixed_counts=True)
    first.make(steps[:5], moments_every=2)
    saved, teacher = first.state(), first.step.teacher.state_dict()
    second.engine.restore(
        lambda kept: kept.shard.master.copy_(saved[f"{kept.kind}/{kept.shard.key}"]), first.engine.state()
    )
    second.step.teacher.load_state_dict(teacher)
    second.make(steps[5:], first=6, moments_every=2)
    assert_same_bits(second.state(), whole.state())


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    run = make_run("vision", DryCapture())
    steps = make_steps("vision", 7)
    run.make(steps[:5])
    before = run.state()
    broken = dataclasses.replace(
        steps[5].micro_batches[0], inputs=torch.full_like(steps[5].micro_batches[0].inputs, torch.nan)
    )
    (result,) = run.make([Step([broken, steps[5].micro_batches[1]], steps[5].num_rows)], first=6)
    assert not result.applied
    assert not result.loss_finite
    assert_same_bits(run.state(), before)
    (result,) = run.make(steps[6:], first=7)
    assert result.applied
    assert not torch.equal(run.state()["teacher/embedding.cls_token"], before["teacher/embedding.cls_token"])


def test_results_outlive_the_next_step() -> None:
    run = make_run("vision", DryCapture())
    *_, last = run.make(make_steps("vision", 6))
    copied = [value.clone() for value in (last.sums(), last.grad_norm, last.applied)]
    run.make(make_steps("vision", 9)[8:], first=7)
    for value, expected in zip((last.sums(), last.grad_norm, last.applied), copied, strict=True):
        assert torch.equal(value, expected)


def test_batches_without_a_fixed_shape_run_without_a_capture() -> None:
    config = make_config("text")
    batch = make_batch("text", config)
    assert batch.lengths is not None
    places = (torch.arange(16) < batch.lengths[:, None]).flatten().nonzero()[:, 0]
    offsets = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).to(torch.int32)
    packed = dataclasses.replace(batch, unpadded=places, offsets=offsets)
    capture = DryCapture()
    captured, plain = make_run("text", capture), make_run("text", None)
    steps = [Step([packed, batch], 2 * len(batch.rows))] * 3
    for run in (captured, plain):
        run.make(steps)
    (line,) = captured.said
    assert "another number of tokens in every batch" in line
    state = plain.state()
    for name, value in captured.state().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_few_shapes_have_a_graph() -> None:
    capture = DryCapture()
    run = make_run("vision", capture, max_shapes=1)
    # two shapes in turn: neither is used often enough in a row to be captured
    batch = make_batch("vision", make_config("vision"))
    small = dataclasses.replace(batch, rows=batch.rows[:20])
    run.make([Step([batch, small], 57)] * 5)
    assert len(run.step._micro_steps) == 1  # type: ignore[attr-defined]
    assert capture.records == 1
    run.make([Step([batch, batch], 74)] * 3, first=6)
    assert capture.records == 2


def test_an_evicted_shape_is_freed_at_once() -> None:
    class Handle(DryCapture):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            super().record(function)
            # as of a CUDA graph, which does not hold the function
            return lambda: None

    run = make_run("vision", Handle(), max_shapes=1)
    batch = make_batch("vision", make_config("vision"))
    run.make([Step([batch, batch], 74)] * 3)
    (kept,) = run.step._micro_steps._values.values()  # type: ignore[attr-defined]
    freed = weakref.ref(kept)
    del kept
    gc.disable()
    try:
        run.make([Step([dataclasses.replace(batch, rows=batch.rows[:20])] * 2, 40)], first=4)
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_captured_functions_stay_on_the_device(kind: str, compiled: bool) -> None:
    """A copy from the host cannot be captured. On the device "meta", which has no values, no CPU tensor may appear."""
    model, teacher, batch = make_trial(kind)
    encoders = [part for part in model.modules() if isinstance(part, Encoder)]
    for encoder in encoders:
        encoder.is_compiled = compiled
    engine = PlainEngine(model, engine_config().deepspeed, World("cpu"), decay_1d=False)
    fixed = model.with_fixed_shapes(batch, fixed_counts=not compiled)
    on_device = dataclasses.replace(
        fixed, **{name: value.to("meta") for name, value in vars(fixed).items() if isinstance(value, Tensor)}
    )
    for network in (model, teacher):
        network.to("meta")
    scale = torch.ones((), device="meta")
    with NoHostTensors():
        output = engine.forward(on_device, teacher)
        engine.accumulate(output.loss_sum, scale)
    assert output.loss_sum.is_meta
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "processes", "device", "reason"),
    [
        ({}, 1, "cuda", None),
        ({"gradient_accumulation_steps": 2}, 1, "cuda", None),
        ({}, 1, "cpu", "CUDA graphs need a GPU"),
        ({}, 2, "cuda", "DeepSpeed decides parts of a step on the host"),
        ({"zero_optimization": {"stage": 1}}, 1, "cuda", "DeepSpeed decides parts of a step on the host"),
        ({"d2v__run__cuda_graph": False}, 1, "cuda", "it is false"),
    ],
)
def test_what_is_captured(changes: dict[str, Any], processes: int, device: str, reason: str | None) -> None:
    assert engine_config(processes, **changes).reason_not_to_capture(processes, device) == reason


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("fixed_counts", [False, True])
def test_a_cuda_graph_changes_no_bit(kind: str, fixed_counts: bool) -> None:
    steps = make_steps(kind, 8)
    device = torch.device("cuda")
    states = []
    for capture in (CudaCapture(device), NoCapture()):
        run = make_run(kind, capture, fixed_counts=fixed_counts, device="cuda")
        run.make(steps)
        states.append(run.state())
    assert_same_bits(*states)
