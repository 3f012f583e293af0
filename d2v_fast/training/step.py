"""One optimizer step: forward and backward passes of its micro-batches, the update, and the teacher."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from d2v_fast.data import Batch, Step
from d2v_fast.distributed.world import World
from d2v_fast.objectives.base import StepOutput
from d2v_fast.teacher import Teacher
from d2v_fast.training.engine import Engine
from d2v_fast.training.stepclock import StepClock


class StepResult(NamedTuple):
    """The results of a step, in tensors on the model's device that need no sync.

    Attributes:
        number: Number of the step, from 1.
        sample_ids: int64 `[B]` per micro-batch of this process.
        num_rows: Rows of the step over all processes, at least 1; see `StepOutput`.
        loss_finite: 0-d bool, whether the loss of every micro-batch of this process was finite.
        applied: 0-d bool, whether the step changed anything: loss and gradient were finite on all processes.
        grad_norm: 0-d, global norm of the gradient before clipping.
        losses: 0-d fp32 per micro-batch of this process, summed over its rows and channels.
        moments: fp32 per micro-batch, see `StepOutput`; empty if they were not asked for.
    """

    number: int
    sample_ids: list[Tensor]
    num_rows: int
    loss_finite: Tensor
    applied: Tensor
    grad_norm: Tensor
    losses: list[Tensor]
    moments: list[Tensor]

    def sums(self) -> Tensor:
        """Return the loss and the flattened moments, summed over the micro-batches: fp32, 1-D.

        Raises:
            ValueError: The step was made without moments.
        """
        first, *others = (
            torch.cat((loss.view(1), moments.flatten()))
            for loss, moments in zip(self.losses, self.moments, strict=True)
        )
        return sum(others, start=first)


class SkipCounts(NamedTuple):
    """Counts of steps that changed nothing because loss or gradient was not finite.

    Attributes:
        skipped: Skipped steps of the whole run.
        streak: Skipped steps in a row up to the last one.
    """

    skipped: int = 0
    streak: int = 0


NO_SKIPS = SkipCounts()


class TrainStep:
    """Makes optimizer steps.

    Args:
        engine: Model and optimizer.
        teacher: The moving average of the model's encoder.
        world: The processes of the run.
        divisor: Divisor of a row's loss, which pre-training sums over channels.
        seed: Seed of dropout.
        clock: Measures the parts of a step; None measures nothing.
        prepare: Changes each micro-batch while it is on the host; None changes nothing.
    """

    def __init__(
        self,
        engine: Engine,
        teacher: Teacher,
        world: World,
        *,
        divisor: float,
        seed: int,
        clock: StepClock | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self.engine, self.teacher = engine, teacher
        self.clock = StepClock(world.device, enabled=False) if clock is None else clock
        self._world, self._divisor, self._seed, self._prepare = world, divisor, seed, prepare

    def __call__(self, number: int, step: Step, lr: float, *, moments: bool = True) -> StepResult:
        """Make a step; every process calls it.

        A step with a non-finite loss or gradient changes nothing. It still counts for the data order and the
        schedules, which depend on the step number.

        Args:
            number: Number of the step, from 1.
            step: Its micro-batches.
            lr: Learning rate.
            moments: Whether to compute the moments, which only the log of a step and its check for a collapse need.
        """
        num_rows = max(1, step.num_rows)
        self.engine.begin_step(number)
        loss_finite = torch.ones((), dtype=torch.bool, device=self._world.device)
        losses: list[Tensor] = []
        sums: list[Tensor] = []
        for micro_step, batch in enumerate(step.micro_batches):
            output = self.add_gradient(number, micro_step, self.place(batch), num_rows, moments=moments)
            losses.append(output.loss_sum.detach())
            if output.moments is not None:
                sums.append(output.moments)
            loss_finite &= losses[-1].isfinite()
        applied = self.update(number, lr)
        return StepResult(
            number=number,
            sample_ids=[batch.sample_ids for batch in step.micro_batches],
            num_rows=num_rows,
            loss_finite=loss_finite,
            applied=applied,
            grad_norm=self.engine.grad_norm,
            losses=losses,
            moments=sums,
        )

    def place(self, batch: Batch) -> Batch:
        """Return a micro-batch of the loader as `add_gradient` expects it: on the model's device."""
        prepared = batch if self._prepare is None else self._prepare(batch)
        return prepared.to(self._world.device, non_blocking=True)

    def add_gradient(
        self, number: int, micro_step: int, batch: Batch, num_rows: int, *, moments: bool = True
    ) -> StepOutput:
        """Run one micro-batch forward and backward.

        Args:
            number: Number of the step, from 1.
            micro_step: Index of the micro-batch in the step, from 0.
            batch: The micro-batch, on the model's device.
            num_rows: Rows of the whole step, over all processes.
            moments: Whether to compute `StepOutput.moments`.
        """
        self.begin_micro_step(number, micro_step)
        output = self.engine.forward(batch, self.teacher.module, moments)
        with self.clock.part("backward"):
            self.engine.backward(output.loss_sum, num_rows * self._divisor)
        return output

    def begin_micro_step(self, number: int, micro_step: int) -> None:
        """Wait for late processes, and seed dropout; see `add_gradient`."""
        self._world.arrive()
        torch.manual_seed(dropout_seed(self._seed, number, micro_step, self._world.rank))

    def update(self, number: int, lr: float) -> Tensor:
        """Apply the accumulated gradients, and update the teacher.

        Returns:
            0-d bool on the model's device: whether the step was applied.
        """
        with self.clock.part("optimizer"):
            applied = self.engine.step(lr)
        with self.clock.part("EMA"):
            self.teacher.update(number, applied)
        return applied


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Return the seed of torch's generator for one forward pass, in [0, 2**63)."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_step, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
