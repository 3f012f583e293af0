"""Everything of DeepSpeed that is not its documented interface, in one place.

The teacher and the checkpoints need the live fp32 values, for which DeepSpeed has no public access: its accessors copy.
Each class below lists the attributes that are read of one DeepSpeed class. A missing attribute is an error that names
it. Which class to expect follows from the ZeRO stage of the engine, never from the attributes that an object happens to
have.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import ClassVar, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_fast.distributed.deepspeed_start import InternalsError, missing
from d2v_fast.distributed.deepspeed_types import Engine, FlatGroups, Partition, Place

T = TypeVar("T")


class _Located:
    """A class of DeepSpeed whose place is known: `module.name`."""

    path: ClassVar[str]


class _Engine(_Located):
    """`deepspeed.DeepSpeedEngine`."""

    path = "deepspeed.runtime.engine.DeepSpeedEngine"
    # the optimizer that was passed to `deepspeed.initialize`, without DeepSpeed's wrapper
    basic_optimizer: torch.optim.Optimizer
    _config: object


class _Config(_Located):
    """`deepspeed.runtime.config.DeepSpeedConfig`."""

    path = "deepspeed.runtime.config.DeepSpeedConfig"
    # the keys that were given, whether as a dictionary or in a file
    _param_dict: dict[str, object]


class _ZeroOptimizer12(_Located):
    """`DeepSpeedZeroOptimizer`, stages 1 and 2."""

    path = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
    # per group, its parameters in the order of the flat tensor, and the first element of each. `_hp_mapping` of the
    # parameters has another order with `round_robin_gradients`
    round_robin_bit16_groups: list[list[nn.Parameter]]
    round_robin_bit16_offsets: list[list[int]]
    # per group, all parameters in the compute dtype
    bit16_groups_flat: list[Tensor]
    # per group, the fp32 slice that this process steps
    single_partition_of_fp32_groups: list[Tensor]
    # per group, the processes that share it
    real_dp_process_group: list[dist.ProcessGroup]
    # copies the fp32 slices into the parameters, and gathers them
    update_lp_params: Callable[[], None]


class _ZeroOptimizer3(_Located):
    """`DeepSpeedZeroOptimizer_Stage3`."""

    path = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
    # per subgroup, its parameters
    fp16_groups: list[list[nn.Parameter]]
    # per subgroup, the fp32 values of this process
    fp32_partitioned_groups_flat: list[Tensor]
    # by `get_param_id`: subgroup, first element in its fp32 values, and number of elements with padding
    grad_position: dict[int, Sequence[int]]
    get_param_id: Callable[[nn.Parameter], int]
    # whether a subgroup is swapped to NVMe
    _swappable_optimizer_subgroup: Callable[[int], bool]
    # small parameters that every process keeps whole, gathered after every step
    persistent_parameters: list[nn.Parameter]
    # what `step` does after the update
    _partition_all_parameters: Callable[[], None]
    _reassign_or_swap_out_partitioned_parameters: Callable[[int], None]
    invalidate_secondary_tensor: Callable[[], None]


class _Unfused(_Located):
    """`FP16_UnfusedOptimizer`: stage 0 in 16 bits."""

    path = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"
    # per group, the 16-bit parameters of the module, and an fp32 tensor for each
    fp16_groups: list[list[nn.Parameter]]
    fp32_groups: list[list[Tensor]]


class _Fused(_Located):
    """`FP16_Optimizer`: stage 0 in 16 bits, with DeepSpeed's FusedAdam."""

    path = "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer"
    # per group, the 16-bit parameters, and all of them as one flat fp32 tensor
    fp16_groups: list[list[nn.Parameter]]
    fp32_groups_flat: list[Tensor]


