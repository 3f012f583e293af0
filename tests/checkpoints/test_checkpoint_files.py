"""Only the regular files that its manifest lists are opened in a checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2v_fast.checkpoints.files import MANIFEST, STATE, verified_checkpoint
from d2v_fast.checkpoints.shard_files import DamageError
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from tests.helpers.checkpoint_files import edit_state, kept, save, write_manifest, write_shards_anew

SHARD = "shard-00000.safetensors"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3, world=World("cpu"))


@pytest.fixture(autouse=True)
def _not_forever():
    """End a test whose process is blocked by opening a pipe as a file."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def problem(folder: Path, step: int) -> str:
    with pytest.raises(DamageError) as caught:
        verified_checkpoint(folder, step)
    return str(caught.value)


def ranges(step: int, *cuts: int) -> list[dict[str, Tensor]]:
    """Return the tensors of `save`, the first of them divided over several shards at these elements."""
    value = torch.full((15,), float(step))
    stops = [*cuts, 15]
    parts = [{f"student/a.weight@{a}": value[a:b].clone()} for a, b in zip([0, *cuts], stops, strict=True)]
    parts[0] |= {"student/b": torch.tensor(step, dtype=torch.bfloat16), "teacher/t": torch.zeros(4, 3)}
    return parts


def test_copy_over_a_folder_with_more_shards_is_no_mixture(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Refuse a mixture: manifest and first shard of one save, the other two shards of another."""
    save(checkpoints, 1)
    save(checkpoints, 2)
    target = checkpoints.folder / "step-2"
    shutil.copytree(target, tmp_path / "copy")
    write_shards_anew(target, *ranges(200, 4, 9))
    verified_checkpoint(target, 2).close()
    shutil.copytree(tmp_path / "copy", target, dirs_exist_ok=True)
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.step == 1
    assert told == [
        "checkpoint step-2 is damaged (shard-00001.safetensors is not listed in manifest.json: move it out of the "
        "folder): kept as step-2.damaged, falling back to the one before it"
    ]
    read = torch.zeros(3, 5)
    found.reader().read(kept("student", "a.weight", read))
    assert torch.equal(read, torch.ones(3, 5))


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "notes.txt", "state.json.bak", "a folder/"])
def test_what_the_manifest_does_not_list_is_an_error(name: str, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        shutil.copy(folder / SHARD, folder / name)
    assert problem(folder, 5) == f"{name.rstrip('/')} is not listed in manifest.json: move it out of the folder"
    # files that desktops and network file systems leave in every folder
    (folder / name).rename(folder / ".nfs0001")
    verified_checkpoint(folder, 5).close()


@pytest.mark.parametrize("name", [MANIFEST, STATE, SHARD])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "nothing", "socket"])
def test_only_regular_files_are_opened(kind: str, name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Pipes do not block, links are not followed, and the checkpoint before is used."""
    save(checkpoints, 4)
    path = save(checkpoints, 5) / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140600)
    words = "is missing" if kind == "nothing" else f"is not a regular file, but a {kind}"
    assert problem(path.parent, 5) == f"{name} {words}"
    found = checkpoints.newest(lambda _: None)
    assert found is not None
    assert found.step == 4


