"""Captured steps. Without a GPU, a capture runs a function and refuses host reads, and a replay runs it again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.config import TeacherConfig
from d2v_fast.data import Step
from d2v_fast.distributed.world import World
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.teacher import Teacher
from d2v_fast.training.capture import WARM_UP_RUNS, CudaCapture, RecentlyUsed, Replayed
from d2v_fast.training.captured_step import CapturedStep, CaptureOptions
from d2v_fast.training.engine import PlainEngine
from d2v_fast.training.step import StepResult, TrainStep
from tests.helpers.small_engine import config as engine_config
from tests.helpers.static_steps import ALL_KINDS, make_batch, make_config, make_trial

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "repeat_interleave")


class NoHostReads(TorchDispatchMode):
    """Refuse operations that make the host wait for values, which a capture refuses as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in HOST_READS):
            raise RuntimeError(f"{name} reads values on the host")
        indices = args[1] if name.startswith("aten.index.") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise RuntimeError(f"{name} by a mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


class DryCapture:
    """Record by running under `NoHostReads`, and replay by running again; the first replay is that run."""

    def __init__(self) -> None:
        self.runs = self.records = self.replays = 0

    def run(self, function: Callable[[], None]) -> None:
        self.runs += 1
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        with NoHostReads():
            function()
        is_run = True

        def replay() -> None:
            nonlocal is_run
            self.replays += 1
            if not is_run:
                function()
            is_run = False

        return replay


class NoCapture(DryCapture):
    """Never capture."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("this is refused")


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
            if kind == "vision2"
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
    num_shapes = 1 if kind == "vision2" else 2
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
    assert capture.records == 1 + 2 * (1 if kind == "vision2" else 2)
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


def test_recently_used() -> None:
    made: list[str] = []

    def make(key: str) -> Callable[[], str]:
        return lambda: made.append(key) or key

    cache: RecentlyUsed[str] = RecentlyUsed(2)
    for key in "abacab":
        assert cache.get(key, make(key)) == key
    # `c` replaced `b`, which was used before `a`
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_a_function_that_cannot_be_captured_runs_on() -> None:
    calls: list[int] = []
    reasons: list[str] = []
    replayed = Replayed(lambda: calls.append(len(calls)), NoCapture(), reasons.append)
    for _ in range(WARM_UP_RUNS + 3):
        replayed()
    assert len(calls) == WARM_UP_RUNS + 3
    assert reasons == ["this is refused"]


def test_host_reads_are_noticed() -> None:
    """The dry capture would fail on what a real one fails on."""
    x = torch.randn(4)
    for reads in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match=r"on the host|depends on values"), NoHostReads():
            reads()


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
