"""Sizes in elements that the memory of a run is computed from, by how the run is divided among processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from d2v_fast.config import RunConfig
from d2v_fast.config.deepspeed_sections import ZeroConfig
from d2v_fast.memory.step import Arrival, StepMemory
from d2v_fast.objectives.base import Rate
from d2v_fast.objectives.build import build_objective

# one process and plain torch, or a ZeRO stage of DeepSpeed
Layout = Literal["plain", "stage 0", "stage 1", "stage 2", "stage 3"]
_STAGES: tuple[Layout, ...] = ("stage 0", "stage 1", "stage 2", "stage 3")


class Shapes(NamedTuple):
    """Sizes of the trained parameters, in the groups of the optimizer.

    Attributes:
        groups: for each group, the number of elements of every parameter in order.
        averaged: the same for the parameters that the teacher averages.
    """

    groups: tuple[tuple[int, ...], ...]
    averaged: tuple[tuple[int, ...], ...]

    @property
    def trained(self) -> int:
        """P, all elements."""
        return sum(map(sum, self.groups))

    @property
    def teacher(self) -> int:
        """S, the elements that the teacher averages."""
        return sum(map(sum, self.averaged))

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(max(group) for group in self.groups)


def shapes_of(config: RunConfig) -> Shapes:
    """Return the parameter sizes of a configuration without allocating parameters."""
    with torch.device("meta"):
        model = build_objective(config.d2v)
    groups: dict[tuple[Rate, bool], list[int]] = {}
    averaged: dict[tuple[Rate, bool], list[int]] = {}
    rates = model.rates()
    of_teacher = set() if model.teacher_config is None else set(model.averaged.parameters())
    for name, parameter in model.named_parameters():
        index = (rates.get(name, Rate()), parameter.ndim <= 1)
        groups.setdefault(index, []).append(parameter.numel())
        of_average = averaged.setdefault(index, [])
        if parameter in of_teacher:
            of_average.append(parameter.numel())
    order = sorted(groups)
    return Shapes(tuple(tuple(groups[index]) for index in order), tuple(tuple(averaged[index]) for index in order))


@dataclass(frozen=True)
class Sizes:
    """What the formulas of the tables read, in the letters of docs/memory.md.

    Attributes:
        layout: plain torch, or the ZeRO stage.
        zero: the section `zero_optimization`.
        shapes, step: of the model and of one micro-step.
        N: processes.
        b: bytes of an element of the compute dtype.
        fp32: whether that dtype is fp32.
        cpu: whether the device is a CPU, so that device and host share one memory.
        accumulates: whether a step has several micro-steps.
        captured: whether a step is captured in CUDA graphs.
    """

    layout: Layout
    zero: ZeroConfig
    shapes: Shapes
    step: StepMemory
    N: int
    b: int
    fp32: bool
    cpu: bool
    accumulates: bool
    captured: bool = False

    @classmethod
    def of(
        cls, config: RunConfig, processes: int, dtype: torch.dtype, device_type: str, shapes: Shapes, step: StepMemory
    ) -> Sizes:
        """Read the sizes of a run from its configuration; the arguments are those of `predict_from`."""
        zero = config.deepspeed.zero_optimization
        layout = _STAGES[zero.stage] if config.deepspeed.needs_deepspeed(processes) else "plain"
        accumulates = config.deepspeed.batch_split(processes).accumulation > 1
        fp32, cpu = dtype == torch.float32, device_type == "cpu"
        captured = config.reason_not_to_capture(processes, device_type) is None
        return cls(layout, zero, shapes, step, processes, dtype.itemsize, fp32, cpu, accumulates, captured)

    @property
    def P(self) -> int:
        """Trained elements."""
        return self.shapes.trained

    @property
    def S(self) -> int:
        """Elements that the teacher averages."""
        return self.shapes.teacher

    @property
    def low(self) -> int:
        """Bytes per element of a 16-bit copy beside fp32 values: 0 in an fp32 run."""
        return 0 if self.fp32 else self.b

    @property
    def full(self) -> int:
        """Bytes per element of an fp32 copy beside 16-bit values: 0 in an fp32 run."""
        return 0 if self.fp32 else 4

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's shard lives on the host."""
        section = self.zero.offload_optimizer
        return section is not None and section.device == "cpu"

    @property
    def offloads_parameters(self) -> bool:
        """Whether the shards of the parameters live on the host (stage 3)."""
        section = self.zero.offload_param
        return section is not None and section.device == "cpu"

    @property
    def bucket(self) -> int:
        """Elements of a gradient bucket; by default no more than the model has, as `training/engine.py` sets it."""
        given = "reduce_bucket_size" in self.zero.model_fields_set
        return self.zero.reduce_bucket_size if given else min(self.zero.reduce_bucket_size, self.P)

    @property
    def flats(self) -> list[int]:
        """Elements of the flat tensor of each optimizer group: a multiple of 2 N (stages 1 and 2)."""
        unit = 2 * self.N
        return [-(-sum(group) // unit) * unit for group in self.shapes.groups]

    @property
    def shards(self) -> list[int]:
        """Elements that one process trains of each group (stages 1 and 2)."""
        return [flat // self.N for flat in self.flats]

    @property
    def shard(self) -> int:
        """P / N with padding."""
        return self._padded(self.shapes.groups) if self.layout == "stage 3" else sum(self.shards)

    @property
    def averaged(self) -> int:
        """S / N with padding: the largest part of the average that one process holds."""
        if self.layout == "stage 3":
            return self._padded(self.shapes.averaged)
        return sum(min(part, sum(group)) for part, group in zip(self.shards, self.shapes.averaged, strict=True))

    def _padded(self, groups: Sequence[Sequence[int]]) -> int:
        # stage 3 pads each parameter to a multiple of N
        return sum(-(-elements // self.N) for group in groups for elements in group)

    @property
    def touched(self) -> int:
        """Elements of the parameters that overlap a process's shards, at most: ZeRO keeps their gradients whole."""
        touched = [0] * self.N
        for group, shard in zip(self.shapes.groups, self.shards, strict=True):
            begin = 0
            for elements in group:
                for process in range(begin // shard, (begin + elements - 1) // shard + 1):
                    touched[process] += elements
                begin += elements
        return max(touched)

    @property
    def gathered(self) -> int:
        """Elements of parameters that stay gathered between their uses (stage 3)."""
        if self.N == 1 and not self.offloads_parameters:
            return 0
        # half of the reuse distance lies in the forward pass
        reuse = min(self.zero.stage3_max_reuse_distance // 2, self.zero.stage3_max_live_parameters)
        return min(self.P, reuse + self.zero.stage3_prefetch_bucket_size)


def micro_step(s: Sizes, gradients: int) -> int:
    """Return the most bytes of a micro-step whose gradients, `gradients` bytes, stay in the parameters."""
    if s.captured:
        # the gradients have a place of their own
        return working(s)
    if s.accumulates:
        return working(s) + gradients
    return max(s.step.forward, s.step.with_gradients, gradients)


def working(s: Sizes) -> int:
    """Return the most bytes of a micro-step besides completed gradients."""
    return max(s.step.forward, s.step.backward)


def gradients_leave(s: Sizes) -> list[Arrival]:
    """Return the arrivals in buckets of stage 1: after the backward pass, each frees the parameter's gradient."""
    left, arrivals = s.P, []
    for group in s.shapes.groups:
        for elements in group:
            arrivals.append(Arrival(elements, s.b * left, s.b * (left - elements)))
            left -= elements
    return arrivals


def reduction(s: Sizes, arrivals: Sequence[Arrival]) -> int:
    """Return the most bytes while stages 1 and 2 reduce gradients in buckets."""
    contiguous = s.zero.contiguous_gradients or s.offloads_optimizer
    buffers = (2 if s.zero.overlap_comm else 1) if contiguous else 0
    # one process has one slice of a bucket, which is no copy
    copies = 1 if s.N > 1 and s.zero.reduce_scatter else 0
    retained = 0 if s.offloads_optimizer else s.b * s.touched
    return max(exchange(s, arrivals, buffers=buffers, copies=copies, retained=retained))


def exchange(
    s: Sizes, arrivals: Sequence[Arrival], *, buffers: int, copies: int, retained: int = 0, gathered: int = 0
) -> tuple[int, int]:
    """Return the most bytes while gradients arrive, and the most while a full bucket is reduced.

    Args:
        s: sizes of the run.
        arrivals: gradients in the order of the backward pass.
        buffers: flat buffers of one bucket each, allocated at the first arrival. A CPU assigns memory to a page of
            them when it is first written.
        copies: copies of a bucket while it is reduced.
        retained: bytes of gradients that stay from the first reduction on.
        gathered: elements of parameters that stay whole until their gradients have arrived.
    """
    size = s.bucket if buffers else 0
    while_arriving, while_reducing, filled, written, stays, rest = 0, 0, 0, 0, 0, 0

    def buffered() -> int:
        return buffers * (min(written, size) if s.cpu else size)

    def reduce(rest: int) -> int:
        base = rest + s.b * (buffered() + gathered)
        return max(while_reducing, base + stays + s.b * copies * filled, base + retained)

    for arrival in arrivals:
        if filled and filled + arrival.elements > s.bucket:
            while_reducing, filled, stays = reduce(arrival.most), 0, retained
        filled += arrival.elements
        written = max(written, filled)
        while_arriving = max(while_arriving, arrival.most + s.b * (buffered() + gathered) + stays)
        gathered, rest = max(0, gathered - arrival.elements), arrival.rest
    return while_arriving, reduce(rest)


def fetching(s: Sizes) -> int:
    """Return the most bytes of a forward pass of stage 3 while it fetches parameters.

    Parameters that are fetched together arrive in one flat tensor, and each is copied out of it.
    """
    if not s.gathered:
        return 0
    # gloo gathers into memory of its own, from a copy
    copies = 2 + 1 / s.N if s.cpu else 1
    most, fetched = 0.0, 0
    while fetched < s.P:
        now = min(max(s.zero.stage3_prefetch_bucket_size, s.shapes.largest), s.P - fetched)
        # activations pile up as parameters are used
        saved = s.step.saved * fetched / s.P
        stays = max(0, min(fetched, s.gathered - now))
        most = max(most, saved + s.b * (stays + (1 + copies) * now))
        fetched += now
    return int(most)
