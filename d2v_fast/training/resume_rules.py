"""Decide which configuration changes are refused when a run is resumed, and which are reported and applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2v_fast.command_lines import tool_command
from d2v_fast.config import EARLIER_VALUES, DeepSpeedConfig, RunConfig, changed_keys
from d2v_fast.config.errors import Section, show
from d2v_fast.config.model_keys import FREE_MODEL_KEYS

# keys of `d2v` that determine the order of an epoch; samples and global batch are compared in `run_state.py`
_ORDER_KEYS = (("run", "seed"), ("data", "max_batch_seconds"))
# where a run is stored does not affect its results
_PLACES = ("d2v.run.name:", "d2v.run.dir:")


def refused_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return a sentence for every change that prevents resuming, except for changed tensor shapes.

    Args:
        saved: The configuration in a checkpoint of at least one step, as `RunConfig.to_dict` wrote it.
        config: The configuration to resume with.
    """
    before, now = _effective(saved, config)["d2v"], config.to_dict()["d2v"]
    sentences = [
        f"`d2v.{section}.{key}` must be {show(before[section].get(key))} as in the checkpoint, but is "
        f"{show(now[section][key])} instead: the rest of this epoch would have another order, in which some samples "
        "are seen twice and others not at all. Restore the value, or start a new run."
        for section, key in _ORDER_KEYS
        if key in now[section] and before[section].get(key) != now[section][key]
    ]
    return sentences + [
        f"`d2v.model.{key}` must be {show(old)} as in the checkpoint, but is {show(new)} instead: the weights belong "
        "to another model. Restore the value, or start a new run."
        for key, old, new in changed_model(before["model"], now["model"])
    ]


def reported_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return `key: old -> new` for every key whose value, with defaults filled in, differs from the checkpoint's."""
    changes = changed_keys(_effective(saved, config), _complete(config))
    return [line for line in changes if not line.startswith(_PLACES)]


def too_short(made: int, num_steps: int, steps_per_epoch: int, run_folder: Path, saved_steps: Sequence[int]) -> str:
    """Return the error for resuming a run that has made more steps than its schedule has.

    Args:
        made: Steps that the run has made.
        num_steps: Steps of the schedule.
        steps_per_epoch: Steps per pass over the data.
        run_folder: The run's folder.
        saved_steps: Steps of its checkpoints.
    """
    earlier = [step for step in saved_steps if step <= num_steps]
    weights = "There is no checkpoint of an earlier step."
    if earlier:
        weights = f"Weights of an earlier step: `{tool_command('export', run_folder, '--step', max(earlier))}`."
    return (
        f"`d2v.schedule` must have at least the {made:,} steps that the run has made, but has {num_steps:,} steps "
        f"({steps_per_epoch:,} per epoch). Restore it to continue, or end the run here: "
        f"`--set d2v.schedule.steps={made} --set d2v.schedule.epochs=null`. {weights}"
    )


def changed_model(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old and new value of every change of `d2v.model` that makes it another model.

    Args:
        before: The section that the weights are of.
        now: The section of the run.
        prefix: Of the keys, for a section within the section.
    """
    for key, new in now.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_model(old, new, f"{prefix}{key}.")
            continue
        if key.endswith("_ratio") and old is not None:
            # only the product with the width counts
            changed = int(before["width"] * old) != int(now["width"] * new)
        else:
            changed = old != new and f"{prefix}{key}" not in FREE_MODEL_KEYS
        if changed:
            yield f"{prefix}{key}", old, new


def _complete(config: RunConfig) -> dict[str, Any]:
    return {**config.deepspeed.model_dump(mode="json"), "d2v": config.d2v.model_dump(mode="json")}


def _effective(saved: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return a saved configuration with current defaults for missing keys, and without keys that no longer exist."""
    outside = {key: value for key, value in saved.items() if key != "d2v"}
    try:
        deepspeed = DeepSpeedConfig.model_validate(outside).model_dump(mode="json")
    except ValidationError:
        # an earlier version accepted values that this one refuses
        deepspeed = outside
    return {**deepspeed, "d2v": _filled(saved["d2v"], config.d2v, EARLIER_VALUES)}


def _filled(saved: Mapping[str, Any], section: Section, earlier: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        name: earlier.get(name, field.get_default(call_default_factory=True))
        for name, field in type(section).model_fields.items()
    }
    filled: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Section):
            own = saved.get(name, {})
            filled[name] = _filled(own, value, {}) if isinstance(own, Mapping) else own
        else:
            default = defaults[name]
            filled[name] = saved.get(name, list(default) if isinstance(default, tuple) else default)
    return filled
