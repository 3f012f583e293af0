"""Where the teacher's module lives when DeepSpeed shards the student, and how it follows the shards.

- Stages 1 and 2: every process runs a whole teacher, whose memory is laid out as ZeRO lays out the student's, so that
  what a process has averaged is one slice of it and a single collective per parameter group exchanges the slices:
  2 bytes per parameter in 16 bits.
- Stage 3: the teacher is partitioned like the student. A process averages its own slices in place and nothing is
  exchanged; the forward pass gathers as that of the student does.

`place` returns, for each of the student's shards, the slice of the teacher's module that belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.distributed.shards import Shard, bare_name, zero12_layout


class Placed(NamedTuple):
    """The teacher's module under DeepSpeed.

    Attributes:
        slices: for every shard of the student the 1-D slice of the module's memory that follows it.
        exchanged: flat tensors of which this process fills the slice of its rank, with the group that holds the rest.
        keep_alive: what must not be collected while the module is used.
    """

    slices: list[Tensor]
    exchanged: list[tuple[Tensor, dist.ProcessGroup]]
    keep_alive: Any = None


def is_sharded(engine: Any) -> bool:
    """Whether a DeepSpeed engine trains with ZeRO: asked of the engine, since a process may hold nothing of the student
    and must still take part in what is exchanged."""
    optimizer = getattr(engine, "optimizer", None)
    return hasattr(optimizer, "round_robin_bit16_offsets") or hasattr(optimizer, "fp32_partitioned_groups_flat")


def place(
    module: nn.Module,
    student: Mapping[str, nn.Parameter],
    shards: Sequence[Shard],
    engine: Any,
    dtype: torch.dtype,
) -> Placed:
    """Give the parameters of a whole module the memory that the student's ZeRO stage asks for.

    Args:
        module: a whole copy of the student, on its device or on the host; changed in place.
        student: the averaged parameters by name.
        shards: of these parameters, see `find_shards`.
        engine: the student's DeepSpeed engine, ZeRO stage 1 to 3.
        dtype: that the teacher computes in.
    Raises:
        ValueError: the module was partitioned in a way that its slices cannot follow the student's.
    """
    if any(hasattr(parameter, "ds_id") for parameter in student.values()):
        return _partitioned(module, shards, engine, dtype)
    return _gathered(module, student, shards, engine.optimizer, dtype)


def _gathered(
    module: nn.Module, student: Mapping[str, nn.Parameter], shards: Sequence[Shard], optimizer: Any, dtype: torch.dtype
) -> Placed:
    module.to(dtype)
    mine = {bare_name(name): parameter for name, parameter in module.named_parameters()}
    layout = zero12_layout(optimizer)
    memories: dict[int, Tensor] = {}
    begins: dict[str, tuple[Tensor, int]] = {}
    for name, parameter in student.items():
        if id(parameter) not in layout:
            # not trained: the copy stays what it is
            continue
        index, offset = layout[id(parameter)]
        if index not in memories:
            flat = optimizer.bit16_groups_flat[index]
            memories[index] = torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
        memory = memories[index]
        place = memory.narrow(0, offset, mine[name].numel()).view(mine[name].shape)
        place.copy_(mine[name].data)
        mine[name].data = place
        begins[name] = (memory, offset)
    # what nobody trains; the copy may have been made on the host
    module.to(next(iter(memories.values())).device)
    groups = [(memory, optimizer.real_dp_process_group[index]) for index, memory in memories.items()]
    exchanged = [(memory, group) for memory, group in groups if dist.get_world_size(group) > 1]
    slices = []
    for shard in shards:
        memory, offset = begins[shard.name]
        slices.append(memory.narrow(0, offset + shard.start, shard.master.numel()))
    return Placed(slices, exchanged)


def exchange(memory: Tensor, group: dist.ProcessGroup) -> Any:
    """Start to fill `memory` with the slices of the other processes; returns what to wait for."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part = memory.numel() // size
    own = memory.narrow(0, rank * part, part)
    if own.device.type == "cpu":
        # gloo does not promise to work in place
        own = own.clone()
    return dist.all_gather_into_tensor(memory, own, group=group, async_op=True)


def _partitioned(module: nn.Module, shards: Sequence[Shard], engine: Any, dtype: torch.dtype) -> Placed:
    keep_alive = None
    # what DeepSpeed leaves on a module that it has given its hooks; the parameters of `zero.Init` alone have none
    if not hasattr(module, "ds_recompute_parameters"):
        keep_alive = _partition(module, engine, dtype)
    mine: dict[str, Any] = {bare_name(name): parameter for name, parameter in module.named_parameters()}
    for name, parameter in mine.items():
        _check_partition(name, parameter, dtype)
    slices = []
    for shard in shards:
        part = mine[shard.name].ds_tensor
        begin = dist.get_rank(mine[shard.name].ds_process_group) * part.ds_numel
        if shard.start != begin or shard.stop != min(begin + part.ds_numel, shard.shape.numel()):
            raise ValueError(
                f"`module` must be partitioned over the same processes as the student, but of {shard.name} this "
                f"process holds {begin} to {begin + part.ds_numel} there and {shard.start} to {shard.stop} in the "
                "student. MiCS is not supported."
            )
        slices.append(part.data.narrow(0, 0, shard.master.numel()))
    # small parameters would be kept whole, and gathered again at every step of an engine that they belong to, too
    for parameter in mine.values():
        parameter.ds_persist = False
    own = {id(parameter) for parameter in mine.values()}
    engine.optimizer.persistent_parameters[:] = [p for p in engine.optimizer.persistent_parameters if id(p) not in own]
    return Placed(slices, [], keep_alive)


def _check_partition(name: str, parameter: Any, dtype: torch.dtype) -> None:
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        raise ValueError(
            "`module` must have one partition of each parameter, but ZeRO++ or MiCS has made a second one of "
            f"{name}, which would go stale. Partition the teacher with `zero_hpz_partition_size` 1."
        )
    if parameter.ds_tensor.final_location is not None:
        raise ValueError(
            f'`module` must be in memory, but {name} is offloaded to NVMe. Use `offload_param.device` "cpu" or "none".'
        )
    if parameter.ds_tensor.dtype != dtype:
        raise ValueError(
            f"`compute_dtype` must be the dtype that `module` was partitioned in, {parameter.ds_tensor.dtype}, "
            f"but is {dtype} instead."
        )


def _partition(module: nn.Module, engine: Any, dtype: torch.dtype) -> Any:
    """Partition a whole module as ZeRO-3 partitions the student, with the hooks that gather it for a forward pass."""
    import deepspeed

    zero = {
        key: value
        for key, value in engine.config.get("zero_optimization", {}).items()
        if key == "offload_param" or key.startswith("stage3_") or key.endswith("_bucket_size")
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {**zero, "stage": 3, "stage3_param_persistence_threshold": 0},
    }
    partitioned, *_ = deepspeed.initialize(model=module, config=settings, dist_init_required=False)
    module.eval()
    return partitioned
