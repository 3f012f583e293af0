"""The part of every parameter that this process trains, with its fp32 value and its optimizer state.

Whatever trains a module (plain torch, DDP, FSDP2, DeepSpeed at any ZeRO stage), each process holds the fp32 value of
one contiguous range of every flat parameter: all of it, a slice, or nothing. The teacher, the checkpoints and the
export work on these ranges, and do not depend on the stage.

`tests/teacher/test_sharded_teacher.py` compares the ranges with a fresh gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from d2v_fast.distributed.deepspeed_internals import is_linked, is_partitioned, places_of, whole_shape
from d2v_fast.distributed.deepspeed_types import Engine, Place
from d2v_fast.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# prefixes that wrappers add to the names of the module that they wrap
_WRAPPERS = ("module.", "_orig_mod.")


class Shard(NamedTuple):
    """The range of one parameter that this process trains. Every tensor is live.

    Attributes:
        name: Name of the parameter in the bare module.
        shape: Shape of the whole parameter.
        start: First element of the range in the flat parameter.
        master: The values that the optimizer steps, 1-D; fp32 unless the optimizer is configured otherwise.
        stepped: The optimizer's tensor that contains `master`, and its key in `optimizer.state`.
        offset: First element of `master` in that tensor.
        replicated: Whether every process holds this range.
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
        """The name, followed by `@` and the first element unless the range is the whole parameter."""
        return self.name if self.is_whole else f"{self.name}@{self.start}"

    @property
    def is_whole(self) -> bool:
        """Whether the range is the whole parameter."""
        return self.master.numel() == self.shape.numel()

    def state(self, value: Tensor) -> Tensor:
        """Return the same range of a tensor of the shape of `stepped`, such as a moment."""
        return value.view(-1).narrow(0, self.offset, self.master.numel())


def stepped_addresses(shards: Iterable[Shard]) -> list[int]:
    """Return the memory addresses of the optimizer's tensors, to notice when one of them gets other memory."""
    every = [shard.stepped for shard in shards]
    return [x.to_local().data_ptr() if hasattr(x, "to_local") else x.data_ptr() for x in every]


def bare_name(name: str) -> str:
    """Return a parameter's name in the bare module, without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, partitioned or not."""
    return whole_shape(parameter)


def find_shards(parameters: Iterable[tuple[str, nn.Parameter]], engine: Engine | None = None) -> list[Shard]:
    """Return the ranges of the trainable parameters that this process trains, in the order of `parameters`.

    A parameter that requires a gradient but was not given to DeepSpeed's optimizer is not trained.

    Args:
        parameters: Names and parameters, for example `module.named_parameters()`.
        engine: The DeepSpeed engine that trains them; None if the optimizer steps the parameters themselves (plain
            torch, DDP, FSDP2).
    Raises:
        ValueError: The parameters are offloaded to NVMe or sharded over another dimension than the first, or `engine`
            is missing or trains others.
    """
    places = None if engine is None else places_of(engine)
    found: list[Shard] = []
    for name, parameter in _trained(parameters, places):
        if places is not None:
            place = places[id(parameter)]
            if place.length > 0:
                found.append(_placed_shard(name, parameter, place))
            continue
        _require_own(name, parameter)
        shard = _own_shard(name, parameter)
        if shard.master.numel() > 0:
            found.append(shard)
    return found


@torch.no_grad()
def gather_whole(shards: Iterable[Shard], shapes: Mapping[str, torch.Size], world: World) -> dict[str, Tensor]:
    """Gather whole tensors on the device of the first process; every process calls it.

    Returns:
        The tensors in fp32 in the first process, an empty dictionary in the others.
    """
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


def _trained(
    parameters: Iterable[tuple[str, nn.Parameter]], places: Mapping[int, Place] | None
) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that require a gradient and that DeepSpeed's optimizer steps, by their bare names."""
    trainable = [(bare_name(name), parameter) for name, parameter in parameters if parameter.requires_grad]
    if places is None:
        return trainable
    trained = [(name, parameter) for name, parameter in trainable if id(parameter) in places]
    if trainable and not trained:
        raise ValueError(
            f"`engine` must be the one that trains the student, but its optimizer has none of the {len(trainable)} "
            f"parameters (for example {trainable[0][0]})."
        )
    return trained


def _placed_shard(name: str, parameter: nn.Parameter, place: Place) -> Shard:
    if place.is_on_disk:
        raise ValueError(
            '`offload_optimizer.device` must be "cpu" or "none", but is "nvme" instead: '
            f"the fp32 values of {name} are on a disk between steps."
        )
    master = place.stepped.detach().view(-1).narrow(0, place.offset, place.length)
    shape = full_shape(parameter)
    return Shard(name, shape, place.start, master, place.stepped, place.offset, place.is_replicated)


def _require_own(name: str, parameter: nn.Parameter) -> None:
    """Raise a ValueError if ZeRO holds the fp32 value of a parameter, and no engine says where."""
    if is_partitioned(parameter):
        raise ValueError(
            f"`engine` must be the DeepSpeed engine that trains {name}, which ZeRO-3 has partitioned: pass it."
        )
    if is_linked(parameter):
        raise ValueError(
            f"`engine` must be the DeepSpeed engine that trains {name}, whose fp32 value its ZeRO optimizer holds: "
            "pass the engine."
        )


def _own_shard(name: str, parameter: nn.Parameter) -> Shard:
    value, start, replicated = parameter.detach(), 0, True
    if hasattr(value, "to_local"):
        start, replicated = _dtensor_start(name, cast("DTensor", value))
        value = value.to_local()
    if not value.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous, but has strides {value.stride()} instead.")
    return Shard(name, parameter.shape, start, value.view(-1), parameter, 0, replicated)


def _dtensor_start(name: str, value: DTensor) -> tuple[int, bool]:
    """Return the first element of a DTensor's local part in the flat tensor, and whether it is replicated."""
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
