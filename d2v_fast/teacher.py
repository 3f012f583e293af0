"""The teacher: an exponential moving average of the student's encoder (arXiv 2202.03555, section 3.2).

The average is kept in fp32 whatever the student computes in: at decay 0.9999 a bf16 average would lose nearly every
update. Where the compute dtype is fp32 the module that runs *is* the average; otherwise a working copy in the compute
dtype is written in the same pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import TeacherConfig

# what wrappers put in front of the names of the module that they wrap
_WRAPPERS = ("module.", "_orig_mod.")


def decay_at(config: TeacherConfig, step: int) -> float:
    """Decay of the update that follows optimizer step `step`, counted from 1.

    Linear from `decay_start` to `decay_end` over `decay_steps`, then constant (arXiv 2202.03555, section 4).
    """
    if step >= config.decay_steps:
        return config.decay_end
    return config.decay_start + (config.decay_end - config.decay_start) * step / config.decay_steps


class Teacher:
    """EMA state of a student module, and the module that computes with it.

    Args:
        student: The module to average, on its device. Its parameters are read at every `update`, by reference: an
            optimizer that changes them in place is seen. Copied once, here.
        config: The decay schedule.
        compute_dtype: Dtype that the teacher's forward runs in: fp32, bf16 or fp16.
    Raises:
        ValueError: The student has no parameters.

    Attributes:
        module: The teacher network, in eval mode and without gradients, in `compute_dtype`. It shares no memory with
            the student.
        last_step: Number of the last optimizer step that the average followed.
    """

    def __init__(
        self, student: nn.Module, config: TeacherConfig, *, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = config
        self.last_step = 0
        self.module = copy.deepcopy(student).eval().requires_grad_(False).float()
        self._average = {name: p.data for name, p in _named(self.module.named_parameters()).items()}
        self._working: list[Tensor] | None = None
        if compute_dtype != torch.float32:
            # the fp32 tensors stay with the average, the module gets new ones
            self.module.to(compute_dtype)
            self._working = [p.data for p in self.module.parameters()]
        self.follow(student)

    def follow(self, student: nn.Module) -> None:
        """Read the student's parameters from this module from now on; they are matched by name and shape.

        Raises:
            ValueError: Nothing matches, or a parameter of the average is missing or has another shape.
        """
        found = _named(student.named_parameters())
        matched = {name: p for name, p in found.items() if name in self._average}
        if not matched:
            raise ValueError(
                f"`student` must hold the averaged parameters, but none of its {len(found)} names "
                f"is one of the teacher's {len(self._average)} (for example {next(iter(self._average), None)!r})."
            )
        missing = sorted(self._average.keys() - matched.keys())
        if missing:
            raise ValueError(f"`student` lacks {len(missing)} averaged parameters: {', '.join(missing[:5])}.")
        for name, p in matched.items():
            if p.shape != self._average[name].shape:
                raise ValueError(
                    f"`student` parameter {name} must have shape {tuple(self._average[name].shape)}, "
                    f"but has {tuple(p.shape)} instead."
                )
        self._student = [matched[name] for name in self._average]

    def decay(self, step: int) -> float:
        """Decay of the update after optimizer step `step` (from 1)."""
        return decay_at(self.config, step)

    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Follow the student after optimizer step number `step` (from 1); call once per step.

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
        ops.ema_update_(list(self._average.values()), self._student, decay, working=self._working)
        self.last_step = step

    def state_dict(self) -> dict[str, Any]:
        """`{"step": int, "average": {name: fp32 tensor}}`; the tensors are the live ones, not copies."""
        return {"step": self.last_step, "average": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, bit for bit, the working copy included.

        Raises:
            ValueError: Names or shapes differ from this teacher's.
        """
        average = state["average"]
        differing = sorted(average.keys() ^ self._average.keys())
        if differing:
            raise ValueError(
                f"The saved teacher is of another model: {', '.join(differing[:5])} is in one of the two only."
            )
        for name, mine in self._average.items():
            if average[name].shape != mine.shape:
                raise ValueError(
                    f"The saved teacher's {name} must have shape {tuple(mine.shape)}, "
                    f"but has {tuple(average[name].shape)} instead."
                )
        for name, mine in self._average.items():
            mine.copy_(average[name])
        for copied, mine in zip(self._working or [], self._average.values(), strict=False):
            copied.copy_(mine)
        self.last_step = int(state["step"])


def _named(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Parameters by the name they have in the bare module, whatever wraps it."""
    named = {}
    for name, parameter in parameters:
        for wrapper in _WRAPPERS:
            name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
        named[name] = parameter
    return named
