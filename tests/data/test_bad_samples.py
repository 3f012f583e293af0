"""Unreadable images are named and replaced alike for any workers and on resume; too many stop the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_fast.files import faults
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.training.run_folder import RunFolder
from tests.helpers.runs import figures, run_here, tiny_file

pytestmark = pytest.mark.usefixtures("quick_runs")


BAD = (3, 4, 17)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Thirty images, three of which cannot be read; one of these has a line break in its name."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(30):
        noise = np.random.default_rng(i).integers(0, 256, (12, 10 + i), dtype=np.uint8)
        path = folder / ("17-a\nb.png" if i == 17 else f"{i:02d}.png")
        Image.fromarray(noise).save(path)
        if i in BAD:
            path.write_bytes(b"junk")
    return folder


def images_file(tmp_path: Path, **changes: Any) -> Path:
    """The tiny configuration, on the images: 3 steps an epoch, 12 steps."""
    data = {"kind": "images", "path": str(tmp_path / "images"), "mean": [0.5], "std": [0.3], "crop_scale": [0.5, 1.0]}
    data |= {"num_workers": 0, "max_bad_fraction": 0.1} | changes
    return tiny_file(tmp_path, train_batch_size=10, d2v__data=data)


def inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, list[int]]]:
    """A list that will hold pixels and masks of every batch that the model sees."""
    seen: list[tuple[bytes, list[int]]] = []
    forward = Data2Vec.forward

    def forward_and_see(self: Data2Vec, batch: Any, *others: Any) -> Any:
        seen.append((batch.inputs.numpy().tobytes(), batch.rows.tolist()))
        return forward(self, batch, *others)

    monkeypatch.setattr(Data2Vec, "forward", forward_and_see)
    return seen


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the run to stop when it has made this step; it ends after the next one."""
    passed: list[str] = []

    def fault_point(point: str) -> None:
        passed.append(point)
        if point == "step" and passed.count(point) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(faults, "fault_point", fault_point)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_same_replacement_for_any_workers_and_on_resume(images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    seen = inputs(monkeypatch)
    assert run_here("--ds_config", images_file(tmp_path), "--run", "whole") == 0
    whole = seen.copy()
    assert len(whole) == 12
    seen.clear()
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert run_here("--ds_config", images_file(tmp_path, num_workers=2), "--run", "r") == 0
    # from two workers to none, in the middle of an epoch
    assert run_here("--ds_config", images_file(tmp_path), "--run", "r", "--resume") == 0
    assert seen == whole
    assert figures(tmp_path, "r") == figures(tmp_path, "whole")
    for name in ("whole", "r"):
        # each file once, with its reason, also after the resume, which meets them again
        lines = RunFolder(tmp_path / "runs" / name).lines("bad_files.txt")
        names = [f"{images}/03.png", f"{images}/04.png", f"{images}/17-a\\nb.png"]
        assert sorted(lines) == [f"{name}: not a JPEG, PNG, WebP, TIFF, BMP or GIF image" for name in names]
    assert f"3 unreadable files were replaced by others: {tmp_path / 'runs/r/bad_files.txt'}" in capsys.readouterr().out


def test_strict_stops_at_the_first(images: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    seen = inputs(monkeypatch)
    file = images_file(tmp_path, strict=True, max_bad_fraction=1.0)
    assert run_here("--ds_config", file, "--run", "r") == 1
    assert "`d2v.data.strict` is true. Repair or remove it:" in (error := capsys.readouterr().err)
    lines = RunFolder(tmp_path / "runs/r").lines("bad_files.txt")
    assert lines
    assert all(line.replace("\\n", "\n") in error for line in lines)
    # an epoch of three steps meets all of them
    assert len(seen) < 3
    for path in images.iterdir():
        if path.read_bytes() == b"junk":
            path.unlink()
    assert run_here("--ds_config", file, "--run", "r", "--resume") == 0


def test_too_many_stop_the_run(images: Path, tmp_path: Path, capsys) -> None:
    assert run_here("--ds_config", images_file(tmp_path, max_bad_fraction=0.05), "--run", "r") == 1
    assert "images are unreadable, and `d2v.data.max_bad_fraction` is 0.05" in capsys.readouterr().err
    assert len(RunFolder(tmp_path / "runs/r").lines("bad_files.txt")) == 3


def test_nothing_readable_stops_before_training(images: Path, tmp_path: Path, capsys) -> None:
    for path in images.iterdir():
        path.write_bytes(b"junk")
    assert run_here("--ds_config", images_file(tmp_path, max_bad_fraction=1.0), "--run", "r") == 1
    assert "16 were tried and none can be read" in capsys.readouterr().err
    assert not (tmp_path / "runs/r").exists()
