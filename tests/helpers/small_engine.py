"""A small network that every engine can train."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.config import RunConfig, parse_config
from d2v_fast.data import Batch
from d2v_fast.distributed.world import World
from d2v_fast.objectives.data2vec import StepOutput
from d2v_fast.training.engine import (
    PlainEngine,
)
from tests.helpers.runs import TINY

WIDTH = 3


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


class Network(nn.Sequential):
    """Regresses the output of a few layers on 1; without a teacher."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        super().__init__(nn.Linear(5, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, WIDTH))

    def forward(self, batch: Batch, teacher: nn.Module, moments: bool = True) -> StepOutput:
        output = super().forward(batch.inputs)
        self.output_dtype = output.dtype
        loss = (output.float() - 1).square().sum()
        return StepOutput(loss, len(batch.inputs), torch.zeros(4, WIDTH) if moments else None)


def network() -> Network:
    return Network()


def plain_engine(settings: RunConfig, model: nn.Module | None = None) -> PlainEngine:
    model = network() if model is None else model
    return PlainEngine(model, settings.deepspeed, World("cpu"), decay_1d=settings.d2v.decay_1d)


def saved_state(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy everything that a checkpoint would contain."""
    return {f"{kind}/{shard.key}": shard.master.clone() for kind, shard in engine.kept()}, engine.state()


def restore(engine: Any, saved: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, state = saved
    engine.restore(lambda kept: kept.shard.master.copy_(tensors[f"{kept.kind}/{kept.shard.key}"]), state)
