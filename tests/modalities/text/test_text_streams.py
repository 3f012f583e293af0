"""Compressed text, JSON lines with other endings, and binary files: read, or named and left out."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_fast.data.listing import describe_listing
from d2v_fast.errors import DataError
from d2v_fast.modalities.text import files as text_files
from d2v_fast.modalities.text import streams as text_streams
from d2v_fast.modalities.text.files import TextFiles
from tests.helpers.text_files import config, documents, sentences, texts, tokens_of

LINES = sentences(300)
JSON_LINES = "".join(json.dumps({"id": 10**25, "text": line}) + "\n" for line in LINES).encode()


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    found: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return found


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACK, ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".ndjson", ".json", ".JSONL"])
def test_every_ending_is_read(ending: str, packed: str, tmp_path: Path) -> None:
    content = "\n".join(LINES).encode() if ending == ".txt" else b"\xef\xbb\xbf" + JSON_LINES
    # in two compressed members, as several programs write them
    half = len(content) // 2
    parts = [PACK[packed](part) for part in (content[:half], content[half:])]
    (tmp_path / f"a{ending}{packed}").write_bytes(b"".join(parts))
    assert texts(tmp_path, documents="line") == LINES
    assert texts(tmp_path / f"a{ending}{packed}", documents="line") == LINES


def test_listing_names_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSON_LINES))
    (tmp_path / "b.json").write_bytes(JSON_LINES)
    (tmp_path / "info.json").write_text('{\n "text": "about these files"\n}')
    (tmp_path / "list.json").write_text(json.dumps([{"text": "one"}]))
    (tmp_path / "other.json").write_text('{"body": "one"}\n')
    (tmp_path / "c.txt.xz").write_bytes(b"")
    source = TextFiles(config(tmp_path))
    assert source.listing.used == {".jsonl.gz": 1, ".json": 1}
    said = "\n".join(describe_listing(source.listing, "2 blocks"))
    assert "2 blocks in 2 files (1 .json, 1 .jsonl.gz)" in said
    assert "left out: 3 .json files without JSON lines that have the field 'text' (`d2v.data.field`): info.json" in said
    assert "left out: 1 file (1 .txt.xz): not read, unpack them" in said
    assert len(list(source.pieces())) == 2 * len(LINES)
    assert source.bad.num_bad == 0
    # a path to such a file, or to a folder with nothing else, is an error
    with pytest.raises(DataError, match=r"A \.json file is read if every line is an object"):
        TextFiles(config(tmp_path / "list.json"))
    (tmp_path / "only").mkdir()
    (tmp_path / "info.json").rename(tmp_path / "only" / "info.json")
    with pytest.raises(DataError, match=r"1 \.json file without JSON lines that have the field 'text' .*info\.json"):
        TextFiles(config(tmp_path / "only"))


def test_a_json_file_with_a_bad_first_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "cut\n' + JSON_LINES)
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()] == LINES
    assert source.bad.num_bad == 1


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-4], "cut off"),
        (lambda content: content[: len(content) // 2], "cut off"),
        (lambda content: b"plain text", "damaged"),
        (lambda content: content[:40] + bytes(20) + content[60:], "damaged"),
    ],
    ids=["end", "half", "plain", "zeros"],
)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json"])
def test_damaged_compression_is_named(
    ending: str, packed: str, damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{ending}{packed}"
    path.write_bytes(damage(PACK[packed](JSON_LINES)))
    (tmp_path / "b.txt").write_text(LINES[0])
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    found = [piece.text for piece in source.pieces()]
    assert found[-1] == LINES[0]
    # JSON lines before the damage are used
    assert found[:-1] == LINES[: len(found) - 1]
    kind = {".gz": "gzip", ".zst": "zstd"}[packed]
    assert any(named.startswith(f"{path}: the {kind} data is {reason}") for named in source.bad.named), source.bad.named


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_bombs_are_refused(ending: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_streams, "MIN_LIMIT", 1 << 20)
    bomb = PACK[packed](b" " * (1 << 23))
    assert len(bomb) * text_streams.MAX_RATIO < 1 << 23
    (tmp_path / f"a{ending}{packed}").write_bytes(bomb)
    (tmp_path / "b.txt").write_text(LINES[0])
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()] == [LINES[0]]
    assert "decompresses to more than " in source.bad.named[0]


def test_ordinary_repetition_is_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"the same line\n" * 300_000))
    assert len(texts(tmp_path)) == 1


def test_progress_is_of_the_file_as_it_is_stored(tmp_path: Path) -> None:
    content = gzip.compress(os.urandom(1 << 21).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(content)
    source = TextFiles(config(tmp_path))
    seen = []
    for _ in source.pieces():
        seen.append(source.num_read)
    assert seen == sorted(seen)
    assert 0 < seen[0] <= source.num_bytes == len(content)
    assert len(set(seen)) > 1


def test_documents_of_a_compressed_file_are_tokenized(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(JSON_LINES))
    assert documents(tokens_of(tmp_path, tmp_path / "out")) == LINES


def test_a_zero_byte_among_text_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one zero\0byte among a lot of text")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "another\0one"}\n{"text": "and\\u0000a third"}\n')
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()] == ["and\0a third"]
    assert '(if the rest is text, set `d2v.data.encoding_errors` to "replace")' in source.bad.named[0]
    found = texts(tmp_path, encoding_errors="replace")
    assert found == ["one zero\ufffdbyte among a lot of text", "another\ufffdone", "and\0a third"]


@pytest.mark.parametrize(
    "content",
    [
        b"\0\xff",
        "text without a mark".encode("utf-16-le"),
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"abcdefgh" * 4,
        # compressed data has few zeros, and many other bytes that do not occur in text
        zlib.compress(os.urandom(1 << 16)) + b"\0",
    ],
    ids=["two", "utf-16", "elf", "random"],
)
def test_what_is_binary_stays_unread(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text(LINES[0])
    source = TextFiles(config(tmp_path, encoding_errors="replace"))
    assert [piece.text for piece in source.pieces()] == [LINES[0]]
    assert "a binary file: byte " in source.bad.named[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_named_for_lines_too(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode(encoding))
    (tmp_path / "b.txt").write_text(LINES[0])
    source = TextFiles(config(tmp_path, encoding_errors="replace"))
    assert [piece.text for piece in source.pieces()] == [LINES[0]]
    assert source.bad.named == [f"{tmp_path / 'a.jsonl'}: {encoding.upper()} instead of UTF-8: convert it"]


def test_one_wrong_string_of_a_table_costs_one_row(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = pyarrow.array([b"one", b"caf\xe9", b"three"])
    strings = pyarrow.StringArray.from_buffers(3, *values.buffers()[1:])
    parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "a.parquet")
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()] == ["one", "three"]
    assert source.bad.named[0].startswith(f"{tmp_path / 'a.parquet'}, row 2: column 'text' is not UTF-8 at byte 3")
    assert texts(tmp_path, encoding_errors="replace") == ["one", "caf\ufffd", "three"]


def test_endings_that_are_read_are_not_called_unread() -> None:
    assert not set(text_files.KINDS.read) & set(text_files.KINDS.unread)
