"""The commands on a modality that this library does not have: it is embedded and probed, and has no formats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2v_fast import modalities
from d2v_fast.commands.console import main as d2v_fast
from d2v_fast.modalities import register
from tests.fake_modality import MODALITY
from tests.fake_modality.batches import CurvesBatches
from tests.fake_modality.config import CurvesConfig
from tests.helpers.runs import TINY, run_here, tiny_file

CURVES: dict[str, Any] = {
    **TINY,
    "d2v": {**{key: TINY["d2v"][key] for key in ("teacher", "run")}, "modality": "curves"},
}


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modalities, "_registered", {})
    register(MODALITY)


def said(capsys: pytest.CaptureFixture[str], status: int, *words: object) -> str:
    """Output and errors of a command that ends with this status."""
    assert d2v_fast([*map(str, words)]) == status
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_commands_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tiny_file(tmp_path, CURVES, d2v__schedule={"steps": 2, "warmup_steps": 1}, d2v__probe={"num_draws": 1})
    assert run_here("--ds_config", file, "--run", "r") == 0, capsys.readouterr()
    printed, run = capsys.readouterr().out, tmp_path / "runs" / "r"
    assert 'no export: Transformers has no model of modality "curves"' in printed
    table = said(capsys, 0, "probe", run)
    assert re.search(r"accuracy in % on held-out curves .*\nuntrained .*\nstudent .*\nteacher .*\nraw points ", table)
    assert table.partition("\n")[2].strip() in printed

    folder = tmp_path / "labeled"
    found = CurvesBatches(CurvesConfig()).curves(np.arange(20)).numpy()
    for index, curve in enumerate(found):
        path = folder / ("even", "odd")[index % 2] / f"{index:02}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, curve)
    np.save(folder / "even" / "short.npy", found[0][:3])
    (folder / "odd" / "text.npy").write_text("no array")
    to = tmp_path / "features.npy"
    told = said(capsys, 0, "embed", run, folder, "--to", to, "--device", "cpu")
    assert "20 curves x 16 features, by the student of" in told
    assert "2 of 22 curves are unreadable and left out:\n  even/short.npy: its shape must be (12, 3), but is" in told
    assert "\n  odd/text.npy: not an .npy file: " in told
    features = np.load(to)
    assert features.shape == (20, 16)
    assert len(np.unique(features.round(4), axis=0)) == 20
    labeled = said(capsys, 0, "probe", run, "--data", folder)
    assert "probe: 22 curves in 2 classes in" in labeled
    assert "raw points" in labeled
    assert "left out: 2 unreadable curves:" in labeled

    assert "`--field` does not apply to runs on curves" in said(
        capsys, 2, "probe", run, "--data", folder, "--field", "x"
    )
    assert '`export` has no format for runs of modality "curves"' in said(capsys, 2, "export", run)
    told = said(capsys, 1, "import", folder, "--to", tmp_path / "runs" / "new", "--ds_config", file)
    assert '`import` has no format for runs of modality "curves"' in told
    assert "must be a run on vision or speech to be drawn" in said(capsys, 1, "draw", run)
    assert '`d2v.modality` must be "text", but is "curves"' in said(capsys, 2, "tokenize", file)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["r"]
    assert not list(run.glob("export*"))
