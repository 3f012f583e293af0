"""Bad text and tokenizers are named, counted or refused, and never raise a library's own exception."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_fast.config.errors import check
from d2v_fast.errors import DataError
from d2v_fast.modalities.text import files as text_files
from d2v_fast.modalities.text import streams
from d2v_fast.modalities.text.config import TextDataConfig, TextModelConfig, TokenMaskConfig
from d2v_fast.modalities.text.files import TextFiles
from d2v_fast.modalities.text.tokenizer import load_tokenizer
from tests.helpers.text_files import config, documents, sentences, small_tokenizer, texts, tokens_of

pytest.importorskip("tokenizers")

GOOD = "the student reads"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x00", "a binary file: byte 7 is zero"),
        (b"a" * 3_000_000 + b"\0", "a binary file: byte 3,000,000 is zero"),
        ("text".encode("utf-16"), "UTF-16 instead of UTF-8: convert it"),
        ("text".encode("utf-16-be"), "a binary file: byte 0 is zero"),
        ("Straße".encode("latin-1"), 'not UTF-8 at byte 4 (to read it, set `d2v.data.encoding_errors` to "replace")'),
        (b"a" * (1 << 20) + b"\xe4 ", "not UTF-8 at byte 1,048,576 "),
        # a letter across two chunks
        (b"a" * ((1 << 20) - 1) + b"\xc3a", "not UTF-8 at byte 1,048,575 "),
        ("text ü".encode()[:-1], "cut off within a UTF-8 character at its end"),
        (b"\xed\xa0\x80", "not UTF-8 at byte 0 "),
    ],
)
def test_bad_text_file_is_named_and_left_out(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text(GOOD)
    source = TextFiles(config(tmp_path))
    assert [piece.text for piece in source.pieces()] == [GOOD]
    assert (source.bad.num_bad, source.bad.num_entries) == (1, 2)
    assert source.bad.named[0].startswith(f"{tmp_path / 'a.txt'}: {reason}")
    with pytest.raises(DataError, match=r"unreadable text, and `d2v.data.strict` is true:\n  .*a\.txt: "):
        texts(tmp_path, strict=True)
    with pytest.raises(
        DataError, match=r"1 of 2 files, lines and rows are unreadable, and `d2v.data.max_bad_fraction`"
    ):
        texts(tmp_path, max_bad_fraction=0.0)


def test_letters_across_chunks(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / "a.txt").write_text("a" * shift + "\U0001f600" * 600_000, encoding="utf-8")
        assert "".join(texts(tmp_path)) == "a" * shift + "\U0001f600" * 600_000


def test_wrong_bytes_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Straße".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "half \\ud83d a pair"}\n')
    assert texts(tmp_path, encoding_errors="replace") == ["Stra\ufffde", "caf\ufffd", "half \ufffd a pair"]
    # binary files are still left out
    (tmp_path / "a.txt").write_bytes(b"\0\xff")
    assert len(texts(tmp_path, encoding_errors="replace")) == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"no json", "not valid JSON: Expecting value at line 1, column 1"),
        (b'{"text": "cut', "not valid JSON: Unterminated string"),
        (b'["text"]', "not a JSON object {...}"),
        (b'{"body": "a", "title": "b"}', "no field 'text' (`d2v.data.field`); it has 'body', 'title'"),
        (b"{}", "no field 'text' (`d2v.data.field`); it has none"),
        (b'{"text": null}', "field 'text' holds null instead of text"),
        (b'{"text": 7}', "field 'text' holds int instead of text"),
        (b'{"text": ["a"]}', "field 'text' holds list instead of text"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10 "),
        (b'{"text": "\\ud83d"}', "field 'text' holds an unpaired surrogate at character 0"),
        (b'{"text": ' + b"[" * 100_000, "n"),
        (b'{"text": "a", "deep": ' + b"[" * 40 + b"]" * 40 + b"}", "nested too deeply: more than 32 levels"),
        (b"\0" * 100, "not valid JSON"),
        (b'{"text": "a' + b"x" * 3000 + b'"}', "a line of more than 2,000 bytes"),
    ],
)
def test_bad_line_is_named_and_left_out(
    tmp_path: Path, line: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"xxx" in line:
        for module in (text_files, streams):
            monkeypatch.setattr(module, "MAX_LINE", 2000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}')
    source = TextFiles(config(path))
    assert [piece.text for piece in source.pieces()] == ["one", "two"]
    assert (source.bad.num_bad, source.bad.num_entries) == (1, 3)
    assert source.bad.named[0].startswith(f"{path}, line 2: {reason}")
    assert source.bad.named[0].isprintable()


def test_missing_field_stops_reading_early(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(5000):
            file.write('{"body": "a"}\n')
    source = TextFiles(config(tmp_path))
    with pytest.raises(DataError, match=r"101 of 101 files, lines and rows .*\n.*line 1: no field 'text'"):
        list(source.pieces())
    # 1 % of about 7,000 lines is allowed; reading stops beyond 2 %, which the rest cannot compensate
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 2000 + '{"body": "a"}\n' * 5000)
    source = TextFiles(config(tmp_path))
    with pytest.raises(DataError, match=r"141 of 2141 .*and `d2v.data.max_bad_fraction` is 0.01") as caught:
        list(source.pieces())
    assert "more" in str(caught.value)
    assert len(texts(tmp_path, max_bad_fraction=1.0)) == 2000


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[: len(content) // 2], r"a\.parquet: Parquet magic bytes not found"),
        (lambda content: b"PAR1" * 100, r"a\.parquet: "),
        (lambda content: b"", r"a\.parquet: Parquet file size is 0 bytes"),
        (lambda content: content[:60] + b"\xff" * 40 + content[100:], r"a\.parquet"),
    ],
)
def test_damaged_parquet(tmp_path: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": sentences(1000)}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(damage(content))
    (tmp_path / "b.txt").write_text(GOOD)
    source = TextFiles(config(tmp_path, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()][-1] == GOOD
    assert source.bad.num_bad == 1
    with pytest.raises(DataError, match=reason):
        texts(tmp_path, strict=True)


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: .*text.* exists 2 times"):
        list(TextFiles(config(tmp_path)).pieces())


def test_parquet_of_other_columns(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": ["a", None, "c"], "number": [1, 2, 3], "lists": [["a"], ["b"], []]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text' .*; it has 'body', 'number', 'lists'"):
        texts(tmp_path)
    assert texts(tmp_path, field="body") == ["a", "c"]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: column 'body' holds null instead of text"):
        texts(tmp_path, field="body", strict=True)
    with pytest.raises(DataError, match=r"row 1: column 'number' holds int instead of text"):
        texts(tmp_path, field="number")
    with pytest.raises(DataError, match=r"column 'lists' .* holds list<element: string> instead of single values"):
        texts(tmp_path, field="lists")


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"with pyarrow, which cannot be imported.*pip install 'd2v_fast\[parquet\]'"):
        texts(tmp_path)
    small_tokenizer().save(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"with tokenizers, which cannot be imported.*pip install 'd2v_fast\[train\]'"):
        load_tokenizer(tmp_path)


def test_no_text_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        texts(tmp_path / "none")
    with pytest.raises(DataError, match=r"must hold text \(\.txt, \.txt\.gz, .*\.jsonl, .*\.parquet\)"):
        texts(tmp_path)
    (tmp_path / "a.md").write_text(GOOD)
    with pytest.raises(DataError, match=r"a file that ends with \.txt, .*\.parquet, but is '.*a\.md' instead"):
        texts(tmp_path / "a.md")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\n")
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"none of 3 files in '.*' has any \(2 empty documents, 0 unreadable\)"):
        texts(tmp_path)


def test_empty_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(GOOD)
    with caplog.at_level(logging.INFO):
        tokens = tokens_of(tmp_path, tmp_path / "out", strict=True)
    assert documents(tokens) == [GOOD]
    assert tokens.manifest["num_empty"] == 1
    assert "left out 1 empty documents" in caplog.text


def test_odd_files(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(GOOD)
    os.mkfifo(folder / "b.txt")
    (folder / "c.txt").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "outside.txt").write_text("outside")
    (folder / "d\n\x1b[31m.txt").write_bytes(b"\0")
    (folder / "e.txt").symlink_to(folder / "gone.txt")
    source = TextFiles(config(folder, max_bad_fraction=1.0))
    assert [piece.text for piece in source.pieces()] == [GOOD]
    assert source.bad.num_bad == 4
    assert all(text.isprintable() for text in source.bad.named)
    assert "not a regular file" in source.bad.named[0]
    assert "a link out of the folder" in source.bad.named[1]
    assert texts(folder, max_bad_fraction=1.0, follow_outside=True) == [GOOD, "outside"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a folder without tokenizer.json, and without vocab.json and merges.txt"),
        ({"tokenizer.json": "no json"}, "not valid JSON"),
        ({"tokenizer.json": "[]"}, "JSON, but not a tokenizer"),
        ({"tokenizer.json": "{}"}, "JSON, but not a tokenizer: it has no section `model`"),
        ({"tokenizer.json": '{"model": {}}'}, "cannot be read"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 99999999999999999999}}}'}, "more than 18 digits"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'}, "no begin token"),
        ({"vocab.json": "{}"}, "a folder without"),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, "vocab.json must number its 1 tokens consecutively from 0"),
        ({"vocab.json": '{"a": "0"}', "merges.txt": ""}, "vocab.json must number"),
        ({"vocab.json": '{"a": true}', "merges.txt": ""}, "vocab.json must number"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b"}, "line 2 of merges.txt must be a pair"),
        ({"vocab.json": '{"a": 0, "b": 1, "ab": 2, "\u0120": 3}', "merges.txt": "a b"}, "no begin .*no end .*no mask"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "\udcff"}, "cannot be read"),
    ],
)  # fmt: skip
def test_bad_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(DataError, match=rf"`d2v\.data\.tokenizer` must .*{message}") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).isprintable()


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file or directory"):
        load_tokenizer(tmp_path / "none.json")


def test_any_damage_of_a_tokenizer_is_an_error_or_none(tmp_path: Path) -> None:
    small_tokenizer().save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    generator = random.Random(1)
    messages = []
    for _ in range(150):
        damaged = bytearray(content)
        start = generator.randrange(len(content))
        if generator.random() < 0.5:
            del damaged[start : start + generator.randrange(1, 200)]
        else:
            damaged[start] = generator.randrange(256)
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            load_tokenizer(tmp_path / "tokenizer.json").encode([GOOD])
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(map(str.isprintable, messages))


@pytest.mark.parametrize(
    ("section", "raw", "message"),
    [
        (TextDataConfig, {"kind": "text"}, '`x.path` must be a file or a folder with `kind` "text", but is null'),
        (TextDataConfig, {"kind": "text", "path": "a"}, '`x.tokenizer` must be a file or a folder with `kind` "text"'),
        (TextDataConfig, {"tokens_path": "a\0"}, "`x.tokens_path` must be a path that the system can hold"),
        (TextDataConfig, {"field": ""}, "`x.field` must name a field or column"),
        (TextDataConfig, {"block_size": 3}, "`x.block_size` must be in [4, 65536], but is 3"),
        (TextDataConfig, {"packing": "best"}, "`x.packing` must be 'document' or 'stream', but is \"best\""),
        (TextModelConfig, {"heads": 7}, "`x.heads` must divide `width` (768), but is 7"),
        (TextModelConfig, {"vocab_size": 2}, "`x.vocab_size` must be in [8, "),
        (TokenMaskConfig, {"mode": "words"}, "`x.mode` must be 'span' or 'bert', but is \"words\""),
        (TokenMaskConfig, {"mode": []}, "`x.mode` must be 'span' or 'bert', but is []"),
        (TokenMaskConfig, {"mode": "bert", "length": 4}, '`x.length` must be 1 with `mode` "bert", but is 4'),
        (TokenMaskConfig, {"keep_prob": 0.5, "random_prob": 0.7}, "`x.keep_prob` must be <= 0.3, which is 1 - `random"),
        (TokenMaskConfig, {"keep_prob": 0.5, "random_prob": 0.5}, "`x.loss_on_kept` must be true where"),
    ],
)  # fmt: skip
def test_impossible_values(section: type, raw: dict[str, object], message: str) -> None:
    found, problems = check(section, raw, "x")
    assert found is None
    assert any(problem.startswith(message) for problem in problems), problems


def test_defaults_follow_the_mode() -> None:
    span, bert = TokenMaskConfig(), TokenMaskConfig(mode="bert")
    assert (span.prob, span.length, span.keep_prob, span.random_prob) == (0.35, 4, 0, 0)
    assert (bert.prob, bert.length, bert.keep_prob, bert.random_prob) == (0.15, 1, 0.1, 0.1)
    assert TokenMaskConfig(mode="bert", prob=0.3).prob == 0.3
    assert TokenMaskConfig.model_validate(bert.model_dump()) == bert
    assert json.loads(TextDataConfig().model_dump_json())["documents"] == "file"
    assert TextModelConfig().position_rows == 514


@pytest.mark.parametrize("bad", ["line", "file"])
def test_bad_entries_at_the_beginning_are_judged_against_all_text(tmp_path: Path, bad: str) -> None:
    """100 of 20,000 lines, or 20 of 2,400 files, are less than 1 %, although all of the first are unreadable."""
    if bad == "line":
        (tmp_path / "a.jsonl").write_text('{"body": "a"}\n' * 100 + '{"text": "a"}\n' * 19_900)
        assert len(texts(tmp_path)) == 19_900
        return
    for i in range(2400):
        (tmp_path / f"{i:04d}.txt").write_bytes(b"\0" if i < 20 else b"some words")
    assert len(texts(tmp_path)) == 2380
