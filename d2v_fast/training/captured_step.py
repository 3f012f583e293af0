"""An optimizer step that is captured and replayed: one graph per shape of a micro-batch, and one for the update.

A graph repeats the same operations on the same places in memory. So each micro-batch is brought into a form whose
shapes repeat (`FixedShapes`) and copied into a graph's buffers; gradients, learning rate and decay have fixed places.
Everything else is as in `TrainStep`: the same seeds, the same order, and no wait for the device.

A captured step and the same functions without a capture compute the same bits, so it does not matter at which step a
run, or its continuation, captures them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from d2v_fast.data import Batch
from d2v_fast.distributed.world import World
from d2v_fast.objectives.base import StepOutput
from d2v_fast.teacher import Teacher
from d2v_fast.training.capture import Capture, RecentlyUsed, Recorder, Replayed
from d2v_fast.training.engine import PlainEngine
from d2v_fast.training.step import TrainStep
from d2v_fast.training.stepclock import StepClock


@runtime_checkable
class FixedShapes(Protocol):
    """An objective whose forward pass can be captured."""

    def shape_varies(self, batch: Batch) -> str | None:
        """Return why a batch has no fixed shape, as the end of a sentence; None if it has one."""

    def with_fixed_shapes(self, batch: Batch, *, fixed_counts: bool) -> Batch:
        """Return a batch on the host in a form whose shapes repeat from batch to batch.

        Args:
            batch: A batch for which `shape_varies` returns None.
            fixed_counts: Whether stochastic depth keeps the same number of samples in every batch.
        """


class CaptureOptions(NamedTuple):
    """How steps are captured.

    Attributes:
        capture: The backend.
        max_shapes: Most shapes of a micro-batch that have a graph.
        fixed_counts: Whether stochastic depth keeps the same number of samples in every batch.
        say: Prints a line.
    """

    capture: Capture
    max_shapes: int
    fixed_counts: bool
    say: Callable[[str], None]


class CapturedStep(TrainStep):
    """Makes optimizer steps that are captured; see `TrainStep`.

    Args:
        engine: Model and optimizer. The model is a `FixedShapes`.
        teacher: The moving average of the model's encoder.
        world: The processes of the run, of which there is one.
        options: How steps are captured.
        divisor, seed, clock: See `TrainStep`. The clock measures the parts in `stepclock.CAPTURED_PARTS`.
    """

    def __init__(
        self,
        engine: PlainEngine,
        teacher: Teacher,
        world: World,
        options: CaptureOptions,
        *,
        divisor: float,
        seed: int,
        clock: StepClock | None = None,
    ) -> None:
        super().__init__(engine, teacher, world, divisor=divisor, seed=seed, clock=clock)
        assert isinstance(engine.model, FixedShapes)
        self._plain_engine, self._objective, self._options = engine, engine.model, options
        self._micro_steps: RecentlyUsed[_MicroStep] = RecentlyUsed(options.max_shapes)
        self._reasons: set[str] = set()
        self._recorder = Recorder(options.capture, self._report)
        self._update = _Update(engine, teacher, self._recorder)

    def place(self, batch: Batch) -> Batch:
        """Leave a batch on the host, where it gets its fixed shapes."""
        return batch

    def add_gradient(
        self, number: int, micro_step: int, batch: Batch, num_rows: int, *, moments: bool = True
    ) -> StepOutput:
        """Run one micro-batch forward and backward; see `TrainStep.add_gradient`. The batch is on the host."""
        reason = self._objective.shape_varies(batch)
        if reason is not None:
            self._report(reason)
            output = super().add_gradient(number, micro_step, super().place(batch), num_rows, moments=moments)
            # a graph of autograd that lives on would add the next gradients on its stream, outside the capture
            return _each(output, Tensor.detach)
        self.begin_micro_step(number, micro_step)
        with self.clock.part("captured micro-steps"):
            fixed = self._objective.with_fixed_shapes(batch, fixed_counts=self._options.fixed_counts)
            shapes = ((name, value.shape, value.dtype) for name, value in _tensors(fixed).items())
            captured = self._micro_steps.get(
                (moments, *shapes), lambda: _MicroStep(self._plain_engine, self.teacher, moments, self._recorder)
            )
            return captured(fixed, self._plain_engine.loss_scale(num_rows * self._divisor), self._world.device)

    def update(self, number: int, lr: float) -> Tensor:
        """Apply the accumulated gradients, and update the teacher; see `TrainStep.update`."""
        with self.clock.part("captured update"):
            return self._update(lr, self.teacher.begin_update(number))

    def _report(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._options.say(f"some steps run without a CUDA graph (`d2v.run.cuda_graph`): {reason}")


class _MicroStep:
    """The forward and backward pass of micro-batches of one shape, on buffers, with or without moments."""

    def __init__(self, engine: PlainEngine, teacher: Teacher, moments: bool, recorder: Recorder) -> None:
        self._engine, self._teacher, self._with_moments = engine, teacher, moments
        self._replayed = Replayed(recorder)
        self._batch: Batch | None = None
        self._scale = torch.zeros((), device=engine.grad_norm.device)
        self._output: StepOutput | None = None

    def __call__(self, batch: Batch, scale: float, device: torch.device) -> StepOutput:
        """Run a batch, which is on the host but for its inputs, with a factor for its loss."""
        given = _tensors(batch)
        if self._batch is None:
            empty: dict[str, Any] = {
                name: torch.empty(value.shape, dtype=value.dtype, device=device) for name, value in given.items()
            }
            self._batch = dataclasses.replace(batch, **empty)
        buffers = _tensors(self._batch)
        for name, value in given.items():
            if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
                value = value.pin_memory()
            buffers[name].copy_(value, non_blocking=True)
        self._scale.fill_(scale)
        self._replayed(self._run)
        assert self._output is not None
        # copied: the next replay writes the same places
        return _each(self._output, Tensor.clone)

    def _run(self) -> None:
        assert self._batch is not None
        output = self._engine.forward(self._batch, self._teacher.module, self._with_moments)
        self._engine.accumulate(output.loss_sum, self._scale)
        if self._output is None:
            # in the first run, which is not captured
            self._output = _each(output, lambda value: torch.empty_like(value.detach()))
        for place, value in zip(self._output, output, strict=True):
            if isinstance(place, Tensor) and isinstance(value, Tensor):
                place.copy_(value.detach())


class _Update:
    """The end of a step, on gradients, learning rate and decay in fixed places."""

    def __init__(self, engine: PlainEngine, teacher: Teacher, recorder: Recorder) -> None:
        self._engine, self._teacher = engine, teacher
        self._replayed = Replayed(recorder)
        self._set_lr = engine.hold_still()
        self._gradients = [p.grad for p in engine.model.parameters() if p.grad is not None]
        device = engine.grad_norm.device
        self._decay = torch.zeros((), dtype=torch.float64, device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._applied = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, lr: float, decay: float) -> Tensor:
        """Update the student with a learning rate and the teacher with a decay; see `TrainStep.update`."""
        self._set_lr(lr)
        self._decay.fill_(decay)
        self._replayed(self._run)
        self._engine.grad_norm = self._grad_norm.clone()
        return self._applied.clone()

    def _run(self) -> None:
        grad_norm, applied = self._engine.apply()
        self._teacher.update_captured(self._decay, applied)
        torch._foreach_zero_(self._gradients)
        self._grad_norm.copy_(grad_norm)
        self._applied.copy_(applied)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch that a forward pass reads, by field."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor) and name != "sample_ids"}


def _each(output: StepOutput, change: Callable[[Tensor], Tensor]) -> StepOutput:
    changed: dict[str, Any] = {n: change(value) for n, value in output._asdict().items() if isinstance(value, Tensor)}
    return output._replace(**changed)
