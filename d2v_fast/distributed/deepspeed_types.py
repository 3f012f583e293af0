"""What the rest of the library sees of DeepSpeed: the documented part of its engine, and where it keeps parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor, nn


class Engine(Protocol):
    """The documented part of `deepspeed.DeepSpeedEngine` that is used here."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def optimizer(self) -> object: ...
    def __call__(self, *inputs: object) -> Any: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def train(self, mode: bool = True) -> object: ...
    def zero_optimization_stage(self) -> int: ...
    def get_global_grad_norm(self) -> float | Tensor | None: ...
    def was_step_applied(self) -> bool: ...


class Place(NamedTuple):
    """The range of one parameter that this process steps.

    Attributes:
        start: First element of the range in the flat parameter.
        length: Number of elements; 0 where other processes step all of it.
        stepped: Tensor that the optimizer steps and keys its state by.
        offset: First element of the range in `stepped`.
        is_replicated: Whether every process holds the same range.
        is_on_disk: Whether `stepped` is swapped to NVMe between steps.
    """

    start: int
    length: int
    stepped: Tensor
    offset: int
    is_replicated: bool = False
    is_on_disk: bool = False


class FlatGroups(NamedTuple):
    """How stages 1 and 2 lay out the parameters: one flat tensor per optimizer group, cut into one slice per process.

    Attributes:
        places: By id of the parameter, the index of its group and its first element in the group's flat tensor.
        flat: Per group, the flat tensor in the compute dtype.
        masters: Per group, the fp32 slice of this process.
        processes: Per group, the processes that share it.
    """

    places: dict[int, tuple[int, int]]
    flat: Sequence[Tensor]
    masters: Sequence[Tensor]
    processes: Sequence[dist.ProcessGroup]


class Partition(NamedTuple):
    """What this process holds of a parameter that ZeRO-3 has partitioned.

    Attributes:
        values: 1-D, padded to the same length in every process.
        start: First element of `values` in the flat parameter.
        is_copied: Whether ZeRO++ or MiCS keeps a second partition.
        is_on_disk: Whether `values` is swapped to NVMe.
    """

    values: Tensor
    start: int
    is_copied: bool
    is_on_disk: bool
