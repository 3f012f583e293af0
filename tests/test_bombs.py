"""Small files that would become large: each is refused, or read, with a bounded peak of memory.

Every case runs in a process of its own.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.interop.fairseq_files import read_pickle


def measured(call: Callable[[], object]) -> tuple[int, str]:
    """Call a function in a copy of this process; return bytes that it needed at its peak, and what it said.

    That is the text of its exception, or of what it returned.
    """

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        said, before = "", peak()
        try:
            said = str(call())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, f"{peak() - before} {said[:10_000]}".encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        used, _, said = answer.read().decode().partition(" ")
    assert os.waitpid(process, 0)[1] == 0
    return int(used), said


def test_peaks_are_measured() -> None:
    used, said = measured(lambda: len(bytearray(300_000_000)))
    assert 290e6 < used < 400e6
    assert said == "300000000"
    used, said = measured(lambda: int("no number"))
    assert used < 20e6
    assert said.startswith("ValueError: invalid literal")


def saved(content: Any, **options: Any) -> dict[str, bytes]:
    """The entries of a file of `torch.save`."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


class Calls:
    """A pickle of it calls a function with these arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def with_pickle(path: Path, content: Any) -> Path:
    """A file of torch.save that holds any pickle."""
    entries = saved({"model": {}})
    [name] = [name for name in entries if name.endswith("data.pkl")]
    return archived(path, {**entries, name: pickle.dumps(content, protocol=2)})


def doubled(depth: int) -> list[Any]:
    """A list of 2^depth values that takes a few bytes per level."""
    value: list[Any] = ["a"]
    for _ in range(depth):
        value = [value, value]
    return value


def deflated(path: Path) -> Path:
    return archived(path, saved({"model": {"a": torch.zeros(20_000_000)}}), zipfile.ZIP_DEFLATED)


def expanded(path: Path) -> Path:
    torch.save({"model": {"a": torch.zeros(1).expand(10**9)}}, path)
    return path


def overlapping(path: Path) -> Path:
    """Two entries of the directory that lead to the same bytes."""
    archived(path, {**saved({"model": {"a": torch.zeros(4), "b": torch.zeros(4)}})})
    with zipfile.ZipFile(path, "a") as archive:
        first, second = (one for one in archive.infolist() if "/data/" in one.filename)
        second.header_offset = first.header_offset
        archive._didModify = True
    return path


PICKLES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "deflated": (deflated, "compressed, which torch.save never does"),
    "expanded": (expanded, "holds tensors of 4,000,000,000 bytes, more than the 67,108,864 allowed"),
    "overlapping": (overlapping, "where another entry is"),
    "bytearray": (lambda path: with_pickle(path, {"model": Calls(bytearray, 10**9)}), "needs builtins.bytearray"),
    "codec": (
        lambda path: with_pickle(path, {"model": Calls(__import__("_codecs").encode, "a" * 100, "utf-32")}),
        "needs _codecs.encode",
    ),
    "tensor": (lambda path: with_pickle(path, {"model": Calls(torch.Tensor, 10**9)}), "needs torch.Tensor"),
    "doubled": (lambda path: with_pickle(path, {"model": {}, "cfg": doubled(60)}), "holds more than 2,000,000 values"),
    "deep": (lambda path: with_pickle(path, {"model": {}, "cfg": doubled(90)}), "nested more than 64 levels"),
    "long": (lambda path: with_pickle(path, {"model": {}, "cfg": [()] * 1_000_001}), "more than 1,000,000 operations"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_would_become_large(tmp_path: Path, kind: str) -> None:
    make, reason = PICKLES[kind]
    path = make(tmp_path / "a.pt")
    used, said = measured(lambda: read_pickle(path))
    assert reason in said
    assert used < 100e6


def test_harmless_pickles_are_read(tmp_path: Path) -> None:
    tied = torch.ones(1000, 1000)
    content = {"model": {"a": tied, "b": tied, "c": torch.nn.Parameter(tied[:1].half())}, "kinds": {torch.float16}}
    for name, options in (("new.pt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save(content, tmp_path / name, **options)
        found = read_pickle(tmp_path / name)
        assert found["kinds"] == {torch.float16}
        assert torch.equal(found["model"]["b"], tied)
