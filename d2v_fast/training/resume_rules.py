"""What of a configuration may change when a run is resumed: what is refused, and what is reported and followed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from d2v_fast.command_lines import tool_command
from d2v_fast.config import EARLIER_VALUES, DeepSpeedConfig, RunConfig, changed_keys
from d2v_fast.config.errors import Section, show

# of a model's configuration: how it is trained, in which it may differ from what its weights were trained with
FREE_MODEL_KEYS = frozenset(
    {
        "activation_dropout",
        "attention",
        "attention_dropout",
        "drop_path",
        "dropout",
        "front_end_checkpointing",
        "gradient_checkpointing",
        "input_dropout",
        "layer_drop",
        "layer_scale",
        "position_in_teacher",
    }
)
# of `d2v`: what the order of an epoch follows from, beside samples and global batch, which are compared elsewhere
_ORDER_KEYS = (("run", "seed"), ("data", "max_batch_seconds"))
# where a run lies says nothing about what it does
_PLACES = ("d2v.run.name:", "d2v.run.dir:")


def refused_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return a sentence for every change with which a run cannot go on; the model's shapes are compared elsewhere.

    Args:
        saved: the configuration in a checkpoint from which at least one step was made, as `RunConfig.to_dict` wrote it.
        config: what the run is to go on with.
    """
    before, now = _effective(saved, config)["d2v"], config.to_dict()["d2v"]
    sentences = [
        f"`d2v.{section}.{key}` must be {show(before[section].get(key))} as in the checkpoint, but is "
        f"{show(now[section][key])} instead: the rest of this epoch would have another order, in which some samples "
        "are seen twice and others not at all. Leave it as it was, or start a new run."
        for section, key in _ORDER_KEYS
        if key in now[section] and before[section].get(key) != now[section][key]
    ]
    return sentences + [
        f"`d2v.model.{key}` must be {show(old)} as in the checkpoint, but is {show(new)} instead: the weights belong "
        "to another model. Leave it as it was, or start a new run."
        for key, old, new in _changed_model(before["model"], now["model"])
    ]


def reported_changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return, as `key: old -> new`, every key whose value differs from that in a checkpoint, defaults filled in."""
    changes = changed_keys(_effective(saved, config), _complete(config))
    return [line for line in changes if not line.startswith(_PLACES)]


def too_short(made: int, num_steps: int, steps_per_epoch: int, run_folder: Path, saved_steps: Sequence[int]) -> str:
    """Return why a run that has made more steps than its schedule has cannot go on.

    Args:
        made: steps of the run.
        num_steps: of the schedule.
        saved_steps: of its checkpoints.
    """
    earlier = [step for step in saved_steps if step <= num_steps]
    weights = "There is no checkpoint of an earlier step."
    if earlier:
        weights = f"Weights of an earlier step: `{tool_command('export', run_folder, '--step', max(earlier))}`."
    return (
        f"`d2v.schedule` must make the run at least as long as it is already ({made:,} steps), but makes it "
        f"{num_steps:,} steps long ({steps_per_epoch:,} per epoch). Leave it as it was to go on, or end the run where "
        f"it is: `--set d2v.schedule.steps={made} --set d2v.schedule.epochs=null`. {weights}"
    )


def _changed_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key, new in now.items():
        old = before.get(key)
        if key == "mlp_ratio" and old is not None:
            # of which only the product with the width counts
            changed = int(before["width"] * old) != int(now["width"] * new)
        else:
            changed = old != new and key not in FREE_MODEL_KEYS
        if changed:
            yield key, old, new


def _complete(config: RunConfig) -> dict[str, Any]:
    return {**config.deepspeed.model_dump(mode="json"), "d2v": config.d2v.model_dump(mode="json")}


def _effective(saved: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A saved configuration with today's defaults for keys that it lacks, and without those that there are no more."""
    outside = {key: value for key, value in saved.items() if key != "d2v"}
    try:
        deepspeed = DeepSpeedConfig.model_validate(outside).model_dump(mode="json")
    except ValidationError:
        # of another version, which accepted what is refused today
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
