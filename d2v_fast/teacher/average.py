"""The teacher: an exponential moving average of the student's encoder (arXiv 2202.03555, section 3.2).

The average is kept in fp32 whatever the student computes in: at decay 0.9999 a bf16 average would lose nearly every
update. Where the compute dtype is fp32 the module that runs *is* the average; otherwise a working copy in the compute
dtype is written in the same pass.

Where the student is sharded (ZeRO, FSDP2), each process averages the range of every parameter that it trains, from the
fp32 values of the optimizer, and nothing else. It works with anybody's DeepSpeed engine:

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2v_fast import ops
from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.shards import Shard, bare_name, find_shards, full_shape, stepped_addresses
from d2v_fast.teacher import zero as zero_teacher


def decay_at(config: TeacherConfig, step: int) -> float:
    """Decay of the update that follows optimizer step `step`, counted from 1.

    Linear from `decay_start` to `decay_end` over `decay_steps`, then constant (arXiv 2202.03555, section 4).

    Example:
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
            (a part of) the module of a DeepSpeed engine. Its trained values are read at every `update`, by reference:
            an optimizer that changes them in place is seen.
        config: The decay schedule.
        compute_dtype: Dtype that the teacher's forward runs in: fp32, bf16 or fp16. With FSDP2, fp32: its policy
            casts.
        module: What becomes the teacher's module: a whole copy of the student with its present values, made before
            DeepSpeed got hold of it, or one that DeepSpeed has partitioned like the student; with FSDP2, a copy that
            is sharded in the same way. None copies the student here, without DeepSpeed and FSDP2 only.
        engine: The DeepSpeed engine that trains the student; None without DeepSpeed.
    Raises:
        ValueError: The student has no parameters, nothing matches, or it is kept in a way that is not supported.

    Attributes:
        last_step: Number of the last optimizer step that the average followed.
        shapes: Of the averaged parameters, whole, by name.

    Example:
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
        engine: Any = None,
    ) -> None:
        self.config = config
        self.last_step = 0
        self._engine = engine
        self._pending: list[Any] = []
        self._exchanged: list[Any] = []
        # parameters whose memory is written through other tensors, of which autograd knows nothing
        self._written_elsewhere: list[nn.Parameter] = []
        self._module = _copy(student, engine) if module is None else module
        self._fsdp = _fsdp_parts(self._module)
        _drop_gathered(self._fsdp)
        self._module.eval().requires_grad_(False)
        self.shapes = {bare_name(name): full_shape(p) for name, p in self._module.named_parameters()}
        self._student, self._sources = student, self._match(student)
        self._check_sharding(student)
        if zero_teacher.is_sharded(engine):
            named = {bare_name(name): p for name, p in student.named_parameters()}
            placed = zero_teacher.place(self._module, named, self._sources, engine, compute_dtype)
            slices, self._exchanged, self._kept = placed
            self._written_elsewhere = list(self._module.parameters())
            # averages live beside the values that they follow, which offload keeps on the host
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
        self._zero = [parameter for parameter in self._module.parameters() if hasattr(parameter, "ds_status")]
        with torch.no_grad():
            # the start of the average is what the optimizer starts from, which DeepSpeed rounds in 16 bits
            for mine, shard in zip(average, self._sources, strict=True):
                mine.copy_(shard.master.view_as(mine))
        self._write_working()

    @property
    def module(self) -> nn.Module:
        """The teacher network, in eval mode and without gradients, in the compute dtype. It shares no memory with the
        student. Its parameters are up to date on every process."""
        for pending in self._pending:
            pending.wait()
        self._pending = []
        return self._module

    @property
    def shards(self) -> list[Shard]:
        """The ranges of the average that this process holds: `master` is the fp32 average, live."""
        return [
            shard._replace(master=average.view(-1), stepped=average, offset=0)
            for shard, average in zip(self._sources, self._average, strict=True)
        ]

    def follow(self, student: nn.Module) -> None:
        """Read the student's parameters from this module from now on; they are matched by name and shape.

        Raises:
            ValueError: Nothing matches, or a parameter of the average is missing or has another shape.
        """
        sources = self._match(student)
        if [source[:3] for source in sources] != [source[:3] for source in self._sources]:
            raise ValueError("`student` must be sharded as the one that the teacher was made for, but is not.")
        self._student, self._sources = student, sources
        self._prepare()

    def decay(self, step: int) -> float:
        """Decay of the update after optimizer step `step` (from 1)."""
        return decay_at(self.config, step)

    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Follow the student after optimizer step number `step` (from 1); call once per step, on every process.

        Args:
            step: Number of the step, which the schedule is a function of. Steps that changed nothing may be left out.
            applied: Optional 0-d bool on the student's device: where it is false nothing changes, and the host does
                not wait to learn it.
        Raises:
            ValueError: The step was averaged already: a second update would square its decay.
        """
        if step <= self.last_step:
            raise ValueError(
                f"`step` must exceed the last one averaged ({self.last_step}), but is {step} instead: "
                "one update per optimizer step."
            )
        decay: float | Tensor = self.decay(step)
        if applied is not None:
            # fp64: in fp32, 1 - 0.9999 is off by 1e-4 of itself
            decay = 1.0 - (1.0 - decay) * applied.double()
            if self._average:
                # the average of an offloaded optimizer is on the host
                decay = decay.to(self._average[0].device)
        if stepped_addresses(self._sources) != self._addresses:
            self.follow(self._student)
        # what an earlier update sends must have left before its memory is written again
        _ = self.module
        self._ema(decay)
        self.last_step = step
        self._write_working(exchange_only=self._in_one_pass)

    def refresh(self, step: int) -> None:
        """Make the module follow the average again after the tensors of `shards` were written from outside.

        Args:
            step: the last optimizer step that these values followed.
        """
        self.last_step = step
        self._write_working()

    def state_dict(self) -> dict[str, Any]:
        """`{"step": int, "average": {key: fp32 tensor}}`; the tensors are the live ones, not copies. The keys are
        names of parameters, with `@` and the first element where the tensor is a range of the flat parameter."""
        average = {s.key: a for s, a in zip(self._sources, self._average, strict=True)}
        return {"step": self.last_step, "average": average}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit, the working copy included.

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
        """Check and tabulate what an update reads and writes."""
        self._addresses = stepped_addresses(self._sources)
        masters = [shard.master.view_as(a) for shard, a in zip(self._sources, self._average, strict=True)]
        self._in_one_pass = all(
            w is not a and w.device == a.device for w, a in zip(self._working, self._average, strict=True)
        )
        working = self._working if self._in_one_pass else None
        self._ema = ops.EmaUpdate(self._average, masters, working=working)

    def _match(self, student: nn.Module) -> list[Shard]:
        """The student's shards that this process averages, checked against the teacher's parameters."""
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
        """FSDP2 must have cut student and teacher alike; DeepSpeed's partitions are checked where they are placed."""
        found = {bare_name(name): p for name, p in student.named_parameters()}
        for name, mine in self._module.named_parameters():
            own, other = _placements(mine), _placements(found[bare_name(name)])
            if own != other:
                raise ValueError(
                    f"`module` must be sharded as the student is, but {bare_name(name)} is {own} there and {other} in "
                    "the student: call `fully_shard` with the same mesh and layers for both."
                )

    def _average_here(self, compute_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Averages and working copies of a module whose parameters are this process's to hold."""
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
        # the fp32 tensors stay with the average, the module gets new ones
        self._module.to(compute_dtype)
        return average, [self._module.get_parameter(name).detach() for name in self._names()]

    def _names(self) -> list[str]:
        """The averaged parameters as the module calls them."""
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


def _copy(student: nn.Module, engine: Any) -> nn.Module:
    if engine is not None:
        raise ValueError(
            "`module` must be given together with `engine`: a copy of the student from before `deepspeed.initialize`, "
            "which leaves hooks of the engine in it that a later copy would share."
        )
    if isinstance(student, DistributedDataParallel):
        # a wrapped copy would broadcast its buffers before every forward pass
        student = student.module
    if any(hasattr(p, "ds_id") for p in student.parameters()) or _fsdp_parts(student):
        raise ValueError(
            "`module` must be a copy of the student that was made before it was sharded: "
            "`module=copy.deepcopy(model)`, and with FSDP2 sharded in the same way."
        )
    return copy.deepcopy(student)


def _fsdp_parts(module: nn.Module) -> list[Any]:
    # by their methods: to import FSDP2 takes seconds
    return [part for part in module.modules() if hasattr(part, "reshard") and hasattr(part, "unshard")]


def _drop_gathered(fsdp: Iterable[Any], zero: Iterable[Any] = ()) -> None:
    """Drop the whole parameters that FSDP2 keeps after a forward pass for a backward pass that does not come, and those
    that ZeRO-3 keeps because they are small or are soon used again: they would serve later forward passes, whatever
    the shards hold by then."""
    for part in fsdp:
        part.reshard()
    for parameter in zero:
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()


def _placements(parameter: Any) -> Any:
    """How a DTensor is spread over which processes; None for a plain tensor."""
    return (parameter.device_mesh, parameter.placements) if hasattr(parameter, "placements") else None


def _local(parameter: nn.Parameter) -> Tensor:
    """The memory of a parameter that is in this process."""
    # unlike `.data`, it shares the version counter: autograd notices an update within somebody's graph
    value: Any = parameter.detach()
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local
