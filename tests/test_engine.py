"""Engines: AdamW against a plain loop, parameter groups, steps that are not finite, saved state."""

from __future__ import annotations

import copy
import json
import os
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v_fast.config import RunConfig, parse_config
from d2v_fast.data2vec import build_model
from d2v_fast.engine import PlainEngine, _parameter_groups, check_engine_available, compute_dtype, make_engine
from d2v_fast.world import RunError, World
from tests.runs import TINY, fork, free_port, import_deepspeed, wait

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


def config(world_size: int = 1, **changes: Any) -> RunConfig:
    raw = copy.deepcopy(TINY)
    raw["train_batch_size"], raw["gradient_clipping"] = 6, 0.5
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return parse_config(raw, world_size)


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 3))


def batch(step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - 1).square().mean()


def reference_run(steps: int, lr: float, weight_decay: float, max_norm: float) -> nn.Module:
    """AdamW with decoupled weight decay on matrices, written out in fp64."""
    model = network().double()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for step in range(1, steps + 1):
        model.zero_grad()
        (model(batch(step).double()) - 1).square().mean().backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        factor = min(1.0, max_norm / (norm.item() + 1e-6))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad, (first, second) = p.grad * factor, moments[name]
                first.lerp_(grad, 1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                if p.ndim > 1:
                    p.mul_(1 - lr * step * weight_decay)
                corrected = (second / (1 - beta2**step)).sqrt() + eps
                p.sub_(lr * step * (first / (1 - beta1**step)) / corrected)
    return model


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_engine_matches_adamw_in_fp64(accumulation: int) -> None:
    settings = config(gradient_accumulation_steps=accumulation, optimizer__params={"lr": 1.0, "weight_decay": 0.1})
    model = network()
    engine = PlainEngine(model, settings, World("cpu"))
    for step in range(1, 6):
        for part in batch(step).split(6 // accumulation):
            engine.backward(loss_of(engine.forward(part)))
        assert engine.step(1e-2 * step)
    truth = reference_run(5, 1e-2, 0.1, 0.5)
    for (name, p), expected in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=2e-5, atol=2e-6, msg=name)


def test_grad_norm_is_before_clipping() -> None:
    for clipping in (0.0, 1e-3):
        model = network()
        engine = PlainEngine(model, config(gradient_clipping=clipping), World("cpu"))
        engine.backward(loss_of(engine.forward(batch(0))))
        expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        engine.step(1e-3)
        torch.testing.assert_close(engine.grad_norm, expected)


def test_what_decays() -> None:
    model = build_model(config().d2v)
    decayed, kept = _parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert {"student.embedding.mask_token", "student.position_bias.table", "head.weight"} <= decayed_names
    assert "student.embedding.cls_token" in kept_names
    assert all(name.endswith("bias") or "norm" in name or "gamma" in name or "cls" in name for name in kept_names)
    assert not any(name.endswith("bias") or "norm" in name or "gamma" in name for name in decayed_names)


@pytest.mark.parametrize("poison", ["nan input", "infinite loss with finite gradients"])
def test_nonfinite_step_changes_nothing(poison: str) -> None:
    model = network()
    engine = PlainEngine(model, config(), World("cpu"))

    def step(number: int, bad: bool) -> bool:
        inputs = batch(number)
        if bad and poison == "nan input":
            inputs[2, 3] = torch.nan
        loss = loss_of(engine.forward(inputs))
        engine.backward(loss + torch.inf if bad and poison != "nan input" else loss)
        return bool(engine.step(1e-2))

    def snapshot() -> list[Tensor]:
        moments = [v.clone() for state in engine._optimizer.state.values() for v in state.values()]
        return [p.detach().clone() for p in model.parameters()] + moments

    assert not step(0, bad=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    assert step(1, bad=False)
    before = snapshot()
    assert not step(2, bad=True)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(), before, strict=True))
    assert not engine.grad_norm.isfinite()
    assert step(3, bad=False)
    # as if the bad steps had never been
    other = PlainEngine(network(), config(), World("cpu"))
    for number in (1, 3):
        other.backward(loss_of(other.forward(batch(number))))
        other.step(1e-2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.model.parameters(), strict=True))


def test_plain_state_is_restored_exactly(tmp_path: Path) -> None:
    first = PlainEngine(network(), config(), World("cpu"))

    def train(engine: PlainEngine, steps: range) -> None:
        for number in steps:
            engine.backward(loss_of(engine.forward(batch(number))))
            engine.step(1e-2)

    train(first, range(3))
    first.save(tmp_path)
    second = PlainEngine(network(), config(), World("cpu"))
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.load(tmp_path)
    train(first, range(3, 6))
    train(second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_compute_dtype() -> None:
    cpu = torch.device("cpu")
    assert compute_dtype(config(), cpu) == torch.float32
    assert compute_dtype(config(bf16__enabled="auto"), cpu) == torch.float32
    assert compute_dtype(config(bf16__enabled=True), cpu) == torch.bfloat16
    assert compute_dtype(config(fp16__enabled=True, zero_optimization__stage=1), cpu) == torch.float16
    assert (
        compute_dtype(config(fp16__enabled=True, bf16__enabled="auto", zero_optimization__stage=1), cpu)
        == torch.float16
    )


def test_bf16_keeps_fp32_parameters() -> None:
    engine = make_engine(network(), config(bf16__enabled=True), World("cpu"))
    assert isinstance(engine, PlainEngine)
    output = engine.forward(batch(0))
    assert output.dtype == torch.bfloat16
    engine.backward(loss_of(output))
    assert engine.step(1e-2)
    assert all(p.dtype == torch.float32 for _, p in engine.named_master_parameters())


def test_missing_deepspeed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine_available(config(), 1)
    with pytest.raises(RunError, match="not installed"):
        check_engine_available(config(), 2)
    with pytest.raises(RunError, match="not installed"):
        check_engine_available(config(zero_optimization__stage=1), 1)


def test_world_of_one() -> None:
    world = World("cpu")
    assert (world.rank, world.size, world.is_first, str(world.device)) == (0, 1, True, "cpu")
    assert world.any(True)
    assert not world.any(False)
    assert world.decide(lambda: {"a": [1, None]}) == {"a": [1, None]}
    world.close()
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="without a CUDA device"):
            World("cuda")


