"""Which part of every parameter this process trains, and where its fp32 value and its optimizer state lie.

Whatever trains a module (plain torch, DDP, FSDP2, DeepSpeed at any ZeRO stage), each process holds the fp32 value of
some contiguous range of every parameter, taken as one flat vector: all of it, a slice, or nothing. The teacher, the
checkpoints and the export work on these ranges, so that none of them knows about stages.

DeepSpeed has no public access to the live fp32 ranges (its accessors copy). What is read here are the structures
behind those accessors; `tests/teacher/test_sharded_teacher.py` compares the result with what a fresh gather returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.distributed.world import World

# what wrappers put in front of the names of the module that they wrap
_WRAPPERS = ("module.", "_orig_mod.")


class Shard(NamedTuple):
    """The range of one parameter that this process trains; every tensor is live.

    Attributes:
        name: of the parameter in the bare module.
        shape: of the whole parameter.
        start: first element of the range in the flat parameter.
        master: what the optimizer steps, 1-D; fp32 unless the optimizer was told to keep it lower.
        stepped: the tensor that the optimizer holds `master` in, and its key in `optimizer.state`.
        offset: where `master` begins in that tensor.
        replicated: every process holds this range.
    """

    name: str
    shape: torch.Size
    start: int
    master: Tensor
    stepped: Tensor
    offset: int
    replicated: bool

    @property
    def stop(self) -> int:
        """One past the last element of the range in the flat parameter."""
        return self.start + self.master.numel()

    @property
    def key(self) -> str:
        """The name, with `@` and the first element where the range is not the whole parameter."""
        return self.name if self.is_whole else f"{self.name}@{self.start}"

    @property
    def is_whole(self) -> bool:
        """True where the range is the parameter."""
        return self.master.numel() == self.shape.numel()

    def state(self, value: Tensor) -> Tensor:
        """The same range of a tensor that the optimizer keeps beside `stepped`, such as a moment."""
        return value.view(-1).narrow(0, self.offset, self.master.numel())


def stepped_addresses(shards: Iterable[Shard]) -> list[int]:
    """Where the optimizer's tensors begin in memory: another list means that one of them has got other memory."""
    every = [shard.stepped for shard in shards]
    return [x.to_local().data_ptr() if hasattr(x, "to_local") else x.data_ptr() for x in every]


def bare_name(name: str) -> str:
    """A parameter's name in the bare module, whatever wraps it."""
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, partitioned or not."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def find_shards(parameters: Iterable[tuple[str, nn.Parameter]], engine: Any = None) -> list[Shard]:
    """The ranges of the trainable parameters that this process trains, in the order of `parameters`. A parameter that
    requires a gradient and was not given to DeepSpeed's optimizer is not trained.

    Args:
        parameters: names and parameters, for example `module.named_parameters()`.
        engine: the DeepSpeed engine that trains them; None where the parameters themselves are trained (plain torch,
            DDP, FSDP2).
    Raises:
        ValueError: the parameters are kept in a way that is not supported (offloaded to NVMe, sharded over
            another dimension than the first), or `engine` is missing or trains others.
    """
    optimizer = None if engine is None else engine.optimizer
    separate = _separate_masters(optimizer)
    layout: dict[int, tuple[int, int]] | None = None
    found: list[Shard] = []
    shard: Shard | None
    for name, parameter in _trained(parameters, optimizer):
        if hasattr(parameter, "ds_id"):
            shard = _zero3_shard(name, parameter, optimizer)
        elif hasattr(parameter, "_hp_mapping"):
            layout = zero12_layout(optimizer) if layout is None else layout
            shard = _zero12_shard(name, parameter, optimizer, layout)
        elif separate is not None:
            shard = _separate_shard(name, parameter, separate)
        else:
            shard = _own_shard(name, parameter)
        if shard is not None and shard.master.numel() > 0:
            found.append(shard)
    return found


@torch.no_grad()
def gather_whole(shards: Iterable[Shard], shapes: Mapping[str, torch.Size], world: World) -> dict[str, Tensor]:
    """Whole tensors in the first process, on its device, out of the ranges of all; nothing in the others. Every process
    calls it. They are put together one after the other."""
    held = {shard.name: shard for shard in shards}
    whole = {}
    for name, shape in shapes.items():
        value = torch.zeros(shape, dtype=torch.float32, device=world.device)
        shard = held.get(name)
        if shard is not None and (world.is_first or not shard.replicated):
            value.view(-1)[shard.start : shard.stop] = shard.master
        world.sum(value)
        if world.is_first:
            whole[name] = value
    return whole


def _trained(parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Any) -> list[tuple[str, nn.Parameter]]:
    """Those that require a gradient and that ZeRO's optimizer steps, by their bare names."""
    trainable = [(bare_name(name), parameter) for name, parameter in parameters if parameter.requires_grad]
    if hasattr(optimizer, "round_robin_bit16_offsets"):
        stepped = set(zero12_layout(optimizer))
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        stepped = {id(parameter) for group in optimizer.fp16_groups for parameter in group}
    else:
        return trainable
    trained = [(name, parameter) for name, parameter in trainable if id(parameter) in stepped]
    if trainable and not trained:
        raise ValueError(
            f"`engine` must be the one that trains the student, but its optimizer has none of the {len(trainable)} "
            f"parameters (for example {trainable[0][0]})."
        )
    return trained


