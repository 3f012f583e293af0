"""Options of a run's steps: captures, compiled blocks and kept samples, as the command line sees them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.runs import run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")


def losses(folder: Path) -> list[float]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def train(tmp_path: Path, name: str, steps: int, *options: str, resume: bool = False) -> int:
    file = tiny_file(tmp_path, d2v__schedule={"kind": "constant", "steps": steps}, d2v__model__drop_path=0.5)
    sets = [word for option in options for word in ("--set", option)]
    return run_here("--ds_config", file, "--run", name, *sets, *(["--resume"] if resume else []))


def test_a_cpu_captures_nothing_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "asked", 2, "d2v.run.cuda_graph=true") == 0
    assert capsys.readouterr().out.count("steps are not captured (`d2v.run.cuda_graph`): CUDA graphs need a GPU") == 1
    assert train(tmp_path, "auto", 2) == 0
    assert "captured" not in capsys.readouterr().out
    assert losses(tmp_path / "runs" / "asked") == losses(tmp_path / "runs" / "auto")


def test_a_fixed_number_of_kept_samples_trains_and_resumes(tmp_path: Path) -> None:
    fixed = "d2v.run.kept_samples=fixed"
    assert train(tmp_path, "whole", 5, fixed) == 0
    assert train(tmp_path, "drawn", 5) == 0
    assert train(tmp_path, "parts", 3, fixed) == 0
    assert train(tmp_path, "parts", 5, fixed, "d2v.run.keep=3") != 0
    file = tmp_path / "tiny.json"
    assert (
        run_here("--ds_config", file, "--run", "parts", "--set", fixed, "--set", "d2v.schedule.steps=5", "--resume")
        == 0
    )
    whole, drawn, parts = (losses(tmp_path / "runs" / name) for name in ("whole", "drawn", "parts"))
    assert parts == whole
    assert drawn != whole


def test_blocks_are_compiled_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiled.append(block))
    assert train(tmp_path, "compiled", 1, "d2v.run.compile=true") == 0
    # student and teacher
    assert len(compiled) == len(set(map(id, compiled))) > 2
    assert len(compiled) % 2 == 0
    assert "the blocks are compiled in the first steps (`d2v.run.compile`)" in capsys.readouterr().out
    compiled.clear()
    assert train(tmp_path, "compiled", 2, resume=True) == 0
    assert not compiled
    assert "compiled_blocks: true -> false" in capsys.readouterr().out


def test_a_compiler_that_fails_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(block: nn.Module) -> None:
        def call(*arguments: object) -> None:
            raise torch._dynamo.exc.BackendCompilerFailed(print, ImportError("file too short"), None)

        block._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", fail)
    assert train(tmp_path, "failed", 1, "d2v.run.compile=true") != 0
    text = "".join(capsys.readouterr())
    assert "the blocks cannot be compiled here: " in text
    assert "file too short" in text
    assert "--set d2v.run.compile=false" in text