def in_two_processes(folder: Path, work: Callable[[World, Path], Any]) -> list[Any]:
    """What `work` returns, as JSON, in each of two forked processes."""
    import_deepspeed()
    described = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def child(rank: int) -> int:
        os.environ.update({**described, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        try:
            world = World("cpu")
            (folder / f"{rank}.json").write_text(json.dumps(work(world, folder)))
            world.close()
        except Exception:
            (folder / f"{rank}.json").write_text(json.dumps(traceback.format_exc()))
            return 1
        return 0

    statuses = wait(*(fork(lambda rank=rank: child(rank), folder / f"{rank}.out") for rank in (0, 1)))
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert statuses == [0, 0], results
    return results


def test_two_worlds_agree(tmp_path: Path) -> None:
    def work(world: World, folder: Path) -> Any:
        def fails() -> None:
            raise OSError("no room")

        try:
            world.decide(fails)
        except (OSError, RunError) as error:
            failure = f"{type(error).__name__}: {error}"
        return {
            "sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
            "any": [world.any(world.rank == 1), world.any(False)],
            # of the first process only
            "decided": world.decide(lambda: {"from": world.rank, "text": "é" * 1000}),
            "failure": failure,
        }

    first, second = in_two_processes(tmp_path, work)
    assert first["sum"] == second["sum"] == [2.0, 1.0]
    assert first["any"] == second["any"] == [True, False]
    assert first["decided"] == second["decided"] == {"from": 0, "text": "é" * 1000}
    assert first["failure"] == "OSError: no room"
    assert second["failure"] == "RunError: no room"


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "accumulation", "bf16"),
    [(0, 1, False), (0, 3, False), (1, 1, False), (2, 3, False), (0, 1, True), (2, 1, True)],
)
def test_deepspeed_engine(stage: int, accumulation: int, bf16: bool, tmp_path: Path) -> None:
    """Two processes do what one plain process does; one process's NaN skips the step in both; state is restored."""
    settings = {"train_batch_size": 12, "gradient_accumulation_steps": accumulation, "bf16__enabled": bf16}
    settings |= {"zero_optimization__stage": stage}

    def train(engine: Any, world: World, steps: range, bad: int = -1) -> list[bool]:
        applied = []
        for number in steps:
            inputs = torch.cat((batch(number), batch(number + 100)))
            if number == bad:
                # the last sample, which the last process has
                inputs[-1] = torch.nan
            mine = inputs.chunk(world.size)[world.rank]
            for part in mine.split(12 // world.size // accumulation):
                dtype = torch.float32 if isinstance(engine, PlainEngine) else next(engine.model.parameters()).dtype
                engine.backward(loss_of(engine.forward(part.to(dtype))))
            applied.append(bool(engine.step(1e-2)))
        return applied

    def work(world: World, folder: Path) -> Any:
        engine = make_engine(network(), config(world_size=2, **settings), world)
        applied = train(engine, world, range(4), bad=2)
        (folder / "saved").mkdir(exist_ok=True)
        engine.save(folder / "saved")
        world.barrier()
        applied += train(engine, world, range(4, 6))
        values = [p.tolist() for p in engine.model.parameters()]
        again = make_engine(network(), config(world_size=2, **settings), world)
        again.load(folder / "saved")
        train(again, world, range(4, 6))
        return {
            "applied": applied,
            "values": values,
            "again": [p.tolist() for p in again.model.parameters()],
            "norm": engine.grad_norm.item(),
            "signature": engine.signature(),
        }

    first, second = in_two_processes(tmp_path, work)
    assert first == second
    assert first["applied"] == [True, True, False, True, True, True]
    assert first["again"] == first["values"]
    assert first["signature"] == {"engine": "deepspeed", "world_size": 2, "zero_stage": stage}
    if bf16:
        return
    plain = PlainEngine(network(), config(**{**settings, "zero_optimization__stage": 0}), World("cpu"))
    assert train(plain, World("cpu"), range(6), bad=2) == first["applied"]
    for p, values in zip(plain.model.parameters(), first["values"], strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(values), rtol=1e-5, atol=1e-6)
    assert first["norm"] == pytest.approx(plain.grad_norm.item(), rel=1e-5)


@needs_deepspeed
def test_deepspeed_state_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "marker"),))

    def work(world: World, folder: Path) -> Any:
        engine = make_engine(network(), config(world_size=2, train_batch_size=12, zero_optimization__stage=1), world)
        engine.backward(loss_of(engine.forward(batch(0))))
        engine.step(1e-2)
        (folder / "saved").mkdir(exist_ok=True)
        engine.save(folder / "saved")
        world.barrier()
        files = sorted((folder / "saved" / "deepspeed").glob("*.pt"))
        if world.is_first:
            for file in files:
                torch.save({"evil": Evil()}, file)
        world.barrier()
        try:
            engine.load(folder / "saved")
        except Exception as error:
            return [len(files), "eights" in str(error)]
        return "loaded"

    assert in_two_processes(tmp_path, work) == [[3, True], [3, True]]
    assert not (tmp_path / "marker").exists()