def _zero3_shard(name: str, parameter: Any, optimizer: Any) -> Shard:
    if not hasattr(optimizer, "grad_position"):
        raise ValueError(
            f"`engine` must be the DeepSpeed engine that trains {name}, which ZeRO-3 has partitioned: pass it."
        )
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    if optimizer._swappable_optimizer_subgroup(group):
        raise ValueError(
            '`offload_optimizer.device` must be "cpu" or "none", but is "nvme" instead: '
            f"the fp32 values of {name} are on a disk between steps."
        )
    rank = dist.get_rank(parameter.ds_process_group)
    start = min(rank * padded, parameter.ds_numel)
    count = min(padded, parameter.ds_numel - start)
    stepped = optimizer.fp32_partitioned_groups_flat[group]
    # without ZeRO-3's padding
    master = stepped.detach().narrow(0, offset, count)
    return Shard(name, parameter.ds_shape, start, master, stepped, offset, replicated=False)


def zero12_layout(optimizer: Any) -> dict[int, tuple[int, int]]:
    """Where stages 1 and 2 lay out each parameter, by its id: the index of its group's flat tensor, and the offset.

    DeepSpeed's own record (`_hp_mapping`) is of another order with `round_robin_gradients`.

    Raises:
        ValueError: another optimizer than ZeRO's trains them.
    """
    if not hasattr(optimizer, "round_robin_bit16_offsets"):
        raise ValueError(
            f"`engine` must be the DeepSpeed engine that trains the student, with its ZeRO optimizer, but that is "
            f"{type(optimizer).__name__} instead: pass the engine; bf16 parameters with fp32 gradient accumulation are "
            "not supported in stage 1, use stage 2."
        )
    places = {}
    for index, group in enumerate(optimizer.round_robin_bit16_groups):
        for parameter, offset in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
            places[id(parameter)] = (index, offset)
    return places


def _zero12_shard(name: str, parameter: Any, optimizer: Any, layout: Mapping[int, tuple[int, int]]) -> Shard | None:
    index, offset = layout[id(parameter)]
    stepped = optimizer.single_partition_of_fp32_groups[index]
    begin = dist.get_rank(optimizer.real_dp_process_group[index]) * stepped.numel()
    first, last = max(begin, offset), min(begin + stepped.numel(), offset + parameter.numel())
    if first >= last:
        # all of it belongs to other processes
        return None
    master = stepped.detach().narrow(0, first - begin, last - first)
    return Shard(name, parameter.shape, first - offset, master, stepped, first - begin, replicated=False)


def _separate_masters(optimizer: Any) -> Mapping[int, tuple[Tensor, int]] | None:
    """Where DeepSpeed without ZeRO keeps fp32 values of 16-bit parameters: by id of the parameter, the tensor that is
    stepped and the offset in it; None where nobody keeps any."""
    low = getattr(optimizer, "fp16_groups", None)
    if low is None or hasattr(optimizer, "grad_position"):
        return None
    flat = getattr(optimizer, "fp32_groups_flat", None)
    places: dict[int, tuple[Tensor, int]] = {}
    for index, group in enumerate(low):
        offset = 0
        for position, parameter in enumerate(group):
            if flat is None:
                places[id(parameter)] = (optimizer.fp32_groups[index][position], 0)
            else:
                places[id(parameter)] = (flat[index], offset)
                offset += parameter.numel()
    return places


def _separate_shard(name: str, parameter: nn.Parameter, places: Mapping[int, tuple[Tensor, int]]) -> Shard | None:
    if id(parameter) not in places:
        return None
    stepped, offset = places[id(parameter)]
    master = stepped.detach().view(-1).narrow(0, offset, parameter.numel())
    return Shard(name, parameter.shape, 0, master, stepped, offset, replicated=True)


def _own_shard(name: str, parameter: nn.Parameter) -> Shard:
    value, start, replicated = parameter.detach(), 0, True
    if hasattr(value, "to_local"):
        start, replicated = _dtensor_start(name, value)
        value = value.to_local()
    if not value.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous, but has strides {value.stride()} instead.")
    return Shard(name, parameter.shape, start, value.view(-1), parameter, 0, replicated)


def _dtensor_start(name: str, value: Any) -> tuple[int, bool]:
    """First element of the local part of a DTensor in the flat tensor, and whether everybody holds all of it."""
    sharded = [placement for placement in value.placements if not placement.is_replicate()]
    if not sharded:
        return 0, True
    if len(sharded) > 1 or not sharded[0].is_shard(0):
        raise ValueError(
            f"`{name}` must be sharded over its first dimension, once, but its placements are {value.placements}."
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return int(offset[0]) * (value.numel() // max(1, value.shape[0])), False
