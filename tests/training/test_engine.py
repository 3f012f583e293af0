"""Engines: AdamW against a plain loop, parameter groups, steps that are not finite, saved state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v_fast.cli.train_options import read_config, train_parser
from d2v_fast.config import check_d2v, load_config
from d2v_fast.data import Batch
from d2v_fast.distributed.shards import full_shape, gather_whole
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.objectives.build import build_model
from d2v_fast.training.engine import (
    Engine,
    PlainEngine,
    check_engine_available,
    compute_dtype,
    make_engine,
)
from d2v_fast.training.optimizers import parameter_groups
from tests.helpers.marks import needs_deepspeed
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY_SPEECH, in_processes, tiny_file
from tests.helpers.small_engine import WIDTH, config, network, plain_engine, restore, saved_state


def inputs_of(step: int) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step))


def add_gradient(engine: Engine, inputs: Tensor, num_samples: int = 6, extra_loss: float = 0.0) -> None:
    """Run one micro-step of a step with `num_samples` samples in total."""
    ids = torch.arange(len(inputs))
    output = engine.forward(Batch(inputs, ids, ids), nn.Identity())
    engine.backward(output.loss_sum + extra_loss, num_samples * WIDTH)


def reference_run(steps: int, lr: float, weight_decay: float, max_norm: float) -> nn.Module:
    """AdamW with decoupled weight decay on matrices, written out in fp64."""
    model = network().double()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for step in range(1, steps + 1):
        model.zero_grad()
        inputs = inputs_of(step).double()
        (model(Batch(inputs, inputs, inputs), nn.Identity()).loss_sum / (6 * WIDTH)).backward()
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
    engine = plain_engine(settings, model)
    for step in range(1, 6):
        for part in inputs_of(step).split(6 // accumulation):
            add_gradient(engine, part)
        assert engine.step(1e-2 * step)
    truth = reference_run(5, 1e-2, 0.1, 0.5)
    for (name, p), expected in zip(model.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=2e-5, atol=2e-6, msg=name)


def test_grad_norm_is_before_clipping() -> None:
    for clipping in (0.0, 1e-3):
        model = network()
        engine = plain_engine(config(gradient_clipping=clipping), model)
        add_gradient(engine, inputs_of(0))
        expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        engine.step(1e-3)
        torch.testing.assert_close(engine.grad_norm, expected)


def test_what_decays() -> None:
    model = build_model(config().d2v)
    decayed, kept = parameter_groups(model, 0.05, decay_1d=False)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert decayed_names | kept_names == set(names.values())
    assert {"student.embedding.mask_token", "student.position_bias.table", "head.weight"} <= decayed_names
    assert "student.embedding.cls_token" in kept_names
    assert all(name.endswith("bias") or "norm" in name or "gamma" in name or "cls" in name for name in kept_names)
    assert not any(name.endswith("bias") or "norm" in name or "gamma" in name for name in decayed_names)
    # the same two groups, so that shards and checkpoints do not depend on the key
    matrices, vectors = parameter_groups(model, 0.05, decay_1d=True)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.05, 0.05)
    assert [len(matrices["params"]), len(vectors["params"])] == [len(decayed["params"]), len(kept["params"])]


@pytest.mark.parametrize("decay_1d", [False, True])
def test_decay_of_1d_parameters_is_applied(decay_1d: bool) -> None:
    """With a gradient of zero a step of AdamW multiplies a parameter by 1 - lr * weight_decay and does nothing else."""
    settings = config(optimizer__params={"lr": 1.0, "weight_decay": 0.1}, d2v__decay_1d=decay_1d)
    model = build_model(settings.d2v)
    engine = plain_engine(settings, model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    engine.step(0.5)
    for old, new in zip(before, model.parameters(), strict=True):
        factor = 1 - 0.5 * 0.1 if decay_1d or new.ndim > 1 else 1.0
        torch.testing.assert_close(new.detach(), old * factor)


@pytest.mark.parametrize(
    ("name", "decay_1d"),
    [
        ("vision_base", False),
        ("vision_large", False),
        ("speech_base", True),
        ("speech_large", True),
        ("text_base", True),
        ("text_large", True),
        # these follow no publication, and keep the numbers that the README shows
        ("digits", False),
        ("digits_long", False),
        ("images_small", False),
        ("speech", False),
        ("text", False),
    ],
)
def test_presets_decay_what_the_publication_decays(name: str, decay_1d: bool) -> None:
    raw = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    assert raw["d2v"].get("decay_1d", False) == decay_1d
    # a file that says nothing follows the publication of its modality
    modality = raw["d2v"]["modality"]
    default, _ = check_d2v({"modality": modality})
    assert default is not None
    assert default.decay_1d == (modality != "vision")


@pytest.mark.parametrize("poison", ["nan input", "infinite loss with finite gradients"])
def test_nonfinite_step_changes_nothing(poison: str) -> None:
    model = network()
    engine = plain_engine(config(), model)

    def step(number: int, bad: bool) -> bool:
        inputs = inputs_of(number)
        if bad and poison == "nan input":
            inputs[2, 3] = torch.nan
        add_gradient(engine, inputs, extra_loss=torch.inf if bad and poison != "nan input" else 0.0)
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
    # equal to a run without the bad steps
    other = plain_engine(config())
    for number in (1, 3):
        add_gradient(other, inputs_of(number))
        other.step(1e-2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.model.parameters(), strict=True))


def test_plain_state_is_restored_exactly() -> None:
    first = plain_engine(config())

    def train(engine: PlainEngine, steps: range) -> None:
        for number in steps:
            add_gradient(engine, inputs_of(number))
            engine.step(1e-2)

    train(first, range(3))
    saved = saved_state(first)
    second = plain_engine(config())
    restore(second, saved)
    train(first, range(3, 6))
    train(second, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_compute_dtype() -> None:
    def on_cpu(**changes: Any) -> torch.dtype:
        return compute_dtype(config(**changes).deepspeed, torch.device("cpu"))

    assert on_cpu() == torch.float32
    assert on_cpu(bf16__enabled="auto") == torch.float32
    assert on_cpu(bf16__enabled=True) == torch.bfloat16
    assert on_cpu(fp16__enabled=True, zero_optimization__stage=1) == torch.float16
    assert on_cpu(fp16__enabled=True, bf16__enabled="auto", zero_optimization__stage=1) == torch.float16


def test_bf16_keeps_fp32_parameters() -> None:
    model = network()
    engine = make_engine(model, config(bf16__enabled=True).deepspeed, World("cpu"), decay_1d=False)
    assert isinstance(engine, PlainEngine)
    add_gradient(engine, inputs_of(0))
    assert model.output_dtype == torch.bfloat16
    assert engine.step(1e-2)
    assert all(shard.master.dtype == torch.float32 for shard in engine.shards())


def test_missing_deepspeed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine_available(config().deepspeed, 1)
    with pytest.raises(RunError, match="not installed"):
        check_engine_available(config().deepspeed, 2)
    with pytest.raises(RunError, match="not installed"):
        check_engine_available(config(zero_optimization__stage=1).deepspeed, 1)


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
            # on the first process only
            "decided": world.decide(lambda: {"from": world.rank, "text": "é" * 1000}),
            "failure": failure,
        }

    first, second = in_processes(2, tmp_path, work)
    assert first["sum"] == second["sum"] == [2.0, 1.0]
    assert first["any"] == second["any"] == [True, False]
    assert first["decided"] == second["decided"] == {"from": 0, "text": "é" * 1000}
    assert first["failure"] == "OSError: no room"
    assert second["failure"] == "RunError: no room"


def whole(engine: Any, world: World) -> dict[str, list]:
    """Gather the trained fp32 values on the first process."""
    shapes = {name: full_shape(p) for name, p in engine.model.named_parameters()}
    return {name: value.tolist() for name, value in gather_whole(engine.shards(), shapes, world).items()}


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "accumulation", "bf16"),
    [(0, 1, False), (0, 3, False), (1, 1, False), (2, 3, False), (3, 2, False), (0, 1, True), (2, 1, True)],
)
def test_deepspeed_engine(stage: int, accumulation: int, bf16: bool, tmp_path: Path) -> None:
    """Two processes match one plain process, a NaN on one skips the step on both, and state is restored."""
    settings = {"train_batch_size": 12, "gradient_accumulation_steps": accumulation, "bf16__enabled": bf16}
    settings |= {"zero_optimization__stage": stage}

    def train(engine: Any, world: World, steps: range, bad: int = -1) -> list[bool]:
        applied = []
        for number in steps:
            inputs = torch.cat((inputs_of(number), inputs_of(number + 100)))
            if number == bad:
                # the last sample belongs to the last process
                inputs[-1] = torch.nan
            mine = inputs.chunk(world.size)[world.rank]
            for part in mine.split(12 // world.size // accumulation):
                dtype = torch.float32 if isinstance(engine, PlainEngine) else engine.compute_dtype
                add_gradient(engine, part.to(dtype), num_samples=12)
            applied.append(bool(engine.step(1e-2)))
        return applied

    def deepspeed_engine(world: World) -> Engine:
        return make_engine(network(), config(world_size=2, **settings).deepspeed, world, decay_1d=False)

    def work(world: World, folder: Path) -> Any:
        engine = deepspeed_engine(world)
        applied = train(engine, world, range(4), bad=2)
        saved = saved_state(engine)
        applied += train(engine, world, range(4, 6))
        values = whole(engine, world)
        again = deepspeed_engine(world)
        restore(again, saved)
        train(again, world, range(4, 6))
        return {
            "applied": applied,
            "values": values,
            "again": whole(again, world),
            "norm": engine.grad_norm.item(),
            "signature": engine.signature(),
        }

    first, second = in_processes(2, tmp_path, work)
    assert first["applied"] == second["applied"]
    assert first["applied"] == [True, True, False, True, True, True]
    assert first["again"] == first["values"]
    expected = {"engine": "DeepSpeed", "processes": 2, "zero_stage": stage, "optimizer": "AdamW"}
    assert first["signature"] == {**expected, "compiled_blocks": False, "captured_steps": False}
    if bf16:
        return
    plain = plain_engine(config(**{**settings, "zero_optimization__stage": 0}))
    assert train(plain, World("cpu"), range(6), bad=2) == first["applied"]
    for name, p in plain.model.named_parameters():
        torch.testing.assert_close(p.detach(), torch.tensor(first["values"][name]), rtol=1e-5, atol=1e-6)
    assert first["norm"] == pytest.approx(plain.grad_norm.item(), rel=1e-5)


@pytest.mark.parametrize(("text", "expected"), [(None, False), ("true", True)])
def test_a_run_from_before_decay_1d_keeps_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    content = load_config(tiny_file(tmp_path, TINY_SPEECH)).to_dict()
    assert content["d2v"].pop("decay_1d") is True
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    changes = [] if text is None else ["--set", f"d2v.decay_1d={text}"]
    config = read_config(train_parser().parse_args(["--run", "old", "--resume", *changes]), 1)
    assert config.d2v.decay_1d is expected