class _Parameter3:
    """A parameter that ZeRO-3 has partitioned."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: Tensor
    ds_process_group: dist.ProcessGroup
    # NOT_AVAILABLE where only `ds_tensor` has values, AVAILABLE where the parameter itself is whole
    ds_status: Enum
    # kept whole between passes
    ds_persist: bool
    # a second partition within fewer processes (ZeRO++, MiCS), or None
    ds_secondary_tensor: Tensor | None
    partition: Callable[[], None]
    all_gather: Callable[[Sequence[nn.Parameter]], object]


class _Partition3:
    """`ds_tensor` of a parameter that ZeRO-3 has partitioned."""

    # elements with padding, the same in every process
    ds_numel: int
    # None in memory, else where it is swapped to
    final_location: object


class _CPUAdam(_Located):
    """`DeepSpeedCPUAdam`."""

    path = "deepspeed.ops.adam.DeepSpeedCPUAdam"
    # the C++ module, and the number of this optimizer in it
    ds_opt_adam: ModuleType
    opt_id: int


class _FusedAdam(_Located):
    """`FusedAdam`, whose build for the CPU is the same C++ code."""

    path = "deepspeed.ops.adam.FusedAdam"
    multi_tensor_adam: Callable[..., object]


# state of a loss scaler, by its class in `deepspeed.runtime.fp16.loss_scaler`
SCALERS = {
    "LossScaler": ("cur_scale",),
    "DynamicLossScaler": ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"),
    "LossScaleConfig": ("cur_scale", "cur_iter", "last_overflow_iter"),
}
# marks that DeepSpeed leaves on what it has changed: a parameter whose fp32 value another tensor holds (stages 1 and
# 2), and a module that has hooks which gather its parameters (stage 3)
LINKED, HOOKED = "_hp_mapping", "ds_recompute_parameters"


@contextmanager
def without_compiling(device: torch.device) -> Iterator[None]:
    """Keep DeepSpeed from compiling its shared-memory collective for the CPU, which takes a minute.

    When the first engine is made, DeepSpeed asks a table which of its operations can be compiled. Only that collective
    asks; DeepSpeed's optimizers do not.
    """
    ops = sys.modules["deepspeed.ops"]
    if device.type != "cpu":
        yield
        return
    name = "__compatible_ops__"
    before = vars(ops).get(name)
    setattr(ops, name, defaultdict(bool))
    try:
        yield
    finally:
        if before is None:
            delattr(ops, name)
        else:
            setattr(ops, name, before)


def zero_stage(engine: Engine | None) -> int:
    """Return the ZeRO stage that an engine is configured for; 0 without an engine."""
    return 0 if engine is None else int(engine.zero_optimization_stage())


def given_settings(engine: Engine) -> Mapping[str, object]:
    """Return the configuration that an engine was made with, as it was given."""
    return _described(_described(engine, _Engine)._config, _Config)._param_dict


def stepping_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer that steps the fp32 values, without DeepSpeed's wrapper around it."""
    return _described(engine, _Engine).basic_optimizer


