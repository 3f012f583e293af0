"""Mistakes that can be known in advance are reported before the run folder is made."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.distributed import deepspeed_start
from d2v_fast.memory.predict import predict
from d2v_fast.ops import _library
from d2v_fast.training import engine, preflight, prepare
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY_SPEECH, TINY_TEXT, figures, leave_out_reports, run_here, tiny_file


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Start a training that must fail with a message and leave no folder; return the message."""

    def run(file: Path, *arguments: str) -> str:
        assert run_here(file, "--run", "r", *arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert not (tmp_path / "runs").exists()
        return said

    return run


@pytest.mark.parametrize(
    ("monitor", "package", "module"),
    [
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "comet_ml"),
        ("tensorboard", "tensorboard", "torch.utils.tensorboard"),
    ],
)
@pytest.mark.parametrize("is_broken", [False, True])
def test_monitors_of_deepspeed(
    monitor: str,
    package: str,
    module: str,
    is_broken: bool,
    tmp_path: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("deepspeed")
    if is_broken:
        found = importlib.import_module

        def broken(name: str) -> Any:
            if name == module:
                raise RuntimeError("undefined symbol")
            return found(name)

        monkeypatch.setattr(preflight.importlib, "import_module", broken)
    else:
        monkeypatch.setitem(sys.modules, module, None)
    file = tiny_file(tmp_path, zero_optimization__stage=1, **{monitor: {"enabled": True}})
    said = fails(file)
    assert f"`{monitor}.enabled` needs the package {package.split('.')[-1]}, which cannot be imported (" in said
    assert ("undefined symbol" in said) == is_broken
    assert f"`pip install {package}`, or set it to false." in said
    assert main(["check", str(file)]) == 1
    assert f"`{monitor}.enabled` needs" in capsys.readouterr().err
    # without effect, or switched off, it is not needed
    monkeypatch.setattr(preflight, "check_engine_available", lambda *arguments: None)
    for changes in ({"zero_optimization__stage": 0}, {monitor: {"enabled": False}}):
        config = load_config(
            tiny_file(tmp_path, **{"zero_optimization__stage": 1, monitor: {"enabled": True}, **changes})
        )
        preflight.check_packages(config, 1)


@pytest.mark.parametrize("base", [TINY_SPEECH, TINY_TEXT])
def test_scikit_learn_is_asked_for_before_a_run_that_it_ends(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_file(tmp_path, base))
    preflight.check_packages(config, 1)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(engine.RunError, match="needs scikit-learn, which is not installed: `pip install 'd2v_fast"):
        preflight.check_packages(config, 1)


def test_deepspeed_that_cannot_be_imported(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")

    def broken(device: torch.device) -> None:
        raise AttributeError("module torch has no attribute x")

    monkeypatch.setattr(deepspeed_start, "load", broken)
    said = fails(tiny_file(tmp_path, zero_optimization__stage=1))
    assert "deepspeed cannot be imported: AttributeError: module torch has no attribute x" in said


def test_a_monitor_that_cannot_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    deepspeed = pytest.importorskip("deepspeed")

    class UsageError(Exception):
        pass

    UsageError.__module__ = "wandb.errors"

    def refuse(**arguments: object) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    assert run_here(tiny_file(tmp_path, zero_optimization__stage=1), "--run", "r") == 1
    said = capsys.readouterr().err
    assert "wandb cannot report this run: No API key configured. Fix that, or set its `enabled` to false." in said


def test_memory(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, d2v__schedule__steps=1, d2v__schedule__warmup_steps=0)
    found = predict(load_config(file), 1, torch.float32, "cpu")
    monkeypatch.setattr(preflight, "available_memory", lambda: found.device_state - 1)
    assert "the model and its optimizer need " in fails(file)
    # all processes of a machine share it
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(preflight, "available_memory", lambda: 3 * found.device_state)
    assert ", in each of 4 processes, and " in fails(file)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(preflight, "available_memory", lambda: found.device_state)
    assert run_here(file, "--run", "r") == 0
    assert len(figures(tmp_path, "r")) == 1
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    assert run_here(file, "--run", "s") == 0


def test_room_for_a_checkpoint(tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_file(tmp_path)
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=1000, total=10**9)

    monkeypatch.setattr(preflight, "disk_usage", usage)
    said = fails(file)
    assert "a checkpoint takes " in said
    assert f"and 1 kB are left on the disk of {tmp_path / 'runs'}." in said
    # the folder itself does not exist yet
    assert asked == [tmp_path]
    assert shutil.disk_usage(tmp_path).free > 1000


def test_the_size_of_a_checkpoint_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_reports(monkeypatch.setattr)
    file = tiny_file(tmp_path, d2v__schedule__steps=1, d2v__schedule__warmup_steps=0)
    assert run_here(file, "--run", "r") == 0
    (shard,) = (tmp_path / "runs/r/checkpoints/step-1").glob("*.safetensors")
    # a file of safetensors begins with the length of its header
    written = shard.stat().st_size - 8 - int.from_bytes(shard.read_bytes()[:8], "little")
    config = load_config(file)
    for free, total, fits in ((written, 1, True), (written - 1, 1, False), (0, 0, True)):
        monkeypatch.setattr(preflight, "disk_usage", lambda path, f=free, t=total: SimpleNamespace(free=f, total=t))
        assert (preflight._disk_problem(config, preflight.shapes_of(config)) is None) == fits


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def missing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(prepare, "check_packages", missing)
    file = tiny_file(tmp_path)
    assert run_here(file) == 1
    assert "error: numba cannot be imported: No module named 'numba'." in capsys.readouterr().err


def test_missing_kernels_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without C++ kernels reports once that it uses the reference."""
    said: list[str] = []
    worlds = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(_library, "HAS_CPP", True)
        monkeypatch.setattr(_library, "has_triton", lambda: True)
        for world in worlds:
            preflight.report_missing_kernels(world, said.append)
        assert said == []
        monkeypatch.setattr(_library, "HAS_CPP", False)
        monkeypatch.setattr(_library, "has_triton", lambda: False)
        for world in worlds:
            preflight.report_missing_kernels(world, said.append)
            _library._say_once(_library.missing_kernels(world.device.type) or "")
        assert caught == []
    assert "the C++ kernels of d2v_fast are not built, CPU tensors use the slower PyTorch reference: " in said[0]
    # a clone is here to install from
    assert "C++20 compiler" in said[0]
    assert f"pip install -e .` again in {ROOT}" in said[0]
    assert said[1] == (
        "note: Triton is not installed, CUDA tensors use the slower PyTorch reference: `pip install triton`"
    )
    _library._say_once.cache_clear()


def test_traces_of_lost_connections_are_left_out_unless_asked_for(tmp_path: Path, monkeypatch) -> None:
    file = tiny_file(tmp_path)
    monkeypatch.setenv("RANK", "0")
    for processes, before, after in (("1", None, None), ("2", None, "ERROR"), ("2", "INFO", "INFO")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
        if before is not None:
            monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", before)
        assert run_here("--ds_config", file, "--dry-run") == 0
        assert os.environ.get("TORCH_CPP_LOG_LEVEL") == after
