"""A short training whose teacher is compared over processes, stages and precisions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from d2v_fast.config import RunConfig, parse_config
from d2v_fast.data.batch import Batch, Step
from d2v_fast.distributed.shards import gather_whole
from d2v_fast.distributed.world import World
from d2v_fast.masking import block_mask_rows
from d2v_fast.objectives.build import build_model
from d2v_fast.teacher import Teacher
from d2v_fast.training.engine import Engine, make_engine
from d2v_fast.training.step import TrainStep
from tests.helpers.runs import TINY

STEPS, GLOBAL_BATCH = 4, 8


def run_config(changes: dict[str, Any], world_size: int) -> RunConfig:
    raw = copy.deepcopy(TINY)
    changes = dict(changes)
    raw["train_batch_size"] = GLOBAL_BATCH
    raw["d2v"]["model"] |= {"drop_path": 0.0, "attention_dropout": 0.0, "width": 32}
    raw["d2v"]["model"]["gradient_checkpointing"] = changes.pop("gradient_checkpointing", False)
    # a small epsilon makes large steps out of the rounding of tiny gradients
    raw["optimizer"]["params"]["eps"] = 1e-6
    # the decay changes at every step, so that a repeated or missing update shows
    raw["d2v"]["teacher"] = {"decay_start": 0.5, "decay_end": 0.9, "decay_steps": 30}
    return parse_config({**raw, **changes}, world_size)


class Trial:
    """Student, engine and teacher of a configuration, trained on batches that depend on the step only."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        torch.manual_seed(3)
        model = build_model(config.d2v)
        # a position bias that starts at 0 has gradients of its own size only later
        torch.nn.init.normal_(model.student.position_bias.table, std=0.02)
        copied = copy.deepcopy(model.student)
        self.engine: Engine = make_engine(model, config.deepspeed, world, decay_1d=config.d2v.decay_1d)
        self.model = model
        self.teacher = Teacher(
            model.student,
            config.d2v.teacher,
            compute_dtype=self.engine.compute_dtype,
            module=copied,
            engine=self.engine.deepspeed,
        )
        self.train_step = TrainStep(self.engine, self.teacher, world, divisor=config.d2v.model.width, seed=0)

    def step(self, step: int, poison: bool = False) -> bool:
        split = self.config.deepspeed.batch_split(self.world.size)
        pixels = torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        if poison:
            pixels[-1, 0, 0, 0] = torch.nan
        ids = torch.arange(GLOBAL_BATCH)
        rows = torch.from_numpy(block_mask_rows(7, step, ids.numpy(), 4, 9, 2, None, 0.3))
        num_patches = self.config.d2v.model.num_patches
        batches = []
        for micro_step in range(split.accumulation):
            first = (micro_step * self.world.size + self.world.rank) * split.micro_batch
            mine = (rows >= first * num_patches) & (rows < (first + split.micro_batch) * num_patches)
            part = slice(first, first + split.micro_batch)
            batches.append(Batch(pixels[part], rows[mine] - first * num_patches, ids[part]))
        return bool(self.train_step(step, Step(batches, len(rows)), 1e-3).applied)

    def student(self) -> dict[str, Tensor]:
        """Gather the trained values of the encoder on the first process."""
        shapes = {f"student.{name}": shape for name, shape in self.teacher.shapes.items()}
        whole = gather_whole(self.engine.shards(), shapes, self.world)
        return {name.removeprefix("student."): value for name, value in whole.items()}

    def average(self) -> dict[str, Tensor]:
        """Gather the average on the first process."""
        return gather_whole(self.teacher.shards, self.teacher.shapes, self.world)

    def seen(self) -> dict[str, Tensor]:
        """Return the parameters of the teacher's module as a forward pass of this process uses them."""
        module = self.teacher.module
        if not any(hasattr(p, "ds_id") for p in module.parameters()):
            return {name: p.detach().float().clone() for name, p in module.named_parameters()}
        import deepspeed

        found = {}
        for name, p in module.named_parameters():
            with deepspeed.zero.GatheredParameters([p]):
                found[name] = p.detach().float().clone()
        return found


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative difference of a parameter, and the parameter's name."""
    assert found.keys() == expected.keys()
    return max(
        (((found[name] - value).norm() / value.norm().clamp_min(1e-30)).item(), name)
        for name, value in expected.items()
    )
