"""Watch student, teacher and optimizer inside a run, and spoil chosen steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.files import faults
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.teacher import Teacher, decay_at

Patch = Callable[[Any, str, Any], None]


class Witness:
    """Assert after every step that exactly the spoiled steps changed nothing and that the teacher is the average.

    Args:
        spoilt: maps a step to what is spoiled and on which rank: a "nan pixel", an "inf pixel", the "gradient" of
            one parameter with a finite loss, one of the "weights", one value of the "teacher".
        patch: replaces attributes: `setattr` in a forked process, `monkeypatch.setattr` elsewhere.
        note: file for one line per step with the digests of student and teacher.
    """

    def __init__(self, spoilt: dict[int, tuple[str, int]], patch: Patch = setattr, note: Path | None = None) -> None:
        self.spoilt, self.note = spoilt, note
        self.rank = int(os.environ.get("RANK", "0"))
        self.step = 0
        self.model: Any = None
        self.teacher: Any = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.before: list[Tensor] = []
        witness = self
        make_model, make_teacher, forward = Data2Vec.__init__, Teacher.__init__, Data2Vec.forward
        make_optimizer = torch.optim.AdamW.__init__

        def model_made(self: Data2Vec, *arguments: Any) -> None:
            make_model(self, *arguments)
            witness.model = self

        def teacher_made(self: Teacher, *arguments: Any, **options: Any) -> None:
            make_teacher(self, *arguments, **options)
            witness.teacher = self

        def optimizer_made(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> None:
            make_optimizer(self, *arguments, **options)
            witness.optimizers.append(self)

        def spoilt_forward(self: Data2Vec, batch: Any, *others: Any) -> Any:
            output = forward(self, witness.begin_step(batch), *others)
            if witness.spoilt.get(witness.step + 1) == ("gradient", witness.rank):
                # the square root has an infinite slope at 0
                weight = self.head.weight[0, 0]
                output = output._replace(loss_sum=output.loss_sum + (weight - weight.detach()).sqrt())
            return output

        patch(Data2Vec, "__init__", model_made)
        patch(Teacher, "__init__", teacher_made)
        patch(torch.optim.AdamW, "__init__", optimizer_made)
        patch(Data2Vec, "forward", spoilt_forward)
        patch(faults, "fault_point", lambda point: witness.end_step() if point == "step" else None)

    def begin_step(self, batch: Any) -> Any:
        """Apply the spoiling of this step, which has one micro-step."""
        kind, rank = self.spoilt.get(self.step + 1, ("", -1))
        if rank == self.rank:
            batch = self._spoil(kind, batch)
        self.before = self.snapshot()
        return batch

    def end_step(self) -> None:
        self.step += 1
        after = self.snapshot()
        student, teacher = self.student(), self.average()
        if self.step in self.spoilt:
            assert same_bits(self.before, after), f"step {self.step} changed something on rank {self.rank}"
        else:
            decay = decay_at(self.teacher.config, self.step)
            for i, (new, mine) in enumerate(zip(teacher, student, strict=True)):
                expected = decay * self.before[i].double() + (1 - decay) * mine.double()
                torch.testing.assert_close(new.double(), expected, rtol=1e-6, atol=1e-7)
            assert not same_bits(self.before[: len(teacher)], teacher), f"step {self.step}: the teacher did not move"
            assert not same_bits(teacher, student), f"step {self.step}: the teacher is a copy of the student"
        if self.note is not None:
            with self.note.open("a") as file:
                file.write(f"{self.step} {digest(student)} {digest(teacher)}\n")

    def average(self) -> list[Tensor]:
        """Return the teacher's parameters, which in fp32 are the average."""
        return [p.detach().clone() for p in self.teacher.module.parameters()]

    def student(self) -> list[Tensor]:
        """Return the student's averaged parameters in the same order."""
        return [p.detach().clone() for p in self.model.student.parameters()]

    def snapshot(self) -> list[Tensor]:
        """Copy everything that a step may change: teacher, student, head, master copies and optimizer moments."""
        values = self.average() + [p.detach().clone() for p in self.model.parameters()]
        for optimizer in self.optimizers:
            values += [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
            for state in optimizer.state.values():
                values += [value.detach().clone() for value in state.values() if isinstance(value, Tensor)]
        return values

    def _spoil(self, kind: str, batch: Any) -> Any:
        if kind in ("nan pixel", "inf pixel"):
            pixels = batch.inputs.clone()
            pixels[-1, 0, 1, 2] = float(kind[:3])
            return replace(batch, inputs=pixels)
        if kind in ("weights", "teacher"):
            module = self.model.student if kind == "weights" else self.teacher.module
            with torch.no_grad():
                module.encoder.blocks[0].mlp.fc1.weight[1, 2] = torch.nan
        return batch


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Return whether two tensors are equal bit for bit, including NaN."""
    return digest(first) == digest(second)


def digest(tensors: list[Tensor]) -> int:
    """Hash shapes and bits."""
    return hash(tuple((x.shape, x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for x in tensors))
