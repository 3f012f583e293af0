"""Check the counters in a checkpoint's `state.json` against its step and each other.

Size and hash show that a file is what was written, not that it makes sense. A wrong number would otherwise be used: a
step beyond the end of the run counts as finished, and an optimizer step of 1e9 may take long to replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d2v_fast.checkpoints.files import STATE, Checkpoint
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.config.errors import show

_SECTIONS = ("config", "config.d2v", "config.d2v.data", "conditions", "engine")
_PRESENT = ("digest", "vocabulary", "engine.engine", "engine.processes", "engine.zero_stage", "engine.optimizer")
# counters of the fp16 loss scaler
_SCALE_STEPS = ("cur_iter", "last_overflow_iter")
# more than any configuration accepts
_MAX_HYSTERESIS = 10**9


def check_counters(checkpoint: Checkpoint) -> None:
    """Check the counters of a run's checkpoint.

    Args:
        checkpoint: A loaded checkpoint, whose step is that of its folder.
    Raises:
        DamageError: A number is missing, of another type, or contradicts the step or another number.
    """
    state, step = checkpoint.state, checkpoint.step
    for path in _SECTIONS:
        if not isinstance(_at(state, path), dict):
            raise DamageError(f"`{path}` in {STATE} must be a section {{...}}")
    for path in _PRESENT:
        _at(state, path)
    # 0 skipped steps and step 0: a run that begins with imported weights
    _whole(state, "global_batch", 1, 10**18)
    skipped = _whole(state, "skipped", 0, step)
    streak = _whole(state, "streak", 0, skipped)
    # on the CPU the teacher is not updated after a step that changed nothing
    _whole(state, "teacher_step", step - streak, step)
    # some optimizers count steps that changed nothing
    _whole(state, "engine.optimizer_step", step - skipped, step)
    _check_loss_scale(state["engine"].get("loss_scale", {}), step)
    _check_samples(state.get("samples"))


def _check_loss_scale(values: object, step: int) -> None:
    path = "engine.loss_scale"
    if not isinstance(values, dict):
        raise DamageError(f"`{path}` in {STATE} must be a section {{...}}")
    for name, value in values.items():
        if name in _SCALE_STEPS:
            _whole(values, name, -1, step, f"{path}.")
        elif name == "cur_hysteresis":
            _whole(values, name, 0, _MAX_HYSTERESIS, f"{path}.")
        elif name != "cur_scale":
            raise DamageError(f"`{path}` in {STATE} holds {show(name)}, which no loss scale has")
        elif type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise DamageError(f"`{path}.{name}` in {STATE} must be a finite number above 0, but is {show(value)}")


def _check_samples(values: object) -> None:
    if values is None:
        return
    kinds = {"what": str, "number": int, "names": str, "sizes": str}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        raise DamageError(f"`samples` in {STATE} must hold a kind, a number and two digests, or be null")


def _whole(state: Mapping[str, Any], path: str, low: int, high: int, within: str = "") -> int:
    """Return the integer at a path, which must be in [low, high]."""
    value = _at(state, path)
    if type(value) is not int or not low <= value <= high:
        bounds = f"{low:,}" if low == high else f"in [{low:,}, {high:,}]"
        raise DamageError(f"`{within}{path}` in {STATE} must be a whole number {bounds}, but is {show(value)}")
    return value


def _at(state: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path; raise a DamageError if there is none."""
    place: Any = state
    for key in path.split("."):
        if not isinstance(place, dict) or key not in place:
            raise DamageError(f"{STATE} lacks `{path}`")
        place = place[key]
    return place
