"""Checkpoints are complete or absent, every byte is checked, and nothing in them is executed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.checkpoints.files import MANIFEST, verified_checkpoint
from d2v_fast.checkpoints.shard_files import DamageError, HeldFile, Kept, ShardReader, copy_to_host, write_shards
from d2v_fast.checkpoints.store import Checkpoints, require_same_shapes
from d2v_fast.distributed.shards import Shard
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.files import faults
from d2v_fast.training.run_folder import RunFolder
from tests.helpers.checkpoint_files import kept, save


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu"))


def verify(folder: Path, step: int) -> str | None:
    """Return what is damaged in a checkpoint, or None."""
    try:
        verified_checkpoint(folder, step).close()
    except DamageError as error:
        return str(error)
    return None


def test_save_and_load(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 7)
    assert verify(folder, 7) is None
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.folder == folder
    assert found.state["skipped"] == 1
    assert found.state["step"] == 7
    assert found.state["shapes"] == {"student/a.weight": [3, 5], "student/b": [], "teacher/t": [4, 3]}
    weight, b = torch.zeros(3, 5), torch.zeros((), dtype=torch.bfloat16)
    reader = found.reader()
    for entry in (kept("student", "a.weight", weight), kept("student", "b", b)):
        reader.read(entry)
    assert torch.equal(weight, torch.full((3, 5), 7.0))
    assert b == 7
    with pytest.raises(RunError, match="does not hold all of student/c: from 0 on"):
        reader.read(kept("student", "c", torch.zeros(2)))


def test_background_save_is_of_its_moment(checkpoints: Checkpoints) -> None:
    value = torch.zeros(1_000_000)
    checkpoints.save(1, {}, [kept("student", "a", value)], in_background=True)
    value.fill_(1.0)
    # the folder gets its name only after its content is on the disk
    while not checkpoints.steps():
        checkpoints.advance()
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    read = torch.ones(1_000_000)
    found.reader().read(kept("student", "a", read))
    assert not read.any()


def test_next_save_waits_for_the_one_before(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        save(checkpoints, step, in_background=True)
    assert checkpoints.steps() == [2, 1]
    checkpoints.finish()
    assert checkpoints.steps() == [3, 2]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    written=st.lists(st.integers(0, 40), max_size=4),
    wanted=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_any_division_is_read_into_any_other(size: int, written: list, wanted: tuple) -> None:
    value = torch.arange(size, dtype=torch.float32)
    cuts = [0, *sorted(cut for cut in set(written) if 0 < cut < size), size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            shard = Shard("x", value.shape, start, value[start:stop], value, start, replicated=False)
            write_shards(
                folder / f"shard-{number:05d}.safetensors", copy_to_host([Kept("k", shard)], even_if_there=False)
            )
        reader = ShardReader([HeldFile(path, folder) for path in folder.iterdir()], {"k/x": [size]})
        start, stop = sorted(min(place, size) for place in wanted)
        read = torch.full((stop - start,), -1.0)
        reader.read(Kept("k", Shard("x", value.shape, start, read, read, 0, replicated=False)))
        assert torch.equal(read, value[start:stop])
        assert torch.equal(reader.whole("k/x"), value)


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
    assert len(files) == 3
    draw = random.Random()
    for path in files * 6:
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        problem = verify(folder, 5)
        if path.name == "manifest.json":
            # white space between entries has no meaning
            assert problem is not None or json.loads(changed) == json.loads(content), (place, bit)
        else:
            assert problem == f"{path.relative_to(folder)} has another content than was written", (place, bit)
        path.write_bytes(content)
    assert verify(folder, 5) is None


def test_truncated_and_missing_files_are_found(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in paths} == {".json", ".safetensors"}
    for path in paths:
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
    assert "which is not a file of a checkpoint" in problem


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": ' + "[" * 40 + "]" * 40 + "}", "[]", '{"step": 5}'])
def test_manifest_that_is_none(content: str, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    (folder / "manifest.json").write_text(content)
    problem = verify(folder, 5)
    assert problem is not None
    assert problem.startswith("manifest.json cannot be read: ")


def test_symbolic_link_is_no_file(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = save(checkpoints, 5)
    path = folder / "shard-00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert verify(folder, 5) == "shard-00000.safetensors is not a regular file, but a link"


def test_falls_back_and_keeps_the_damaged_one(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    folder = save(checkpoints, 2)
    (folder / "shard-00000.safetensors").write_bytes(b"")
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.state["step"] == 1
    assert "step-2 is damaged (shard-00000.safetensors has 0 bytes instead of" in told[0]
    assert (checkpoints.folder / "step-2.damaged").is_dir()
    save(checkpoints, 2)
    assert checkpoints.steps() == [2, 1]


def test_leftovers_of_a_dead_process_are_removed(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    left = checkpoints.folder / "step-2.tmp-4711"
    left.mkdir()
    (left / "shard-00000.safetensors.part").write_bytes(b"x")
    save(checkpoints, 2)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("point", ["save.tensors", "save.manifest", "save.rename"])
def test_full_disk(point: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoints, 1)
    monkeypatch.setattr(faults, "_fault", faults.Fault(f"{point}:1:ENOSPC"))
    with pytest.raises(
        RunError,
        match=r"step-2 could not be written .* No space left on device.* The earlier checkpoint step-1 is intact",
    ):
        save(checkpoints, 2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]
    assert checkpoints.newest(pytest.fail) is not None


def test_room_is_asked_for_first(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    save(checkpoints, 1)
    usage = shutil.disk_usage(checkpoints.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(RunError, match=r"step-2 takes 4 MB, and .* has 1 MB left"):
        checkpoints.save(2, {}, [kept("student", "a", torch.zeros(1_000_000))])
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_is_not_finite_is_not_saved(in_background: bool, checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    bad = torch.ones(3, 5)
    bad[1, 2] = torch.inf

    def save_bad() -> None:
        checkpoints.save(2, {}, [kept("student", "a", bad)], in_background=in_background)
        checkpoints.finish()

    with pytest.raises(RunError, match=r"step-2 could not be written .*student/a holds values that are not finite"):
        save_bad()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_pickles_are_not_executed(form: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Replace each file by a pickle that would make a folder when loaded, with a manifest that fits."""
    names = [path.name for path in save(checkpoints, 1).iterdir()]
    assert len(names) == 3
    for step, name in enumerate(names, start=2):
        folder = save(checkpoints, step)
        content = io.BytesIO()
        (torch.save if form == "torch.save" else pickle.dump)({"x": Evil(tmp_path / "marker")}, content)
        (folder / name).write_bytes(content.getvalue())
        if name != MANIFEST:
            manifest = json.loads((folder / MANIFEST).read_text())
            manifest["files"][name] = {
                "bytes": len(content.getvalue()),
                "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
            }
            (folder / MANIFEST).write_text(json.dumps(manifest))
        with contextlib.suppress(Exception):
            found = checkpoints.newest(lambda _: None)
            assert found is not None
            found.reader().read(kept("student", "a.weight", torch.zeros(3, 5)))
        assert not (tmp_path / "marker").exists(), name


def test_other_model_is_named() -> None:
    saved = {"a": [2], "b": [3]}
    require_same_shapes(saved, {"a": torch.Size([2]), "b": [3]}, "student")
    with pytest.raises(RunError) as caught:
        require_same_shapes(saved, {"a": [2, 1], "c": [1]}, "student")
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
    # as in a run that was set back to step 4
    folder.append_json("probe.json", {"step": 5, "x": 3})
    assert json.loads((folder.path / "probe.json").read_text()) == [{"step": 5, "x": 3}]
    assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "probe.json"]
    folder.close()


def test_run_folder_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "runs", None, "x")
