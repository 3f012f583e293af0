"""A modality that this library does not have: it trains, is checked, resumes, and is found by launched processes, and
nothing else is edited for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_fast import modalities
from d2v_fast.commands.console import main as d2v_fast
from d2v_fast.config import ConfigError, TextConfig, VisionConfig, load_config
from d2v_fast.data import batch_maker
from d2v_fast.data.order import MicroStep
from d2v_fast.memory.step import step_memory
from d2v_fast.modalities import ModalityError, all_modalities, modality_named, modality_names, modality_of, register
from tests.fake_modality import MODALITY
from tests.fake_modality.config import CurvesConfig
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY, figures, run_here, tiny_file

CURVES: dict[str, Any] = {
    **TINY,
    "d2v": {**{key: TINY["d2v"][key] for key in ("teacher", "schedule", "run")}, "modality": "curves"},
}


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have registered is forgotten, and what this test registers."""
    monkeypatch.setattr(modalities, "_registered", {})


@pytest.fixture
def curves(unregistered: None) -> None:
    register(MODALITY)


def install(folder: Path, *lines: str, package: str = "curves") -> None:
    """Write what pip writes of a package that has entry points."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{modalities.ENTRY_POINTS}]", *lines]))


def problems(file: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    return caught.value.problems


def test_unregistered_modality_is_refused_by_name(unregistered: None, tmp_path: Path) -> None:
    assert problems(tiny_file(tmp_path, CURVES)) == (
        '`d2v.modality` must be "vision" or "speech" or "text", but is "curves" instead. If a package defines it, '
        "install that package.",
    )
    with pytest.raises(
        ModalityError, match=r'^there is no modality "curves"\. Known are "vision", "speech", "text"\.$'
    ):
        modality_named("curves")
    with pytest.raises(ModalityError, match=r'no modality "texts"\. Did you mean "text"\?'):
        modality_named("texts")
    with pytest.raises(ModalityError, match='no modality "curves"'):
        modality_of(CurvesConfig())


def test_section_of_another_class_is_not_taken_for_its_modality(curves: None) -> None:
    """No chain ends in `else: text`."""
    for config, modality in ((VisionConfig, "text"), (TextConfig, "curves"), (CurvesConfig, "speech")):
        with pytest.raises(
            TypeError, match=f'of modality "{modality}" must be a .* but is a {config.__name__} instead'
        ):
            modality_of(config.model_construct(modality=modality))


def test_registered_modality_is_known(curves: None, tmp_path: Path) -> None:
    assert modality_names() == ["vision", "speech", "text", "curves"]
    assert [one.name for one in all_modalities()] == modality_names()
    assert [one.places for one in all_modalities()] == ["patches", "frames", "tokens", "points"]
    config = load_config(tiny_file(tmp_path, CURVES))
    assert type(config.d2v) is CurvesConfig
    assert modality_of(config.d2v) is MODALITY
    file = tiny_file(tmp_path, CURVES, d2v__model={"widthh": 8, "heads": 0}, channels=4)
    assert problems(file) == (
        "`channels` (value 4) is not a known key. Did you mean `d2v.model.channels`?",
        "`d2v.model.widthh` (value 8) is not a known key. Did you mean `d2v.model.width`?",
        "`d2v.model.heads` must be >= 1, but is 0 instead.",
    )


def test_a_name_has_one_modality(curves: None) -> None:
    register(MODALITY)
    for name in ("curves", "text"):
        with pytest.raises(ModalityError, match=f'there is already a modality "{name}"'):
            register(replace(MODALITY, name=name))
    assert modality_named("curves") is MODALITY
    assert modality_named("text").config is TextConfig


def test_section_without_what_all_have_is_refused() -> None:
    from d2v_fast.config import DataSection

    with pytest.raises(TypeError, match="Points must define the fields kind, on_change, max_bad_fraction, strict"):
        type("Points", (DataSection,), {"__annotations__": {"num_workers": int}, "num_workers": 0})


@pytest.mark.usefixtures("quick_runs")
def test_run_resumes_bit_for_bit(curves: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, CURVES, d2v__schedule__kind="constant", d2v__schedule__steps=6)
    assert run_here("--ds_config", file, "--run", "whole") == 0, capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--set", "d2v.schedule.steps=3") == 0, capsys.readouterr()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0, capsys.readouterr()
    assert "resumed after step 3" in capsys.readouterr().out
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")
    saved = json.loads((tmp_path / "runs" / "r" / "config.json").read_text())
    assert saved["d2v"]["modality"] == "curves"
    assert saved["d2v"]["data"]["length"] == 12


def test_masks_do_not_depend_on_the_split(curves: None) -> None:
    maker, ids = batch_maker(CurvesConfig()), np.arange(6)
    whole = maker.make(MicroStep(0, ids, ids), 0)
    part = maker.make(MicroStep(0, ids[3:], ids), 0)
    assert part.step_rows == whole.step_rows == len(whole.batch.rows)
    assert torch.equal(part.batch.rows, whole.batch.rows[whole.batch.rows >= 3 * 12] - 3 * 12)
    assert torch.equal(part.batch.inputs, whole.batch.inputs[3:])


def test_memory_is_that_of_no_skipped_sample(curves: None) -> None:
    config = CurvesConfig()
    skipping, without = (
        step_memory(config.model_copy(update={"model": model}), 24, torch.float32)
        for model in (config.model, config.model.without_skipping())
    )
    assert skipping == without
    assert skipping.batch == 4 * 24 * 12 * 3 + 8 * 24 * 6


def test_check(curves: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert d2v_fast(["check", str(tiny_file(tmp_path, CURVES))]) == 0
    said = capsys.readouterr().out
    assert "24 curves, 12 points each: 0.0 % padding" in said
    assert "of tensors per process, predicted for the largest batch" in said
    assert "data            120 curves" in said


def test_launched_process_finds_an_installed_modality(tmp_path: Path) -> None:
    install(tmp_path / "site", "curves = tests.fake_modality:MODALITY")
    file = tiny_file(tmp_path, CURVES, d2v__schedule={"steps": 3, "warmup_steps": 1})
    # a wrong value is enough: only the modality's own section has this key
    done = subprocess.run(
        [sys.executable, ROOT / "d2v_fast" / "train.py", "--ds_config", file, "--set", "d2v.data.length=0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "`d2v.data.length` must be " in done.stderr


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["curves = no_such_package:MODALITY"], "cannot be loaded: ModuleNotFoundError: No module named 'no_such_p"),
        (["curves = tests.fake_modality:NOTHING"], "cannot be loaded: AttributeError: "),
        (["curves = tests.fake_modality:annotations"], "must be a Modality of this name, but is a _Feature."),
        (["points = tests.fake_modality:MODALITY"], 'must be a Modality of this name, but is the modality "curves".'),
    ],
)
def test_package_that_does_not_define_its_modality(
    lines: list[str], sentence: str, unregistered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", *lines)
    monkeypatch.syspath_prepend(tmp_path / "site")
    name, _, target = lines[0].partition(" = ")
    [found] = problems(tiny_file(tmp_path, CURVES, d2v__modality=name))
    assert found.startswith(f'`d2v.modality`: `{target}`, the entry point of the modality "{name}", ')
    assert sentence in found
    # others are as they were
    assert load_config(tiny_file(tmp_path)).d2v.modality == "vision"


def test_two_packages_with_one_name(unregistered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "curves = tests.fake_modality:MODALITY")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert modality_named("curves") is MODALITY
    monkeypatch.setattr(modalities, "_registered", {})
    install(tmp_path / "more", "curves = other:MODALITY", package="other")
    monkeypatch.syspath_prepend(tmp_path / "more")
    with pytest.raises(ModalityError, match=r'"curves" is defined by `other:MODALITY` and `tests\.fake'):
        modality_named("curves")
