"""What a checkpoint holds of a run, and how a run is put back into that state."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import d2v_fast
from d2v_fast.checkpoints import Checkpoints, require_same_tensors
from d2v_fast.config import RunConfig, changed_keys
from d2v_fast.data2vec import Data2Vec
from d2v_fast.engine import Engine
from d2v_fast.teacher import Teacher
from d2v_fast.world import RunError, World


class RunState:
    """Student, teacher, optimizer and counters of a run.

    The order of the data, masks, augmentation, dropout and schedules follow from the seed and the step number.

    Attributes:
        skipped: 0-d int64 on the device, steps that changed nothing because something was not finite.
        streak: the same, of those in a row up to now.
        longest_streak: the longest of these since the start of this process.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        model: Data2Vec,
        teacher: Teacher,
        engine: Engine,
        checkpoints: Checkpoints,
    ) -> None:
        self._config, self._world = config, world
        self._model, self._teacher, self._engine = model, teacher, engine
        self._checkpoints = checkpoints
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self.streak = torch.zeros_like(self.skipped)
        self.longest_streak = torch.zeros_like(self.skipped)

    def follow(self, step: int, applied: Tensor) -> None:
        """Let the teacher follow the student where step number `step` was applied, and count it where it was not.

        A step that was not applied keeps its place in the order of the data and in the schedules, which are
        functions of the step number. On the CPU the flag can be read. On a GPU nothing waits for it: a decay of 1
        leaves the teacher as it is.
        """
        skipped = ~applied
        self.skipped += skipped
        self.streak = (self.streak + 1) * skipped
        self.longest_streak = torch.maximum(self.longest_streak, self.streak)
        if applied.device.type != "cpu":
            self._teacher.update(step, applied)
        elif applied:
            self._teacher.update(step)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`; every process calls it."""
        teacher = self._teacher.state_dict()
        state = {
            "samples": step * self._config.deepspeed.batch_split(self._world.size).global_batch,
            "skipped": int(self.skipped),
            "streak": int(self.streak),
            "teacher_step": teacher["step"],
            "engine": self._engine.signature(),
            "digest": self._config.digest(),
            "config": self._config.to_dict(),
            "conditions": _conditions(self._world.device),
        }
        self._checkpoints.save(
            step,
            state,
            lambda: {"student": self._model.state_dict(), "teacher": teacher["average"]},
            self._engine.save,
        )

    def restore(self, tell: Callable[[str], None]) -> int:
        """Load the newest good checkpoint; returns its step, 0 where nothing has been saved yet.

        Raises:
            RunError: it is of another model, or its optimizer state does not fit this engine.
        """
        checkpoint = self._checkpoints.newest(tell)
        if checkpoint is None:
            tell("nothing has been saved yet: starting from the beginning")
            return 0
        state = checkpoint.state
        self._check_engine(state["engine"])
        student, average = checkpoint.tensors("student"), checkpoint.tensors("teacher")
        require_same_tensors(student, self._model.state_dict(), "student")
        require_same_tensors(average, self._teacher.state_dict()["average"], "teacher")
        if state["engine"]["engine"] == "plain":
            self._model.load_state_dict(student)
        self._engine.load(checkpoint.folder)
        self._teacher.load_state_dict({"step": state["teacher_step"], "average": average})
        self.skipped.fill_(state["skipped"])
        self.streak.fill_(state["streak"])
        self._tell_changes(state, tell)
        tell(f"resumed after step {state['step']}")
        return int(state["step"])

    def _check_engine(self, saved: dict[str, Any]) -> None:
        now = self._engine.signature()
        # without ZeRO every process holds the whole optimizer state
        same_shards = now["world_size"] == saved["world_size"] or saved["zero_stage"] == 0
        if now["engine"] != saved["engine"] or now["zero_stage"] != saved["zero_stage"] or not same_shards:
            raise RunError(
                f"the checkpoint was written by {_engine_name(saved)}, this is {_engine_name(now)}: its optimizer "
                "state does not fit. Resume with the same number of processes and `zero_optimization.stage`."
            )

    def _tell_changes(self, state: dict[str, Any], tell: Callable[[str], None]) -> None:
        if state["digest"] != self._config.digest():
            changes = changed_keys(state["config"], self._config.to_dict())
            relevant = [line for line in changes if not line.startswith(("d2v.run.", "d2v.probe."))]
            tell("the configuration has changed since the checkpoint: " + "; ".join(relevant))
        conditions = changed_keys(state["conditions"], _conditions(self._world.device))
        if conditions:
            tell(f"not the conditions of the checkpoint, the last digits may differ: {'; '.join(conditions)}")


def _conditions(device: torch.device) -> dict[str, Any]:
    """What the last digits of a result depend on."""
    deepspeed = sys.modules.get("deepspeed")
    return {
        "d2v_fast": d2v_fast.__version__,
        "torch": torch.__version__,
        "deepspeed": getattr(deepspeed, "__version__", None),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability(),
    }


def _engine_name(signature: dict[str, Any]) -> str:
    if signature["engine"] == "plain":
        return "plain torch in 1 process"
    return f"DeepSpeed in {signature['world_size']} processes with ZeRO stage {signature['zero_stage']}"
