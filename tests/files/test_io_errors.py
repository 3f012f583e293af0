"""The advice about a system error fits its cause and comes from one place."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from d2v_fast.checkpoints import store
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.cli.run import explain
from d2v_fast.data.cache import made_once
from d2v_fast.distributed.world import World
from d2v_fast.errors import DataError, RunError
from d2v_fast.files import io_errors
from d2v_fast.files.io_errors import advice, error_number
from d2v_fast.modalities.text.tokens import MANIFEST, Tokens
from tests.helpers.checkpoint_files import kept

FITTING = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "The quota of this user",
    errno.EROFS: "is read-only",
    errno.EACCES: "lacks the permission",
    errno.EIO: "reported a fault",
    errno.ESTALE: "network file system",
    errno.EMFILE: "ulimit -n",
}


def save(folder: Path) -> None:
    Checkpoints(folder / "checkpoints", keep=2, world=World("cpu")).save(3, {}, [kept("student", "a", torch.ones(3))])


@pytest.mark.parametrize("number", FITTING, ids=errno.errorcode.get)
@pytest.mark.parametrize("rust", [False, True])
def test_checkpoint_that_cannot_be_written(
    tmp_path: Path, number: int, rust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Python or safetensors, which is written in Rust, met the error."""
    text = os.strerror(number)
    error = Exception(f"I/O error: {text} (os error {number})") if rust else OSError(number, text)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(store, "write_shards", fail)
    with pytest.raises(RunError) as caught:
        Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu")).save(
            3, {}, [kept("student", "a", torch.ones(3))]
        )
    told = str(caught.value)
    assert text in told
    assert FITTING[number] in told
    assert ("Make room" in told) == (number == errno.ENOSPC)
    assert "--resume" in told


def test_error_without_a_number_gets_no_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("student/a holds values that are not finite")

    monkeypatch.setattr(store, "_require_finite", fail)
    with pytest.raises(RunError, match=r"There is no earlier checkpoint. To continue: ") as caught:
        Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu")).save(
            3, {}, [kept("student", "a", torch.ones(3))]
        )
    assert "Make room" not in str(caught.value)


def test_folder_of_checkpoints_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(RunError, match=r"step-3 could not be written.*is read-only.*--resume"):
        Checkpoints(tmp_path / "checkpoints", keep=2, world=World("cpu")).save(
            3, {}, [kept("student", "a", torch.ones(3))]
        )


def test_full_disk_without_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = os.statvfs(tmp_path)

    class Found:
        f_files, f_favail, f_bavail = 1000, 0, full.f_bavail + 1

    monkeypatch.setattr(io_errors.os, "statvfs", lambda path: Found)
    assert "no further file" in advice(OSError(errno.ENOSPC, ""), tmp_path / "not" / "there")
    # of a file system that makes inodes as they are needed
    Found.f_files = 0
    assert "Make room" in advice(OSError(errno.ENOSPC, ""), tmp_path)


@pytest.mark.parametrize("number", FITTING, ids=errno.errorcode.get)
def test_every_command_and_the_cache_use_it(tmp_path: Path, number: int) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "a"))
    words = explain(error)
    assert words is not None
    assert FITTING[number] in words

    def make(folder: Path) -> None:
        raise error

    with pytest.raises(DataError, match=FITTING[number]):
        made_once(str(tmp_path), "name", make)


def test_numbers_and_what_has_none() -> None:
    assert error_number(OSError(5, "a")) == 5
    assert error_number(ValueError("a (os error 28)")) == 28
    assert error_number(ConnectionError("a")) is error_number(None) is error_number(ValueError("28")) is None
    assert advice(FileNotFoundError(errno.ENOENT, "a"), "b") == advice(None, "b") == ""
    assert explain(FileNotFoundError(errno.ENOENT, "none", "b")) == "[Errno 2] none: 'b'"


def test_tokens_that_a_disk_cannot_read_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / MANIFEST))

    monkeypatch.setattr("d2v_fast.modalities.text.tokens.read_json", fail)
    with pytest.raises(DataError, match=r"cannot be read: .*reported a fault") as caught:
        Tokens(tmp_path)
    assert "Remove" not in str(caught.value)


def test_another_process_says_why_it_failed(tmp_path: Path) -> None:
    """The first process reports the reason of the one that failed, and what fits it."""

    class Two(World):
        def collect(self, value: object) -> list[object]:
            told = ["OSError: [Errno 30] Read-only file system", "The file system of x is read-only: do y"]
            return [value, told if value is None else value]

    world = Two("cpu")
    world.size = 2
    checkpoints_of_two = Checkpoints(tmp_path / "checkpoints", keep=2, world=world)
    with pytest.raises(
        RunError,
        match=r": rank 1: OSError: .* Read-only file system. There is no earlier checkpoint. The file system of x",
    ):
        checkpoints_of_two._require_success(3, tmp_path / "temporary", None)
