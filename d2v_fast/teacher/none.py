"""The teacher of a run that keeps no average."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from d2v_fast.config import TeacherConfig
from d2v_fast.distributed.shards import Shard
from d2v_fast.teacher.average import Teacher


class NoTeacher(Teacher):
    """Stand in for a `Teacher` where no average is kept: it holds nothing, and its module has no parameters."""

    def __init__(self) -> None:
        self.config = TeacherConfig()
        self.last_step = 0
        self.shapes = {}
        self._nothing = nn.Module().eval()

    @property
    def module(self) -> nn.Module:
        """A module without parameters, which computes nothing."""
        return self._nothing

    @property
    def shards(self) -> list[Shard]:
        """Nothing."""
        return []

    def follow(self, student: nn.Module) -> None:
        """Do nothing."""

    def update(self, step: int, applied: Tensor | None = None) -> None:
        """Count the step."""
        self.last_step = step

    def begin_update(self, step: int) -> float:
        """Count the step; see `Teacher`."""
        self.last_step = step
        return 0.0

    def update_captured(self, decay: Tensor, applied: Tensor) -> None:
        """Do nothing."""

    def refresh(self, step: int) -> None:
        """Count the step."""
        self.last_step = step

    def state_dict(self) -> dict[str, Any]:
        """See `Teacher`."""
        return {"step": self.last_step, "average": {}}
