"""The memory of the teacher's module when DeepSpeed shards the student.

- Stages 1 and 2: every process runs a whole teacher, whose memory has the layout of ZeRO's flat tensors. A process
  averages one slice of each, and one collective per parameter group exchanges the slices: 2 bytes per parameter in 16
  bits.
- Stage 3: the teacher is partitioned like the student. A process averages its own slices in place, and nothing is
  exchanged. The forward pass gathers parameters as the student's does.

`place` returns the slice of the teacher's module that belongs to each of the student's shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.distributed.deepspeed_internals import (
    flat_groups,
    given_settings,
    has_hooks,
    keep_partitioned,
    partition_of,
    require_hooks,
    zero_stage,
)
from d2v_fast.distributed.deepspeed_start import initialize
from d2v_fast.distributed.deepspeed_types import Engine
from d2v_fast.distributed.shards import Shard, bare_name


class Placed(NamedTuple):
    """The teacher's module under DeepSpeed.

    Attributes:
        slices: Per shard of the student, the 1-D slice of the module's memory that averages it.
        exchanged: Flat tensors in which this process fills the slice of its rank, each with the group that fills the
            other slices.
        keep_alive: An engine that must not be collected while the module is used.
    """

    slices: list[Tensor]
    exchanged: list[tuple[Tensor, dist.ProcessGroup]]
    keep_alive: Engine | None = None


def place(
    module: nn.Module,
    student: Mapping[str, nn.Parameter],
    shards: Sequence[Shard],
    engine: Engine,
    dtype: torch.dtype,
) -> Placed:
    """Give the parameters of a whole module the memory layout that the student's ZeRO stage needs.

    Args:
        module: A whole copy of the student, on its device or on the host; changed in place.
        student: The averaged parameters, by name.
        shards: The shards of these parameters, from `find_shards`.
        engine: The student's DeepSpeed engine, of ZeRO stage 1 to 3.
        dtype: Compute dtype of the teacher.
    Raises:
        ValueError: The module is partitioned in another way than the student.
    """
    if zero_stage(engine) == 3:
        return _partitioned(module, shards, engine, dtype)
    return _gathered(module, student, shards, engine, dtype)


def _gathered(
    module: nn.Module, student: Mapping[str, nn.Parameter], shards: Sequence[Shard], engine: Engine, dtype: torch.dtype
) -> Placed:
    module.to(dtype)
    mine = {bare_name(name): parameter for name, parameter in module.named_parameters()}
    groups = flat_groups(engine)
    memories: dict[int, Tensor] = {}
    begins: dict[str, tuple[Tensor, int]] = {}
    for name, parameter in student.items():
        if id(parameter) not in groups.places:
            # not trained, so the copy keeps its values
            continue
        index, offset = groups.places[id(parameter)]
        if index not in memories:
            flat = groups.flat[index]
            memories[index] = torch.zeros(flat.numel(), dtype=dtype, device=flat.device)
        memory = memories[index]
        place = memory.narrow(0, offset, mine[name].numel()).view(mine[name].shape)
        place.copy_(mine[name].data)
        mine[name].data = place
        begins[name] = (memory, offset)
    # parameters that are not trained may still be on the host
    module.to(next(iter(memories.values())).device)
    shared = [(memory, groups.processes[index]) for index, memory in memories.items()]
    exchanged = [(memory, group) for memory, group in shared if dist.get_world_size(group) > 1]
    slices = []
    for shard in shards:
        memory, offset = begins[shard.name]
        slices.append(memory.narrow(0, offset + shard.start, shard.master.numel()))
    return Placed(slices, exchanged)


def exchange(memory: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to fill `memory` with the slices of the other processes; return the pending collective."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part = memory.numel() // size
    own = memory.narrow(0, rank * part, part)
    if own.device.type == "cpu":
        # gloo does not guarantee that it works in place
        own = own.clone()
    work: dist.Work = dist.all_gather_into_tensor(memory, own, group=group, async_op=True)
    return work


def _partitioned(module: nn.Module, shards: Sequence[Shard], engine: Engine, dtype: torch.dtype) -> Placed:
    # the parameters of `zero.Init` alone have no hooks
    keep_alive = None if has_hooks(module) else _partition(module, engine, dtype)
    mine = {bare_name(name): parameter for name, parameter in module.named_parameters()}
    for name, parameter in mine.items():
        _check_partition(name, parameter, dtype)
    slices = []
    for shard in shards:
        part = partition_of(mine[shard.name])
        end = part.start + part.values.numel()
        if shard.start != part.start or shard.stop != min(end, shard.shape.numel()):
            raise ValueError(
                "`module` must be partitioned over the same processes as the student, but this process holds elements "
                f"{part.start} to {end} of {shard.name} in `module` and {shard.start} to {shard.stop} in the student. "
                "MiCS is not supported."
            )
        slices.append(part.values.narrow(0, 0, shard.master.numel()))
    # a parameter that stays whole would be gathered again at every step of an engine that it belongs to
    keep_partitioned(engine, mine.values())
    return Placed(slices, [], keep_alive)


def _check_partition(name: str, parameter: nn.Parameter, dtype: torch.dtype) -> None:
    part = partition_of(parameter)
    if part.is_copied:
        raise ValueError(
            "`module` must have one partition of each parameter, but ZeRO++ or MiCS has made a second one of "
            f"{name}, which would go stale. Partition the teacher with `zero_hpz_partition_size` 1."
        )
    if part.is_on_disk:
        raise ValueError(
            f'`module` must be in memory, but {name} is offloaded to NVMe. Use `offload_param.device` "cpu" or "none".'
        )
    if part.values.dtype != dtype:
        raise ValueError(
            f"`compute_dtype` must be the dtype that `module` was partitioned in, {part.values.dtype}, "
            f"but is {dtype} instead."
        )


def _partition(module: nn.Module, engine: Engine, dtype: torch.dtype) -> Engine:
    """Partition a whole module as ZeRO-3 partitions the student, with hooks that gather it for a forward pass."""
    section = given_settings(engine).get("zero_optimization")
    given = section if isinstance(section, dict) else {}
    zero = {
        key: value
        for key, value in given.items()
        if key == "offload_param" or key.startswith("stage3_") or key.endswith("_bucket_size")
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {**zero, "stage": 3, "stage3_param_persistence_threshold": 0},
    }
    partitioned = initialize(module, settings)
    require_hooks(module)
    module.eval()
    return partitioned
