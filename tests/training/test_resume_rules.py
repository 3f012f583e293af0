"""Which configuration changes a resume accepts or refuses, and how it reports them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.config import RunConfig, parse_config
from d2v_fast.config.file import apply_overrides
from d2v_fast.training.resume_rules import refused_changes, reported_changes
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT, figures, run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")


def config(base: dict[str, Any], *overrides: str) -> RunConfig:
    return parse_config(apply_overrides(copy.deepcopy(base), overrides))


REFUSED = [
    (TINY, "d2v.run.seed", 0, 9),
    (TINY, "d2v.model.heads", 2, 4),
    (TINY, "d2v.model.norm_eps", 1e-06, 1e-05),
    (TINY_SPEECH, "d2v.data.max_batch_seconds", 12.0, 6.0),
    (TINY_SPEECH, "d2v.run.seed", 0, 1),
    (TINY_SPEECH, "d2v.model.heads", 2, 1),
    (TINY_TEXT, "d2v.model.norm_eps", 1e-05, 1e-06),
]


@pytest.mark.parametrize(("base", "key", "before", "after"), REFUSED)
def test_refused(base: dict[str, Any], key: str, before: Any, after: Any) -> None:
    saved, changed = config(base), config(base, f"{key}={json.dumps(after)}")
    (sentence,) = refused_changes(saved.to_dict(), changed)
    assert sentence.startswith(
        f"`{key}` must be {json.dumps(before)} as in the checkpoint, but is {json.dumps(after)} instead"
    )
    assert "start a new run" in sentence
    assert refused_changes(saved.to_dict(), saved) == []


ALLOWED = [
    (TINY, "optimizer.params.lr", 2e-3, 1e-3),
    (TINY, "gradient_clipping", 1.0, 0.5),
    (TINY, "zero_optimization.stage", 0, 2),
    (TINY, "d2v.model.drop_path", 0.1, 0.0),
    (TINY, "d2v.mask.num_patches", 9, 8),
    (TINY, "d2v.teacher.decay_steps", 10, 20),
    (TINY, "d2v.schedule.steps", 12, 20),
    (TINY, "d2v.schedule.warmup_steps", 3, 2),
    (TINY, "d2v.guard.loss_spike", None, 3.0),
    (TINY, "d2v.data.num_workers", 0, 2),
    (TINY, "d2v.run.keep", 2, 1),
    (TINY, "d2v.run.save_every", 3, 5),
    (TINY, "d2v.probe.num_draws", 1, 2),
    (TINY_SPEECH, "d2v.data.lengths", "pad", "crop"),
    (TINY_TEXT, "d2v.mask.prob", 0.15, 0.2),
]


@pytest.mark.parametrize(("base", "key", "before", "after"), ALLOWED)
def test_allowed_is_reported_with_both_values(base: dict[str, Any], key: str, before: Any, after: Any) -> None:
    saved, changed = config(base), config(base, f"{key}={json.dumps(after)}")
    assert refused_changes(saved.to_dict(), changed) == []
    assert reported_changes(saved.to_dict(), changed) == [f"{key}: {json.dumps(before)} -> {json.dumps(after)}"]


@pytest.mark.parametrize("base", [TINY, TINY_SPEECH, TINY_TEXT])
def test_only_what_differs_is_reported(base: dict[str, Any]) -> None:
    """Not reported: a default that is written out, a key that is new or gone, another name or folder."""
    now = config(base, "d2v.run.name=other", "d2v.run.dir=elsewhere", "zero_optimization.stage=0")
    saved = config(base).to_dict()
    for section, key in (("run", "background_save"), ("guard", "loss_spike"), ("data", "on_change")):
        del saved["d2v"][section][key]
    saved["d2v"]["data"]["gone"] = 3
    assert reported_changes(saved, now) == []
    assert refused_changes(saved, now) == []
    # what every run did before there was the key
    assert config(TINY).d2v.decay_1d is False
    del saved["d2v"]["decay_1d"]
    assert reported_changes(saved, now) == ([] if base is TINY else ["d2v.decay_1d: false -> true"])


def test_hidden_width_counts_and_not_the_ratio() -> None:
    saved = config(TINY, "d2v.model.mlp_ratio=4.0").to_dict()
    assert refused_changes(saved, config(TINY, "d2v.model.mlp_ratio=4.01")) == []
    assert "`d2v.model.mlp_ratio` must be 4.0" in refused_changes(saved, config(TINY, "d2v.model.mlp_ratio=2.0"))[0]


def resume(file: Path, *overrides: str) -> int:
    return run_here("--ds_config", file, "--run", "r", "--resume", *(f"--set={override}" for override in overrides))


def test_in_a_run(tmp_path: Path, capsys) -> None:
    """A refused change modifies nothing; a schedule may end at the current step, but not before."""
    file, run = tiny_file(tmp_path), tmp_path / "runs/r"
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=6") == 0
    before, settings = figures(tmp_path, "r"), (run / "config.json").read_bytes()
    capsys.readouterr()
    for override, told in (
        ("d2v.schedule.steps=4", "must have at least the 6 steps that the run has made, but has 4 steps"),
        ("d2v.run.seed=9", "`d2v.run.seed` must be 0 as in the checkpoint, but is 9 instead"),
    ):
        assert resume(file, override) == 1
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    (run / "result.json").unlink()
    assert resume(file, "d2v.schedule.steps=4") == 1
    error = capsys.readouterr().err
    assert "must have at least the 6 steps that the run has made, but has 4 steps" in error
    assert f"export {run} --step 3" in error
    assert figures(tmp_path, "r") == before
    assert (run / "config.json").read_bytes() == settings

    assert resume(file, "d2v.schedule.steps=9", "d2v.run.keep=1") == 0
    assert "d2v.schedule.steps: 6 -> 9; d2v.run.keep: 2 -> 1" in capsys.readouterr().out
    assert complete_steps(run / "checkpoints") == [9]
    assert resume(file, "d2v.schedule.steps=9", "d2v.run.keep=1") == 0
    assert "this run is finished" in capsys.readouterr().out


def test_extended_and_interrupted_is_not_finished_where_it_was(tmp_path: Path, capsys) -> None:
    file, run = tiny_file(tmp_path, d2v__schedule={"steps": 6, "warmup_steps": 3}), tmp_path / "runs/r"
    assert run_here("--ds_config", file, "--run", "r") == 0
    result = (run / "result.json").read_bytes()
    assert resume(file, "d2v.schedule.steps=9") == 0
    # as an interruption before the new end leaves it
    (run / "result.json").write_bytes(result)
    capsys.readouterr()
    assert resume(file) == 1
    assert "must have at least the 9 steps that the run has made, but has 6 steps" in capsys.readouterr().err
