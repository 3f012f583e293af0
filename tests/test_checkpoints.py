"""Checkpoints and the run folder: complete or absent, every byte checked, nothing executed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

from d2v_fast import faults
from d2v_fast.checkpoints import Checkpoints, require_same_tensors, verify
from d2v_fast.run_folder import RunFolder
from d2v_fast.world import RunError, World


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu"))


def save(checkpoints: Checkpoints, step: int) -> Path:
    """A checkpoint with tensors, an engine's file, and a folder of an engine's files."""

    def save_engine(folder: Path) -> None:
        (folder / "engine").mkdir()
        torch.save({"step": step, "moments": torch.randn(40)}, folder / "engine" / "moments.pt")

    weights = {"a.weight": torch.full((3, 5), float(step)), "b": torch.tensor(step, dtype=torch.bfloat16)}
    # a transposed view: not contiguous
    checkpoints.save(
        step, {"skipped": 1}, lambda: {"student": weights, "teacher": {"t": torch.randn(4, 3).T}}, save_engine
    )
    return checkpoints.folder / f"step-{step}"


def test_save_and_load(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 7)
    assert verify(folder, 7) is None
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.folder == folder
    assert found.state == {"skipped": 1, "step": 7}
    assert torch.equal(found.tensors("student")["a.weight"], torch.full((3, 5), 7.0))
    assert found.tensors("student")["b"].dtype == torch.bfloat16
    assert found.tensors("teacher")["t"].shape == (3, 4)
    assert checkpoints.newest(pytest.fail) is not None


def test_none_at_all(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest(pytest.fail) is None


def test_newest_stay_and_order_is_by_number(checkpoints: Checkpoints) -> None:
    for step in (8, 9, 10, 100):
        save(checkpoints, step)
    assert checkpoints.steps() == [100, 10]
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10", "step-100"]


def test_a_step_is_never_written_twice(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 3)
    before = (folder / "manifest.json").read_bytes()
    save(checkpoints, 3)
    assert (folder / "manifest.json").read_bytes() == before


def test_any_flipped_bit_is_found(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == 5
    draw = random.Random()
    for path in files * 6:
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        problem = verify(folder, 5)
        if path.name == "manifest.json":
            # white space between its entries has no meaning
            assert problem is not None or json.loads(changed) == json.loads(content), (place, bit)
        else:
            assert problem == f"{path.relative_to(folder)} has another content than was written", (place, bit)
        path.write_bytes(content)
    assert verify(folder, 5) is None


def test_truncated_and_missing_files_are_found(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert verify(folder, 5) is not None, path
        path.unlink()
        assert verify(folder, 5) is not None, path
        path.write_bytes(content)
    assert verify(folder, 6) == "manifest.json is of step 5"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", ".", "a//b", "x\n"])
def test_manifest_cannot_point_outside(name: str, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    problem = verify(folder, 5)
    assert problem is not None
    assert "not a file in the folder" in problem or "missing" in problem


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": ' + "[" * 40 + "]" * 40 + "}", "[]", '{"step": 5}'])
def test_manifest_that_is_none(content: str, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    (folder / "manifest.json").write_text(content)
    problem = verify(folder, 5)
    assert problem is not None
    assert problem.startswith("manifest.json cannot be read: ")


def test_symbolic_link_is_no_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = save(checkpoints, 5)
    path = folder / "student.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert verify(folder, 5) == "student.safetensors is missing"


def test_falls_back_and_keeps_the_damaged_one(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    (folder / "student.safetensors").write_bytes(b"")
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.state["step"] == 1
    assert "step-2 is damaged (student.safetensors has 0 bytes instead of" in told[0]
    assert (checkpoints.folder / "step-2.damaged").is_dir()
    save(checkpoints, 2)
    assert checkpoints.steps() == [2, 1]


def test_leftovers_of_a_dead_process_are_removed(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    left = checkpoints.folder / "step-2.tmp-4711"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    save(checkpoints, 2)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("point", ["save.tensors", "save.manifest", "save.rename"])
def test_full_disk(point: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoints, 1)
    monkeypatch.setattr(faults, "_fault", faults.Fault(f"{point}:1:full"))
    with pytest.raises(RunError, match=r"step-2 could not be written .* No space left on device.* Step-1 before it"):
        save(checkpoints, 2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]
    assert checkpoints.newest(pytest.fail) is not None


def test_engine_that_fails_leaves_nothing(checkpoints: Checkpoints) -> None:
    def save_engine(folder: Path) -> None:
        raise RuntimeError("unexpected pos 17152 vs 17046")

    with pytest.raises(RunError, match="unexpected pos"):
        checkpoints.save(1, {}, dict, save_engine)
    assert list(checkpoints.folder.iterdir()) == []


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def test_pickles_are_not_executed(tmp_path: Path) -> None:
    from d2v_fast.config import parse_config
    from d2v_fast.engine import PlainEngine

    raw = {"train_batch_size": 1, "optimizer": {"params": {"lr": 1e-3}}, "d2v": {"data": {"path": "x"}}}
    raw["d2v"]["model"] = {"channels": 1}
    raw["d2v"]["data"] |= {"kind": "images", "mean": [0.5], "std": [0.5]}
    engine = PlainEngine(torch.nn.Linear(2, 2), parse_config(raw), World("cpu"))
    torch.save({"state": Evil(tmp_path / "marker"), "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        engine.load(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_other_model_is_named() -> None:
    saved = {"a": torch.zeros(2), "b": torch.zeros(3)}
    require_same_tensors(saved, {"a": torch.ones(2), "b": torch.ones(3)}, "student")
    with pytest.raises(RunError) as caught:
        require_same_tensors(saved, {"a": torch.zeros(2, 1), "c": torch.zeros(1)}, "student")
    for line in ("c is not in the checkpoint", "b is only in the checkpoint", "a is [2] in the checkpoint and [2, 1]"):
        assert line in str(caught.value)


def test_fault_needs_a_point_and_a_count() -> None:
    for text in ("save", "save:x", "save:1:later"):
        with pytest.raises(ValueError, match="D2V_FAULT"):
            faults.Fault(text)


def test_run_folder_is_written_as_a_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "deep" / "runs", None, "digits")
    assert folder.name == "digits-1"
    folder.append_json("probe.json", {"step": 5, "x": 1})
    folder.append_json("probe.json", {"step": 9, "x": 2})
    # of a run that was put back to step 4
    folder.append_json("probe.json", {"step": 5, "x": 3})
    assert json.loads((folder.path / "probe.json").read_text()) == [{"step": 5, "x": 3}]
    assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "probe.json"]
    folder.close()


def test_run_folder_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "runs", None, "x")
