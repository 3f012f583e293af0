"""Compiled blocks: which programs there are, and that they compute what the blocks compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from d2v_fast.data import Batch
from d2v_fast.distributed.world import World
from d2v_fast.models.encoder import Encoder
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.training.compiled_blocks import compile_blocks, reason_not_to_compile
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import in_processes
from tests.helpers.sharded_trial import Trial, run_config, worst
from tests.helpers.static_steps import KINDS, make_trial

MOST_PROGRAMS = 8


@pytest.fixture(autouse=True)
def _forget_programs() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: Data2Vec, teacher: nn.Module, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    loss = model(batch, teacher).loss_sum
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def programs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Let blocks be traced and not compiled, and return the list of their programs."""
    found: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled(block, backend=record, fullgraph=True))
    return found


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_blocks_of_all_depths_share_programs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the depth nor the drop rate of a block makes a program of its own, and nothing breaks the graph."""
    found = programs(monkeypatch)
    model, teacher, batch = make_trial(kind)
    expected = loss_and_gradients(model, teacher, batch)
    compile_blocks(model, teacher)
    encoders = [part for network in (model, teacher) for part in network.modules() if isinstance(part, Encoder)]
    assert len(encoders) == 2
    for _ in range(2):
        actual = loss_and_gradients(model, teacher, batch)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    num_programs = len(found)
    # the second pass compiled nothing
    loss_and_gradients(model, teacher, batch)
    assert len(found) == num_programs <= MOST_PROGRAMS


# slow: a C++ compiler makes some dozens of kernels
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_compute_the_same(kind: str) -> None:
    from torch._inductor import config as inductor_config

    # scalar loops compile several times as fast as vectors
    with inductor_config.patch({"cpp.simdlen": 1}):
        check_compiled_blocks(kind)


def check_compiled_blocks(kind: str) -> None:
    model, teacher, batch = make_trial(kind)
    plain = copy.deepcopy(model), copy.deepcopy(teacher)
    compile_blocks(model, teacher)
    fixed = model.with_fixed_shapes(batch, fixed_counts=True)
    # the blocks of text are those of speech
    for one in (fixed,) if kind == "text" else (batch, fixed):
        expected = loss_and_gradients(*plain, one)
        actual = loss_and_gradients(model, teacher, one)
        for value, other in zip(actual, expected, strict=True):
            error = (value - other).abs().max() / other.abs().max().clamp_min(1e-3)
            assert error < 1e-5


# slow: traces the blocks of student and teacher three times in every process
@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_compiled_blocks_under_zero(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's hooks, buckets and partitions of the optimizer do not notice that the blocks are compiled."""
    compiled = nn.Module.compile
    # everything but the compiler of kernels, which knows nothing of DeepSpeed
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled(block, backend="aot_eager"))

    def work(world: World, folder: Path) -> Any:
        report = {}
        for stage in (0, 1, 2):
            changes = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 4 // world.size}
            students = []
            for compiles in (False, True):
                trial = Trial(run_config(changes, world.size), world)
                if compiles:
                    assert reason_not_to_compile(trial.engine, world.device) is None
                    compile_blocks(trial.model, trial.teacher.module)
                for step in range(1, 4):
                    assert trial.step(step)
                students.append(trial.student())
            report[stage] = worst(*students) if world.is_first else None
        report["traced"] = counters["frames"]["ok"]
        return report

    reports = in_processes(processes, tmp_path, work, timeout_s=850)
    for report in reports:
        # of student and teacher, with and without rows
        assert report["traced"] >= 4
    for stage in ("0", "1", "2"):
        assert reports[0][stage][0] <= 1e-6, reports[0]


def test_what_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Partitioned:
        """An engine with ZeRO stage 3."""

        class deepspeed:
            """DeepSpeed's engine."""

            @staticmethod
            def zero_optimization_stage() -> int:
                """Return the stage."""
                return 3

    engine: Any = Partitioned
    assert "ZeRO stage 3" in str(reason_not_to_compile(engine, torch.device("cuda")))
    Partitioned.deepspeed = None  # type: ignore[assignment,misc]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in str(reason_not_to_compile(engine, torch.device("cuda")))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    from torch._inductor import config as inductor_config

    # undone by its own context: monkeypatch would delete the setting
    with inductor_config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert reason_not_to_compile(engine, torch.device("cpu")) == "there is no C++ compiler"


def test_benchmarks_compile_without_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first program of a process warns then, and a warning is an error."""
    monkeypatch.setattr("torch._dynamo.utils.warn_once_cache", set())
    with torch.compiler.config.patch(force_disable_caches=True):
        compiled = torch.compile(torch.nn.functional.silu, backend="eager")
        assert compiled(torch.zeros(3)).tolist() == [0.0] * 3