def is_partitioned(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has partitioned a parameter."""
    # without DeepSpeed nothing is
    utils = sys.modules.get("deepspeed.runtime.zero.utils")
    return False if utils is None else bool(utils.is_zero_param(parameter))


def is_linked(parameter: Tensor) -> bool:
    """Return whether stage 1 or 2 holds the fp32 value of a parameter elsewhere."""
    return hasattr(parameter, LINKED)


def has_hooks(module: nn.Module) -> bool:
    """Return whether stage 3 has given a module hooks which gather its parameters."""
    return hasattr(module, HOOKED)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    return _described(parameter, _Parameter3).ds_shape if is_partitioned(parameter) else parameter.shape


def places_of(engine: Engine) -> dict[int, Place] | None:
    """Return where the engine's optimizer holds each parameter, by the parameter's id.

    None if the optimizer steps the parameters of the module themselves.

    Raises:
        ValueError: The optimizer is of a kind that this library does not know.
        InternalsError: An attribute is missing.
    """
    stage = zero_stage(engine)
    if stage in (1, 2):
        return _places12(_zero12(engine))
    if stage == 3:
        return _places3(_zero3(engine))
    masters = _masters0(engine)
    if masters is None:
        return None
    return {
        id(parameter): Place(0, parameter.numel(), stepped, offset, is_replicated=True)
        for parameter, stepped, offset in masters
    }


def flat_groups(engine: Engine) -> FlatGroups:
    """Return how stage 1 or 2 lays out the parameters.

    Raises:
        ValueError: Another optimizer than ZeRO's trains them.
    """
    optimizer = _zero12(engine)
    places: dict[int, tuple[int, int]] = {}
    for index, group in enumerate(optimizer.round_robin_bit16_groups):
        for parameter, offset in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
            if not is_linked(parameter):
                raise InternalsError(missing("a parameter of ZeRO stage 1 or 2", [LINKED]))
            places[id(parameter)] = (index, offset)
    return FlatGroups(
        places,
        optimizer.bit16_groups_flat,
        optimizer.single_partition_of_fp32_groups,
        optimizer.real_dp_process_group,
    )


def partition_of(parameter: nn.Parameter) -> Partition:
    """Return what this process holds of a parameter that ZeRO-3 has partitioned."""
    found = _described(parameter, _Parameter3)
    part = _described(found.ds_tensor, _Partition3)
    start = dist.get_rank(found.ds_process_group) * part.ds_numel
    return Partition(
        found.ds_tensor.data, start, found.ds_secondary_tensor is not None, part.final_location is not None
    )


def keep_partitioned(engine: Engine, parameters: Iterable[nn.Parameter]) -> None:
    """Have no process keep these parameters whole between passes, as ZeRO-3 keeps small ones.

    Args:
        engine: An engine of stage 3 that the parameters may belong to.
    """
    own = set()
    for parameter in parameters:
        _described(parameter, _Parameter3).ds_persist = False
        own.add(id(parameter))
    persistent = _zero3(engine).persistent_parameters
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in own]


def drop_gathered(parameters: Iterable[nn.Parameter]) -> None:
    """Partition again those of ZeRO-3's parameters that are whole at present."""
    for parameter in parameters:
        found = _described(parameter, _Parameter3)
        if found.ds_status.name == "AVAILABLE":
            found.partition()


def require_hooks(module: nn.Module) -> None:
    """Raise an InternalsError if ZeRO-3 has just partitioned a module and has not left its marks there."""
    if not has_hooks(module):
        raise InternalsError(missing("a module of ZeRO-3", [HOOKED]))
    if not all(is_partitioned(parameter) for parameter in module.parameters()):
        raise InternalsError(missing("a parameter of ZeRO-3", ["ds_id"]))


@torch.no_grad()
def write_low_precision(engine: Engine) -> None:
    """Make the parameters of the module follow the fp32 values, as at the end of the engine's `step`."""
    stage = zero_stage(engine)
    if stage in (1, 2):
        _zero12(engine).update_lp_params()
        return
    if stage == 3:
        optimizer = _zero3(engine)
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            first = _described(optimizer.persistent_parameters[0], _Parameter3)
            first.all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
        return
    for low, stepped, offset in _masters0(engine) or []:
        low.copy_(stepped.view(-1).narrow(0, offset, low.numel()).view_as(low))


def loss_scale_state(engine: Engine) -> dict[str, float | int | None]:
    """Return the state of an fp16 engine's loss scaler."""
    scaler, names = _scaler(engine)
    return {name: getattr(scaler, name) for name in names}


def restore_loss_scale(engine: Engine, state: Mapping[str, float | int | None]) -> None:
    """Bring an fp16 engine's loss scaler into a state of `loss_scale_state`; other keys are ignored."""
    scaler, names = _scaler(engine)
    for name in names:
        if name in state:
            setattr(scaler, name, state[name])


def tolerate_smallest_scale(engine: Engine) -> None:
    """Let an fp16 engine skip steps at its smallest loss scale, where DeepSpeed would raise an exception."""
    scaler, names = _scaler(engine)
    if names == SCALERS["DynamicLossScaler"]:
        _require(scaler, ["raise_error_at_min_scale"])
        vars(scaler)["raise_error_at_min_scale"] = False


def cpu_adam_step(optimizer: torch.optim.Optimizer) -> Callable[[int], object] | None:
    """Return a function that makes one step of DeepSpeed's C++ Adam on a single throw-away element.

    It takes the number of the step, and advances the products `beta ** step` that the C++ object keeps for
    `optimizer`. None for other optimizers, which keep no such state.
    """
    group = optimizer.param_groups[0]
    hyper = (0.0, *group["betas"], group["eps"])
    value, grad, exp_avg, exp_avg_sq = (torch.ones(1) for _ in range(4))
    if _is_a(optimizer, _CPUAdam):
        cpu = _described(optimizer, _CPUAdam)
        update, number = cpu.ds_opt_adam.adam_update, cpu.opt_id
        return lambda step: update(number, step, *hyper, 0.0, True, value, grad, exp_avg, exp_avg_sq)
    if _is_a(optimizer, _FusedAdam):
        fused = _described(optimizer, _FusedAdam).multi_tensor_adam
        lists, unused = [[grad], [value], [exp_avg], [exp_avg_sq]], torch.zeros(1, dtype=torch.int)
        return lambda step: fused(1, unused, lists, *hyper, step, 1, 1, 0.0)
    if type(optimizer).__module__.startswith("deepspeed."):
        raise InternalsError(missing(f"the optimizer {type(optimizer).__name__}", ["a known class"]))
    return None


def _zero12(engine: Engine) -> _ZeroOptimizer12:
    optimizer = engine.optimizer
    if not _is_a(optimizer, _ZeroOptimizer12):
        raise ValueError(
            f"`engine` must be a DeepSpeed engine with the ZeRO optimizer of stages 1 and 2, but its optimizer is "
            f"{type(optimizer).__name__} instead: bf16 parameters with fp32 gradient accumulation are not supported "
            "in stage 1, use stage 2."
        )
    return _described(optimizer, _ZeroOptimizer12)


def _zero3(engine: Engine) -> _ZeroOptimizer3:
    optimizer = engine.optimizer
    if not _is_a(optimizer, _ZeroOptimizer3):
        raise ValueError(
            "`engine` must be the DeepSpeed engine that trains the student, but its optimizer is "
            f"{type(optimizer).__name__}: an engine of stage 3 that was made without an optimizer trains nothing."
        )
    return _described(optimizer, _ZeroOptimizer3)


def _masters0(engine: Engine) -> list[tuple[nn.Parameter, Tensor, int]] | None:
    """Return the 16-bit parameters of stage 0, each with the fp32 tensor that is stepped and its first element there.

    None if the optimizer steps the parameters themselves.
    """
    optimizer, found = engine.optimizer, []
    if optimizer is _described(engine, _Engine).basic_optimizer:
        return None
    if _is_a(optimizer, _Unfused):
        unfused = _described(optimizer, _Unfused)
        for parameters, masters in zip(unfused.fp16_groups, unfused.fp32_groups, strict=True):
            found += [(low, high, 0) for low, high in zip(parameters, masters, strict=True)]
        return found
    if _is_a(optimizer, _Fused):
        fused = _described(optimizer, _Fused)
        for parameters, flat in zip(fused.fp16_groups, fused.fp32_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                found.append((parameter, flat, offset))
                offset += parameter.numel()
        return found
    raise ValueError(
        "`engine` must train without ZeRO, or with one of ZeRO's optimizers, but its optimizer is "
        f"{type(optimizer).__name__} instead."
    )


def _places12(optimizer: _ZeroOptimizer12) -> dict[int, Place]:
    places = {}
    for index, group in enumerate(optimizer.round_robin_bit16_groups):
        stepped = optimizer.single_partition_of_fp32_groups[index]
        begin = dist.get_rank(optimizer.real_dp_process_group[index]) * stepped.numel()
        for parameter, offset in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
            first, last = max(begin, offset), min(begin + stepped.numel(), offset + parameter.numel())
            places[id(parameter)] = Place(first - offset, max(0, last - first), stepped, first - begin)
    return places


def _places3(optimizer: _ZeroOptimizer3) -> dict[int, Place]:
    places = {}
    for parameter in (one for group in optimizer.fp16_groups for one in group):
        found = _described(parameter, _Parameter3)
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(dist.get_rank(found.ds_process_group) * padded, found.ds_numel)
        places[id(parameter)] = Place(
            start,
            # without ZeRO-3's padding
            min(padded, found.ds_numel - start),
            optimizer.fp32_partitioned_groups_flat[group],
            offset,
            is_on_disk=optimizer._swappable_optimizer_subgroup(group),
        )
    return places


def _scaler(engine: Engine) -> tuple[object, tuple[str, ...]]:
    """Return the loss scaler of an fp16 engine, and the names of its state."""
    holder, name = engine.optimizer, "loss_scaler" if zero_stage(engine) > 0 else "loss_scale_config"
    _require(holder, [name])
    scaler = getattr(holder, name)
    names = SCALERS.get(type(scaler).__name__)
    if names is None:
        raise InternalsError(missing(f"the loss scaler {type(scaler).__name__}", ["a known class"]))
    _require(scaler, names)
    return scaler, names


def _is_a(value: object, description: type[_Located]) -> bool:
    """Return whether a value is of the DeepSpeed class that is described, without importing anything."""
    module_name, _, name = description.path.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None:
        return False
    _require(module, [name])
    return isinstance(value, getattr(module, name))


def _described(value: object, description: type[T]) -> T:
    """Return `value`, typed as one of the classes above, after checking that it has what is listed there."""
    _require(value, description.__annotations__)
    return cast(T, value)


def _require(value: object, names: Iterable[str]) -> None:
    lacking = [name for name in names if not hasattr(value, name)]
    if lacking:
        raise InternalsError(missing(type(value).__name__, lacking))