def test_linked_folders_are_not_followed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Only the folder of all checkpoints may be a link, for example to another disk."""
    folder = save(checkpoints, 5)
    (tmp_path / "outside").mkdir()
    shutil.move(folder / SHARD, tmp_path / "outside" / SHARD)
    (folder / "inside").symlink_to(tmp_path / "outside")
    manifest = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(manifest.replace(SHARD, f"inside/{SHARD}"))
    assert problem(folder, 5) == f'manifest.json names "inside/{SHARD}", which is not a file of a checkpoint'
    (folder / MANIFEST).write_text(manifest)
    shutil.move(tmp_path / "outside" / SHARD, folder / SHARD)
    assert problem(folder, 5) == "inside is not listed in manifest.json: move it out of the folder"
    (folder / "inside").unlink()
    folder.rename(tmp_path / "outside" / "step-5")
    folder.symlink_to(tmp_path / "outside" / "step-5")
    assert "a link" in problem(folder, 5)
    told: list[str] = []
    with pytest.raises(RunError, match=r"no usable checkpoint .* step-5 is a link, which is not followed"):
        checkpoints.newest(told.append)
    assert told == [
        "step-5 is a link, which is not followed: put the folder itself in its place to use it. It stays as it is."
    ]
    assert folder.is_symlink()
    (tmp_path / "disk").symlink_to(tmp_path / "outside")
    verified_checkpoint(tmp_path / "disk" / "step-5", 5).close()


CASES = {
    "gap": (lambda parts: [parts[0], parts[2]], "no file holds student/a.weight from 4 on"),
    "lost end": (lambda parts: parts[:2], "no file holds student/a.weight from 9 on"),
    "lost begin": (lambda parts: [{k: v for k, v in parts[0].items() if "@" not in k}, *parts[1:]], "weight from 0 on"),
    "doubled": (lambda parts: [*parts, parts[1]], "shard-00003.safetensors holds student/a.weight from 4 on, which"),
    "overlap": (
        lambda parts: [parts[0], {"student/a.weight@3": torch.zeros(6)}, parts[2]],
        "shard-00001.safetensors holds student/a.weight from 3 on, which another range holds",
    ),
    "whole and a range": (lambda parts: [*parts, {"student/a.weight": torch.zeros(3, 5)}], "which another range holds"),
    "beyond the end": (
        lambda parts: [*parts, {"student/a.weight@15": torch.zeros(9)}],
        "student/a.weight has 15 elements, but the files hold 24",
    ),
    "other shape": (
        lambda parts: [{**parts[0], "teacher/t": torch.zeros(3, 4)}, *parts[1:]],
        "teacher/t is [3, 4] in shard-00000.safetensors, and [4, 3] in the checkpoint",
    ),
    "other name": (lambda parts: [*parts, {"student/c": torch.zeros(1)}], "holds student/c, which is no tensor"),
    "no range": (lambda parts: [*parts, {"student/a.weight@04": torch.zeros(1)}], "a.weight@04, which is no range"),
    "huge start": (lambda parts: [*parts, {f"student/a.weight@{'9' * 5000}": torch.zeros(1)}], "which is no range"),
    "whole numbers": (
        lambda parts: [*parts[:2], {"student/a.weight@9": torch.zeros(6, dtype=torch.int64)}],
        "student/a.weight@9 in shard-00002.safetensors holds I64 and no real numbers",
    ),
    "no tensors at all": (lambda parts: [], "no file holds student/a.weight from 0 on"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_held_once(case: str, checkpoints: Checkpoints) -> None:
    """Shards that overlap or leave gaps are refused even if every hash is right."""
    folder = save(checkpoints, 5)
    write_shards_anew(folder, *ranges(5, 4, 9))
    with verified_checkpoint(folder, 5) as checkpoint:
        assert torch.equal(checkpoint.reader().whole("student/a.weight"), torch.full((3, 5), 5.0))
    edit, words = CASES[case]
    write_shards_anew(folder, *edit(ranges(5, 4, 9)))
    assert words in problem(folder, 5)


def test_shard_that_is_left_out_of_the_manifest(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    write_shards_anew(folder, *ranges(5, 4, 9))
    write_manifest(folder, without="shard-00001.safetensors")
    assert problem(folder, 5) == "shard-00001.safetensors is not listed in manifest.json: move it out of the folder"
    (folder / "shard-00001.safetensors").unlink()
    assert problem(folder, 5) == "no file holds student/a.weight from 4 on"


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"{}xx", b"no tensors"])
def test_shard_that_is_no_file_of_tensors(content: bytes, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    (folder / SHARD).write_bytes(content)
    write_manifest(folder)
    assert "shard-00000.safetensors is no safetensors file" in problem(folder, 5)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (None, "`shapes` in state.json must give a list of sizes for every tensor"),
        ({"student/a.weight": [3, -5]}, "must give a list of sizes"),
        ({"student/a.weight": [3.0, 5]}, "must give a list of sizes"),
        ({"student/a.weight": [True, 15]}, "must give a list of sizes"),
        # refused before memory is allocated
        ({"student/a.weight": [10**12, 10**5]}, "is [3, 5] in shard-00000.safetensors, and [1000000000000, 100000]"),
        ({}, "holds student/a.weight, which is no tensor of the checkpoint"),
    ],
)
def test_shapes_that_cannot_be(shapes: object, words: str, checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    edit_state(folder, lambda state: state.update(shapes=shapes))
    assert words in problem(folder, 5)


def test_what_was_checked_is_what_is_read(checkpoints: Checkpoints) -> None:
    """A file that replaces a verified one is not read, and a file that changes after its check is an error."""
    folder = save(checkpoints, 5)
    with verified_checkpoint(folder, 5) as checkpoint:
        other = folder.with_name("other")
        shutil.copytree(folder, other)
        write_shards_anew(other, *ranges(7))
        for path in other.iterdir():
            path.replace(folder / path.name)
        assert torch.equal(checkpoint.reader().whole("student/a.weight"), torch.full((3, 5), 5.0))
    with verified_checkpoint(folder, 5) as checkpoint:
        assert torch.equal(checkpoint.reader().whole("student/a.weight"), torch.full((3, 5), 7.0))
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[:-1] + b"x")
        os.utime(folder / SHARD, ns=(0, 1))
        with pytest.raises(OSError, match="was changed while it was read"):
            checkpoint.reader().whole("student/a.weight")


def test_checkpoint_that_is_deleted_meanwhile_is_read_to_its_end(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 5)
    with verified_checkpoint(folder, 5) as checkpoint:
        shutil.rmtree(folder)
        assert torch.equal(checkpoint.reader().whole("student/a.weight"), torch.full((3, 5), 5.0))
