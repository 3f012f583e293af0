"""Small files that would expand to large ones are refused, or read with a bounded peak of memory.

Every case runs in a process of its own.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.data.files import UnreadableFile
from d2v_fast.errors import DataError
from d2v_fast.interop.fairseq_files import read_pickle
from d2v_fast.interop.folders import read_weights
from d2v_fast.modalities.text import parquet as parquet_files
from d2v_fast.modalities.text.files import TextFiles
from tests.helpers.bounded_memory import measured
from tests.helpers.text_files import config


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
    torch.save({"ids": torch.arange(3).to(torch.uint16)}, tmp_path / "ids.pt")
    assert read_pickle(tmp_path / "ids.pt")["ids"].tolist() == [0, 1, 2]


def texts(path: Path, **options: Any) -> str:
    """What is read of text files: documents, characters, and what is left out."""
    source = TextFiles(config(path, max_bad_fraction=1.0, **options))
    sizes = [0]
    for piece in source.pieces():
        sizes[-1] += len(piece.text)
        if piece.ends:
            sizes.append(0)
    return f"{len(sizes) - 1} documents, {sum(sizes)} characters, {source.bad.named}"


def test_headers_of_safetensors(tmp_path: Path) -> None:
    names = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
    header = b"{%s}" % names
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    used, found = measured(lambda: read_weights(tmp_path))
    assert " bytes is more than 4,000,000" in found
    assert used < 20e6


LINES: dict[str, tuple[bytes, str]] = {
    "lists": (b'{"text": "a", "other": [%s[]]}' % (b"[]," * 4_000_000), "holds more than 1,048,576 values"),
    "sections": (b'{"text": "a", "other": [%s[]]}' % (b'{"a":1},' * 1_500_000), "holds more than 1,048,576 values"),
    "letters": (b'{"text": "\xf0\x9f\x98\x80%s"}' % (b"text, " * 1_000_000), "2 documents, 6000004 characters, []"),
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_of_json(tmp_path: Path, kind: str) -> None:
    line, said = LINES[kind]
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "good"}\n')
    used, found = measured(lambda: texts(tmp_path))
    assert said in found
    # of text, four bytes for a letter, three times
    assert used < (12 * len(line) + 30e6 if kind == "letters" else 80e6)


def table_of(path: Path, *columns: Any, **options: Any) -> Path:
    """A .parquet file of columns `text`, `other` and so on."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["text", "other"][: len(columns)]
    parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path, **options)
    return path


def test_dictionary_that_repeats_a_long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(parquet_files, "MIN_LIMIT", 9_000_000)
    # one entry of 4 MB, and a bit for each of 3,000 rows
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, pyarrow.int32()), ["a " * 2_000_000])
    path = table_of(tmp_path / "a.parquet", rows, compression="zstd")
    assert path.stat().st_size < 3000
    used, found = measured(lambda: texts(tmp_path))
    assert re.search(r"^2 documents, 7999998 characters, .*after row 2: holds more than 9,000,000 characters", found)
    assert used < 200e6


def test_pages_that_become_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_of(tmp_path / "a.parquet", ["a" * 70_000_000], compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 30_000
    monkeypatch.setattr(parquet_files, "MIN_LIMIT", 1 << 26)
    used, found = measured(lambda: texts(tmp_path))
    assert "decompresses to more than 67,108,864 bytes" in found
    assert used < 50e6
    monkeypatch.setattr(parquet_files, "MIN_LIMIT", 1 << 40)
    monkeypatch.setattr(parquet_files, "MAX_PAGE_BYTES", 60_000_000)
    used, found = measured(lambda: texts(tmp_path))
    assert "bytes exceeds 60,000,000" in found
    assert used < 50e6


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}])
def test_text_that_repeats_itself_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    """A log or a set of prompts may be compressed thousandfold, and is read to its end."""
    line = "the same words again and again. " * 1500
    path = table_of(tmp_path / "a.parquet", [line + str(i) for i in range(1600)], compression="zstd", **options)
    assert os.path.getsize(path) < 76_000_000 / 500
    with open(path, "rb") as file:
        rows = [row[0] for _, row in parquet_files.parquet_rows(file, {"text": "`d2v.data.field`"})]
    assert len(rows) == 1600
    assert rows[-1] == line + "1599"


def test_lists_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    table_of(tmp_path / "a.parquet", [["a"] * 3_000_000], ["b"])
    used, found = measured(lambda: texts(tmp_path))
    assert "column 'text' (`d2v.data.field`) holds list<" in found
    assert used < 60e6
    assert texts(tmp_path, field="other").startswith("1 documents")


def test_rows_without_text_end_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "MIN_LIMIT", 1000)
    monkeypatch.setattr(parquet_files, "MAX_RATIO", 2)
    table_of(tmp_path / "a.parquet", [None] * 100_000)
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    with pytest.raises(DataError, match="none of 1 files"):
        list(source.pieces())
    assert source.bad.num_bad < 10_000


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "gzip"}]
)
def test_long_and_short_rows_are_read_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    wanted = [f"{number} " * (40_000 if number % 100 == 0 else 9) for number in range(1000)]
    table_of(tmp_path / "a.parquet", wanted, list(range(1000)), row_group_size=300, data_page_size=1 << 16, **options)
    with (tmp_path / "a.parquet").open("rb") as file:
        rows = [row for _, row in parquet_files.parquet_rows(file, {"text": "key", "other": "key"})]
    assert rows == list(zip(wanted, range(1000), strict=True))


@given(place=st.integers(4, 5000), change=st.binary(min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_any_damage_of_a_table_is_an_error_or_none(place: int, change: bytes) -> None:
    content = table_content()
    place %= len(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(content[:place] + change + content[place + len(change) :])
        with path.open("rb") as file, suppress(UnreadableFile):
            for _ in parquet_files.parquet_rows(file, {"text": "key"}):
                pass


@lru_cache(maxsize=1)
def table_content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = table_of(Path(folder) / "a.parquet", [f"row {number}" * 3 for number in range(200)], data_page_size=500)
        return path.read_bytes()
