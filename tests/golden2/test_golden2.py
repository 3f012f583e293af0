"""This library computes the recorded steps of the public code, and the comparison notices what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden2.__main__ import FOLDER, main
from tests.golden2.cases import Case, CaseError, cases_of
from tests.golden2.compare import compare
from tests.golden2.step import run

CASES = cases_of(FOLDER)
NAMES = [case.name for case in CASES]


def worst(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Error over limit of every quantity."""
    return {row.quantity: row.error / row.limit for row in compare(case, run(case, dtype), dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_step_is_the_recorded_one(case: Case, dtype: torch.dtype) -> None:
    found = worst(case, dtype)
    quantities = {"losses", "prediction", "encoder output", "target", "gradients", "key biases"}
    assert found.keys() >= (quantities | {"average"} if dtype == torch.float32 else quantities)
    assert max(found.values()) <= 1, found


def test_a_wrong_number_is_noticed() -> None:
    """One channel of a norm, off by a thousandth, is in every quantity that comes after it."""
    case = next(case for case in CASES if case.kind == "TEXT")
    name = "student.blocks.1.norm1.weight"
    changed = case.tensors[name].clone()
    changed[3] *= 1.001
    found = worst(replace(case, tensors={**case.tensors, name: changed}), torch.float32)
    assert {name for name, ratio in found.items() if ratio > 1} >= {"losses", "prediction", "encoder output", "average"}
    assert found["target"] <= 1


def test_a_missing_gradient_is_noticed() -> None:
    case = next(case for case in CASES if case.kind == "TEXT")
    step = run(case, torch.float32)
    kept = {name: one for name, one in step.gradients.items() if name != "blocks.0.norm2.bias"}
    rows = {row.quantity: row for row in compare(case, replace(step, gradients=kept), torch.float32)}
    assert not rows["gradients"].fits
    assert rows["gradients"].worst == "blocks.0.norm2.bias"


def copied(folder: Path, name: str, **changes: object) -> Path:
    """A folder with one case, whose description has other values."""
    described = json.loads((FOLDER / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**described, **changes}))
    shutil.copy(FOLDER / f"{name}.safetensors", folder)
    return folder


def test_the_exit_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        copied(folder, "text_1")
    assert main([str(good), "--dtype", "fp32"]) == 0
    assert "text_1 in fp32" in (said := capsys.readouterr().out)
    assert "TOO FAR" not in said
    tensors = load_file(bad / "text_1.safetensors")
    tensors["expected.target"][0, 0, 0] += 1e-3
    save_file(tensors, bad / "text_1.safetensors")
    assert main([str(good), str(bad), "--dtype", "fp32"]) == 1
    assert "target" in next(line for line in capsys.readouterr().out.splitlines() if "TOO FAR" in line)


def test_errors_are_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaseError, match="must be a folder of recorded cases, but is missing"):
        cases_of(tmp_path / "none")
    with pytest.raises(CaseError, match="holds none"):
        cases_of(tmp_path)
    copied(tmp_path, "text_1", modality="SMELL")
    with pytest.raises(CaseError, match=r"`modality` in .* must be one of IMAGE, AUDIO, TEXT, but is 'SMELL'"):
        cases_of(tmp_path)
    (tmp_path / "text_1.safetensors").unlink()
    assert main([str(tmp_path)]) == 2
    assert "holds text_1.json, but no text_1.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_first": True}, "`layer_norm_first` in the `cfg` of .* must be false, but is true"),
        ({"end_of_block_targets": True}, "`end_of_block_targets` in .* must be false"),
        ({"recon_loss": 0.5}, "`recon_loss` in .* must be 0.0, but is 0.5"),
        ({"layer_norm_target_layer": True}, "must set one norm of the target"),
        ({"modulated": 3}, "`modulated` in .* is not known here"),
        ({"modalities": {"text": {"mask_dropout": 0.1}}}, "`mask_dropout` in `modalities.text` .* must be 0.0"),
        ({"modalities": {"text": {"decoder": {"add_positions_all": True}}}}, "`add_positions_all` in `decoder` of"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_unsupported_values_are_refused_by_name(changes: dict, message: str) -> None:
    case = next(case for case in CASES if case.kind == "TEXT")
    with pytest.raises(CaseError, match=message):
        run(replace(case, model=merged(case.model, changes)), torch.float32)


def merged(model: dict, changes: dict) -> dict:
    """Nested dictionaries with some values replaced."""
    both = {key: merged(model[key], one) if isinstance(one, dict) else one for key, one in changes.items()}
    return {**model, **both}
