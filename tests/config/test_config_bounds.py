"""Every number in a configuration or option is refused with a message or small enough for all that uses it."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from d2v_fast.cli.train_options import runs_folder
from d2v_fast.commands.console import main
from d2v_fast.config import ConfigError, D2VConfig, DeepSpeedConfig, apply_overrides, parse_config
from d2v_fast.config.errors import MAX_STEPS, MAX_WORKERS, _section_of
from d2v_fast.modalities import all_modalities, modality_named
from d2v_fast.training.learning_rate import LearningRate
from d2v_fast.training.step import dropout_seed

Key = tuple[str, ...]

BASE: dict[str, Any] = {"train_batch_size": 24, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
STEPS = {"steps": 12, "warmup_steps": 3}
SECTIONS: dict[str, dict[str, Any]] = {
    "vision": {
        "data": {"kind": "digits", "mean": [0.3], "std": [0.4]},
        "model": {"channels": 1, "image_size": 8, "patch_size": 2, "width": 16, "depth": 2, "heads": 2},
        "mask": {"num_patches": 9, "min_patches": 2},
        "target": {"top_k": 2},
    },
    "speech": {},
    "text": {"data": {"kind": "docs"}},
}
EXTREMES = [-1, 0, 1e300, 1e39, math.nan, math.inf, -math.inf, 2**63, 10**30, -(10**30), "3", [7], {}]


def is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(is_number, getattr(annotation, "__args__", ())))


def number_keys(model: type[BaseModel], prefix: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        nested = _section_of(field.annotation)
        if nested is not None:
            yield from number_keys(nested, (*prefix, name))
        elif is_number(field.annotation):
            yield (*prefix, name)


def raw_with(modality: str, key: Key, value: Any) -> dict[str, Any]:
    d2v = {"modality": modality, "schedule": dict(STEPS), **SECTIONS[modality]}
    raw = copy.deepcopy({**BASE, "d2v": d2v})
    if key[-1] == "epochs":
        raw["d2v"]["schedule"] = {}
    elif key[-1] == "warmup_epochs":
        raw["d2v"]["schedule"] = {"epochs": 10}
    section = raw
    for part in key[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[key[-1]] = value
    return raw


def all_keys() -> list[tuple[str, Key]]:
    own = [(modality.name, ("d2v", *key)) for modality in all_modalities() for key in number_keys(modality.config)]
    return [*own, *(("vision", key) for key in number_keys(DeepSpeedConfig))]


def test_the_walk_finds_the_keys() -> None:
    keys = {".".join(key) for _, key in all_keys()}
    assert {"d2v.run.timeout_minutes", "d2v.data.num_workers", "optimizer.params.lr", "d2v.schedule.epochs"} <= keys
    assert len(keys) > 100


def test_any_number() -> None:
    """Nothing but a ConfigError that names the key, or a configuration whose numbers all computations can hold."""
    for (modality, key), value in product(all_keys(), EXTREMES):
        told = ""
        try:
            config = parse_config(raw_with(modality, key, value))
        except ConfigError as error:
            told = str(error)
        if told:
            assert key[-1] in told, (modality, key, value)
            continue
        assert value in (-1, 0, [7], {}) or is_wide(key, value), (modality, key, value)
        config.digest()
        config.without_effect(1)


def is_wide(key: Key, value: float) -> bool:
    """Whether the key is one of DeepSpeed's that take any number of fp32's range."""
    wide = ("gradient_clipping", "gradient_predivide_factor", "fp16", "flops_profiler")
    return key[0] in wide and value in (2**63, 10**30)


def largest(section: type[D2VConfig], key: Key) -> float:
    """The largest value that a key of a section accepts; it must have an upper bound."""
    model: Any = section
    for part in key[:-1]:
        model = _section_of(model.model_fields[part].annotation)
    bounds = [
        getattr(one, name)
        for one in model.model_fields[key[-1]].metadata
        for name in ("le", "lt")
        if hasattr(one, name)
    ]
    assert bounds, key
    return float(min(bounds))


def test_largest_values_are_small_enough_for_what_follows() -> None:
    section = modality_named("vision").config
    minutes = largest(section, ("run", "timeout_minutes"))
    assert timedelta(minutes=minutes) < timedelta.max
    # torch hands time-outs on in nanoseconds
    assert minutes * 60e9 < 2**63
    assert largest(section, ("data", "num_workers")) == MAX_WORKERS
    steps = int(largest(section, ("schedule", "steps")))
    assert steps == MAX_STEPS
    seed = int(largest(section, ("run", "seed"))) - 1
    torch.manual_seed(dropout_seed(seed, steps, steps, MAX_WORKERS))
    deque(maxlen=int(largest(section, ("guard", "nonfinite_patience")) + largest(section, ("run", "log_every"))))
    raw = raw_with("vision", ("d2v", "schedule", "steps"), steps)
    config = parse_config(raw)
    schedule = LearningRate(config.d2v.schedule, 1e-3, 10**6)
    assert math.isfinite(schedule.at(steps - 1))
    speech = modality_named("speech").config
    assert largest(speech, ("data", "max_seconds")) * largest(speech, ("model", "sample_rate")) < 2**63
    epochs = largest(section, ("schedule", "epochs"))
    assert epochs * 1e9 < 2**63


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["d2v.run.seed=3", "d2v.run.seed=4"], "`--set d2v.run.seed=4` and `--set d2v.run.seed=3` set the same key"),
        (["d2v.run.seed=3", "d2v.run.seed=3"], "set the same key"),
        (["d2v.run.seed=3", " d2v.run.seed =4"], "set the same key"),
        (['d2v.run={"seed": 3}', "d2v.run.keep=4"], "set the same key"),
        (["d2v.run.keep=4", 'd2v.run={"seed": 3}'], "set the same key"),
        (["d2v.run.keep=4", "d2v={}"], "set the same key"),
        (['d2v.run={"seed": 3, "keep": 2, "seed": 4}'], "`seed` appears twice in a section of `--set` (3, then 4)"),
        (['d2v={"run": {"seed": 3, "seed": 3}}'], "appears twice"),
    ],
)
def test_key_that_is_set_twice(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize("override", ["d2v=1", "d2v.run=1", "d2v.model=[]"])
def test_section_that_is_a_value(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused in words, also by the commands that read parts of the file before all of it is checked."""
    words = ["finetune", "--ds_config", "finetune_images", "--set", override]
    assert main([*words, "--dry-run"]) == 2
    assert f"`{override.partition('=')[0]}` must be a section {{...}}, but is" in capsys.readouterr().err
    assert runs_folder([override]) == Path("runs")


def test_keys_of_one_section_and_of_like_names() -> None:
    made = apply_overrides({"a": {"seed": 0}}, ["a.seed=3", "a.seeds=4", "a.seed_2=5", "seed=6"])
    assert made == {"a": {"seed": 3, "seeds": 4, "seed_2": 5}, "seed": 6}


def test_option_and_override_of_the_same_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--run", "a", "--set", "d2v.run.name=b"]) == 2
    assert "set the same key" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "--timeout", "nan"],
        ["doctor", "--timeout", "inf"],
        ["doctor", "--timeout", "1e300"],
        ["doctor", "--timeout", "0"],
        ["doctor", "--timeout", "soon"],
        ["check", "digits", "--processes", "1" + "0" * 30],
        ["check", "digits", "--processes", "9" * 5000],
        ["probe", "r", "--max-samples", "-1"],
        ["embed", "r", "in", "--to", "a.npy", "--batch-size", "1" + "0" * 20],
        ["import", "a.pt", "--to", "b", "--heads", "0"],
        ["train", "digits", "--supervise", "9" * 40],
        ["tokenize", "a", "--train", "--vocab-size", "1e300"],
    ],
)
def test_numbers_of_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "must be a" in capsys.readouterr().err
