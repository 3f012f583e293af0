"""A small network, trained by users' own loops with a teacher beside it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.world import World
from d2v_fast.teacher import Teacher

STEPS = 6


SCHEDULE = TeacherConfig(decay_start=0.5, decay_end=0.9, decay_steps=10)


class Net(nn.Module):
    """A network with odd first dimensions, a single row, a frozen layer and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(7, 13)
        self.frozen = nn.Linear(13, 9).requires_grad_(False)
        self.norm = nn.LayerNorm(9)
        self.last = nn.Linear(9, 1)
        self.register_buffer("index", torch.arange(732))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.frozen(torch.tanh(self.first(x))))))


def trained_names(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.requires_grad]


def adamw(net: nn.Module) -> torch.optim.AdamW:
    # a small epsilon makes large steps out of the rounding of tiny gradients
    return torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=0.01, eps=1e-6)


def inputs(step: int) -> Tensor:
    return torch.randn(8, 7, generator=torch.Generator().manual_seed(step))


def my_inputs(step: int) -> Tensor:
    return inputs(step).chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def train(student: nn.Module, teacher: Teacher, optimizer: torch.optim.Optimizer, world: World) -> list[Tensor]:
    """Train, and return what the teacher's module computes after every step."""
    outputs = []
    for step in range(1, STEPS + 1):
        mine = inputs(step).chunk(world.size)[world.rank]
        with torch.no_grad():
            target = teacher.module(mine)
        loss_of(student(mine) - target).backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(step)
        with torch.no_grad():
            outputs.append(teacher.module(inputs(0)))
    return outputs


def shard_net(net: Net) -> Net:
    """Shard some layers on their own and the rest with the root, as users of FSDP2 do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.first, mesh=mesh)
    fully_shard(net.last, mesh=mesh, reshard_after_forward=False)
    return fully_shard(net, mesh=mesh)


# the default is a buffer of 2 GB
SMALL_BUCKETS = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}


def initialize(model: nn.Module, stage: int, optimizer: torch.optim.Optimizer | None = None, **changes: Any) -> Any:
    """Make a DeepSpeed engine as its users do; with the defaults ZeRO-3 does not partition such small parameters."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **SMALL_BUCKETS},
        **changes,
    }
    if optimizer is None and any(p.requires_grad for p in model.parameters()):
        optimizer = adamw(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def engine_step(engine: Any, x: Tensor) -> bool:
    engine.backward(loss_of(engine(x)))
    engine.step()
    return bool(engine.was_step_applied())


def seen(module: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters that a forward pass of this process uses.

    The copies are made during the pass, because gathering parameters through DeepSpeed would free cached ones."""
    found = {}

    def look(name: str, part: nn.Module) -> None:
        for last, p in part.named_parameters(recurse=False):
            found[f"{name}.{last}"] = p.detach().clone()

    handles = [
        part.register_forward_pre_hook(lambda part, _, name=name: look(name, part))
        for name, part in module.named_modules()
    ]
    with torch.no_grad():
        module(inputs(0))
    for handle in handles:
        handle.remove()
    return found


def student_values(engine: Any, student: nn.Module) -> dict[str, Tensor]:
    """Copy the whole fp32 values as fp64, through DeepSpeed's own accessor."""
    from deepspeed.utils import safe_get_full_fp32_param

    stage = engine.zero_optimization_stage()
    return {
        name: (safe_get_full_fp32_param(p) if stage else p.detach()).double().clone()
        for name, p in student.named_parameters()
        if p.requires_grad
    }


class Truth:
    """The average in fp64, computed from the student's values as DeepSpeed reports them."""

    def __init__(self, engine: Any, student: nn.Module) -> None:
        self.engine, self.student = engine, student
        self.values = self.start = student_values(engine, student)

    def update(self, decay: float) -> None:
        now = student_values(self.engine, self.student)
        self.values = {name: decay * value + (1 - decay) * now[name] for name, value in self.values.items()}

    def problems(self, module: nn.Module) -> list[str]:
        """List the parameters that are wrong in a forward pass of this process, or that never moved."""
        found = seen(module)
        off = [f"{n} is off" for n, v in self.values.items() if (found[n] - v).norm() > 1e-6 * v.norm()]
        return off + [f"{n} is still" for n, v in self.start.items() if (found[n] - v).norm() <= 1e-3 * v.norm()]


class Both(nn.Module):
    """Student and teacher under one engine."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Net(), Net().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)
