"""The teacher: an exponential moving average of the student's encoder (arXiv 2202.03555, section 3.2).

The average is always fp32: at decay 0.9999 a bf16 average would lose nearly every update. In fp32 the module that runs
*is* the average. In 16 bits it is a working copy, which the update writes in the same pass.

If the student is sharded (ZeRO, FSDP2), each process averages only the ranges that it trains, from the fp32 values of
the optimizer. Any DeepSpeed engine will do:

    copied = copy.deepcopy(model)                      # before DeepSpeed partitions the model
    engine, *_ = deepspeed.initialize(model=model, ...)
    teacher = Teacher(engine.module, TeacherConfig(...), module=copied, engine=engine)
    ...
    engine.step()
    if engine.was_step_applied():
        teacher.update(step)                           # on every process
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2v_fast import ops
from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.deepspeed_internals import drop_gathered, is_partitioned, zero_stage
from d2v_fast.distributed.deepspeed_start import check_version
from d2v_fast.distributed.deepspeed_types import Engine
from d2v_fast.distributed.shards import Shard, bare_name, find_shards, full_shape, stepped_addresses
from d2v_fast.teacher import zero as zero_teacher

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def decay_at(config: TeacherConfig, step: int) -> float:
    """Return the decay of the update that follows optimizer step `step`, counted from 1.

    It is linear from `decay_start` to `decay_end` over `decay_steps`, then constant (arXiv 2202.03555, section 4).

    Examples:
        >>> config = TeacherConfig(decay_start=0.99, decay_end=0.999, decay_steps=100)
        >>> [round(decay_at(config, step), 4) for step in (0, 50, 100, 1000)]
        [0.99, 0.9945, 0.999, 0.999]
    """
    if step >= config.decay_steps:
        return config.decay_end
    return config.decay_start + (config.decay_end - config.decay_start) * step / config.decay_steps


class Teacher:
    """EMA state of a student module, and the module that computes with it.

    Args:
        student: The module to average, on its device: plain, wrapped by DDP or `torch.compile`, sharded by FSDP2, or
            (a part of) the module of a DeepSpeed engine. Every `update` reads its trained values by reference, so the
            optimizer must change them in place.
        config: The decay schedule.
        compute_dtype: Dtype of the teacher's forward pass: fp32, bf16 or fp16. With FSDP2 it must be fp32, because its
            mixed-precision policy casts.
        module: The teacher's module: a whole copy of the student with its present values, made before
            `deepspeed.initialize`, or a copy that DeepSpeed has partitioned like the student. With FSDP2, a copy that
            is sharded in the same way. With None the student is copied, which neither DeepSpeed nor FSDP2 allows.
        engine: The DeepSpeed engine that trains the student; None without DeepSpeed.
    Raises:
        ValueError: The student has no parameters, no name matches, or it is sharded in an unsupported way.
        RunError: The engine's DeepSpeed is of an unsupported version.

    Attributes:
        last_step: Number of the last optimizer step that was averaged.
        shapes: Shapes of the whole averaged parameters, by name.

    Examples:
        >>> student = torch.nn.Linear(2, 2)
        >>> teacher = Teacher(student, TeacherConfig(decay_start=0.5, decay_end=0.5))
        >>> before = student.bias.detach().clone()
        >>> with torch.no_grad():
        ...     _ = student.bias.add_(1.0)
        >>> teacher.update(1)
        >>> bool(torch.allclose(teacher.module.bias, before + 0.5))
        True
    """

    def __init__(
        self,
        student: nn.Module,
        config: TeacherConfig,
        *,
        compute_dtype: torch.dtype = torch.float32,
        module: nn.Module | None = None,
        engine: Engine | None = None,
    ) -> None:
        if engine is not None:
            check_version()
        self.config = config
        self.last_step = 0
        self._engine = engine
        self._pending: list[dist.Work] = []
        self._exchanged: list[tuple[Tensor, dist.ProcessGroup]] = []
        # their memory is written through other tensors, which autograd does not notice
        self._written_elsewhere: list[nn.Parameter] = []
        self._module = _copy(student, engine) if module is None else module
        self._fsdp = _fsdp_parts(self._module)
        _drop_gathered(self._fsdp)
        self._module.eval().requires_grad_(False)
        self.shapes = {bare_name(name): full_shape(p) for name, p in self._module.named_parameters()}
        self._student, self._sources = student, self._match(student)
        self._check_sharding(student)
        # asked of the engine: a process that holds nothing of the student takes part in the exchange
        if engine is not None and zero_stage(engine) > 0:
            named = {bare_name(name): p for name, p in student.named_parameters()}
            placed = zero_teacher.place(self._module, named, self._sources, engine, compute_dtype)
            slices, self._exchanged, self._kept = placed
            self._written_elsewhere = list(self._module.parameters())
            # an average is on the device of its fp32 values, which offload keeps on the host
            average = [
                place
                if compute_dtype == torch.float32 and place.device == shard.master.device
                else torch.empty_like(shard.master, dtype=torch.float32)
                for place, shard in zip(slices, self._sources, strict=True)
            ]
            self._working = slices
        else:
            average, self._working = self._average_here(compute_dtype)
        self._average = average
        self._prepare()
        self._zero = [parameter for parameter in self._module.parameters() if is_partitioned(parameter)]
        with torch.no_grad():
            # start from the optimizer's values: in 16 bits DeepSpeed rounds them
            for mine, shard in zip(average, self._sources, strict=True):
                mine.copy_(shard.master.view_as(mine))
        self._write_working()

    @property
    def module(self) -> nn.Module:
        """The teacher network, in eval mode, without gradients, in the compute dtype.

        It shares no memory with the student. Its parameters are up to date on every process.
        """
        for pending in self._pending:
            pending.wait()
        self._pending = []
        return self._module

    @property
    def shards(self) -> list[Shard]:
        """The ranges of the average that this process holds. `master` is the live fp32 average."""
        return [
            shard._replace(master=average.view(-1), stepped=average, offset=0)
            for shard, average in zip(self._sources, self._average, strict=True)
        ]

    def follow(self, student: nn.Module) -> None:
        """Average this module from now on. Its parameters are matched by name and shape.

        Raises:
            ValueError: No name matches, or an averaged parameter is missing or has another shape.
        """
        sources = self._match(student)
        if [source[:3] for source in sources] != [source[:3] for source in self._sources]:
            raise ValueError("`student` must be sharded as the one that the teacher was made for, but is not.")
        self._student, self._sources = student, sources
        self._prepare()

    def decay(self, step: int) -> float:
        """Return the decay of the update after optimizer step `step`, counted from 1."""
        return decay_at(self.config, step)

    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Average the student after an optimizer step. Call it once per step, on every process.

        Args:
            step: Number of the step, from 1; the decay depends on it. Skip steps that changed nothing.
            applied: Optional 0-d bool on the student's device. If it is false nothing changes; the host reads it on a
                CPU and does not wait for it on a GPU.
        Raises:
            ValueError: The step was averaged already. A second update would square its decay.
        """
        if applied is not None and applied.device.type == "cpu":
            if not applied:
                return
            applied = None
        decay: float | Tensor = self._next_decay(step)
        if applied is not None:
            decay = _unless_skipped(decay, applied)
            if self._average:
                # with an offloaded optimizer the average is on the host
                decay = decay.to(self._average[0].device)
        self._move(decay)
        self.last_step = step

    def begin_update(self, step: int) -> float:
        """Count an update whose arithmetic `update_captured` makes, and return its decay.

        Args:
            step: See `update`.
        Raises:
            ValueError: See `update`.
        """
        decay = self._next_decay(step)
        self.last_step = step
        return decay

    def _next_decay(self, step: int) -> float:
        if step <= self.last_step:
            raise ValueError(
                f"`step` must exceed the last one averaged ({self.last_step}), but is {step} instead: "
                "one update per optimizer step."
            )
        if stepped_addresses(self._sources) != self._addresses:
            self.follow(self._student)
        return self.decay(step)

    def update_captured(self, decay: Tensor, applied: Tensor) -> None:
        """Average the student by operations on the device alone, which a CUDA graph can capture.

        Args:
            decay: 0-d fp64 on the device, from `begin_update`.
            applied: 0-d bool on the device. If it is false nothing changes.
        """
        self._move(_unless_skipped(decay, applied))

    def _move(self, decay: float | Tensor) -> None:
        # wait for the exchange of the last update before its memory is written again
        _ = self.module
        self._ema(decay)
        self._write_working(exchange_only=self._in_one_pass)

    def refresh(self, step: int) -> None:
        """Update the module after the tensors of `shards` were written from outside.

        Args:
            step: The last optimizer step that these values average.
        """
        self.last_step = step
        self._write_working()

    def state_dict(self) -> dict[str, Any]:
        """Return `{"step": int, "average": {key: fp32 tensor}}` with the live tensors, not copies.

        A key is the name of a parameter, followed by `@` and the first element if the tensor is only a range of the
        flat parameter.
        """
        average = {s.key: a for s, a in zip(self._sources, self._average, strict=True)}
        return {"step": self.last_step, "average": average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict` bit for bit, including the working copy.

        Raises:
            ValueError: Names or shapes differ from this teacher's.
        """
        average, own = state["average"], self.state_dict()["average"]
        differing = sorted(average.keys() ^ own.keys())
        if differing:
            raise ValueError(
                f"The saved teacher is of another model: {', '.join(differing[:5])} is in one of the two only."
            )
        for name, mine in own.items():
            if average[name].shape != mine.shape:
                raise ValueError(
                    f"The saved teacher's {name} must have shape {tuple(mine.shape)}, "
                    f"but has {tuple(average[name].shape)} instead."
                )
        for name, mine in own.items():
            mine.copy_(average[name])
        self.refresh(int(state["step"]))

    def _prepare(self) -> None:
        """Check the tensors of an update, and make its table of addresses."""
        self._addresses = stepped_addresses(self._sources)
        masters = [shard.master.view_as(a) for shard, a in zip(self._sources, self._average, strict=True)]
        self._in_one_pass = all(
            w is not a and w.device == a.device for w, a in zip(self._working, self._average, strict=True)
        )
        working = self._working if self._in_one_pass else None
        self._ema = ops.EmaUpdate(self._average, masters, working=working)

    def _match(self, student: nn.Module) -> list[Shard]:
        """Return the student's shards that this process averages, checked against the teacher's parameters."""
        _drop_gathered(_fsdp_parts(student))
        found = {bare_name(name): p for name, p in student.named_parameters()}
        matched = {name: p for name, p in found.items() if name in self.shapes}
        if not matched:
            raise ValueError(
                f"`student` must hold the averaged parameters, but none of its {len(found)} names "
                f"is one of the teacher's {len(self.shapes)} (for example {next(iter(self.shapes), None)!r})."
            )
        missing = sorted(self.shapes.keys() - matched.keys())
        if missing:
            raise ValueError(f"`student` lacks {len(missing)} averaged parameters: {', '.join(missing[:5])}.")
        for name, p in matched.items():
            if full_shape(p) != self.shapes[name]:
                raise ValueError(
                    f"`student` parameter {name} must have shape {tuple(self.shapes[name])}, "
                    f"but has {tuple(full_shape(p))} instead."
                )
        return find_shards(((name, matched[name]) for name in self.shapes), self._engine)

    def _check_sharding(self, student: nn.Module) -> None:
        """Check that FSDP2 shards student and teacher alike. `zero.place` checks DeepSpeed's partitions."""
        found = {bare_name(name): p for name, p in student.named_parameters()}
        for name, mine in self._module.named_parameters():
            own, other = _placements(mine), _placements(found[bare_name(name)])
            if own != other:
                raise ValueError(
                    f"`module` must be sharded as the student is, but {bare_name(name)} is {own or None} there and "
                    f"{other or None} in the student: call `fully_shard` with the same mesh and layers for both."
                )

    def _average_here(self, compute_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Return averages and working copies of a module that DeepSpeed does not shard."""
        sharded = any(hasattr(p, "to_local") for p in self._module.parameters())
        if sharded and compute_dtype != torch.float32:
            raise ValueError(
                f"`compute_dtype` must be torch.float32 with FSDP2, but is {compute_dtype} instead: "
                "its mixed-precision policy casts in the forward pass."
            )
        self._module.float()
        if self._sources and not sharded:
            # the copy may have been made on the host
            self._module.to(self._sources[0].master.device)
        average = [_local(self._module.get_parameter(name)) for name in self._names()]
        if compute_dtype == torch.float32:
            return average, average
        # the average keeps the fp32 tensors, and the module gets new ones
        self._module.to(compute_dtype)
        return average, [self._module.get_parameter(name).detach() for name in self._names()]

    def _names(self) -> list[str]:
        """Return the names of the averaged parameters in the module, whose wrappers may change them."""
        called = {bare_name(name): name for name, _ in self._module.named_parameters()}
        return [called[shard.name] for shard in self._sources]

    @torch.no_grad()
    def _write_working(self, exchange_only: bool = False) -> None:
        if not exchange_only:
            for working, average in zip(self._working, self._average, strict=True):
                if working is not average:
                    working.copy_(average)
        torch.autograd.graph.increment_version(self._written_elsewhere)
        _drop_gathered(self._fsdp, self._zero)
        self._pending = [zero_teacher.exchange(memory, group) for memory, group in self._exchanged]


def _unless_skipped(decay: float | Tensor, applied: Tensor) -> Tensor:
    # fp64: in fp32, 1 - 0.9999 is off by 1e-4 of itself
    return 1.0 - (1.0 - decay) * applied.double()


def _copy(student: nn.Module, engine: Engine | None) -> nn.Module:
    if engine is not None:
        raise ValueError(
            "`module` must be given together with `engine`: a copy of the student from before `deepspeed.initialize`. "
            "A later copy would share the hooks that the engine leaves in the student."
        )
    if isinstance(student, DistributedDataParallel):
        # a wrapped copy would broadcast its buffers before every forward pass
        student = student.module
    if any(is_partitioned(p) for p in student.parameters()) or _fsdp_parts(student):
        raise ValueError(
            "`module` must be a copy of the student that was made before it was sharded: "
            "`module=copy.deepcopy(model)`, and with FSDP2 sharded in the same way."
        )
    return copy.deepcopy(student)


def _fsdp_parts(module: nn.Module) -> list[Any]:
    # found by their methods: importing FSDP2 takes seconds
    return [part for part in module.modules() if hasattr(part, "reshard") and hasattr(part, "unshard")]


def _drop_gathered(fsdp: Iterable[Any], zero: Iterable[nn.Parameter] = ()) -> None:
    """Drop whole parameters that FSDP2 or ZeRO-3 keeps after a forward pass.

    FSDP2 keeps them for a backward pass that never comes, ZeRO-3 because they are small or soon used again. Later
    forward passes would use them instead of the updated shards.
    """
    for part in fsdp:
        part.reshard()
    drop_gathered(zero)


def _placements(parameter: Tensor) -> tuple[object, ...]:
    """Return the device mesh and the placements of a DTensor; nothing for a plain tensor."""
    if not hasattr(parameter, "placements"):
        return ()
    tensor = cast("DTensor", parameter)
    return tensor.device_mesh, tensor.placements


def _local(parameter: nn.Parameter) -> Tensor:
    """Return the part of a parameter that is in this process."""
    # unlike `.data`, `detach` shares the version counter, so that autograd notices an update within a graph
    value = parameter.detach()
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local
