"""Tokenized shards: their content, their reuse, and damage to them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.errors import DataError
from d2v_fast.files import faults
from d2v_fast.modalities.text import tokens as tokens_module
from d2v_fast.modalities.text.files import PIECE, Piece, TextFiles, pieces_of
from d2v_fast.modalities.text.tokens import Tokens, tokenized
from tests.helpers.places import ROOT
from tests.helpers.runs import fork, wait
from tests.helpers.text_files import config, documents, sentences, small_tokenizer, tokens_of

pytest.importorskip("tokenizers")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(sentences(50)), encoding="utf-8")
    (folder / "b.txt").write_text("\n".join(sentences(40, seed=1)), encoding="utf-8")
    return folder


def joined(pieces: list[Piece]) -> list[str]:
    found = [""]
    for piece in pieces:
        found[-1] += piece.text
        if piece.ends:
            found.append("")
    assert found.pop() == ""
    return found


def test_documents_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n one\n  two \n \n\n\nthree\n\n", encoding="utf-8")
    (tmp_path / "b.TXT").write_bytes("\ufefffour\r\nfive\r\n\r\nsix".encode())
    found = {
        "file": ["one\n  two \n \n\n\nthree", "four\nfive\n\nsix"],
        "paragraph": ["one\n  two", "three", "four\nfive", "six"],
        "line": ["one", "two", "three", "four", "five", "six"],
    }
    for kind, expected in found.items():
        tokens = tokens_of(tmp_path, tmp_path / kind, documents=kind)
        assert documents(tokens) == expected
        assert tokens.num_documents == len(expected)
        assert tokens.num_tokens == tokens.document_lengths().sum()


def test_documents_of_jsonl(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"text": "one", "id": 123456789012345678901234567890}',
        "",
        '{"text": "t\\u00e9 \\ud83d\\ude00", "more": {"text": "no"}}',
        '{"body": 1, "text": ""}',
        '{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tokens = tokens_of(tmp_path, tmp_path / "out")
    assert documents(tokens) == ["one", "té \U0001f600", "last"]
    assert tokens.manifest["num_empty"] == 1
    (tmp_path / "a.jsonl").write_text('{"body": "two\\n\\nparagraphs"}\n')
    assert documents(tokens_of(tmp_path, tmp_path / "out", field="body", documents="line")) == ["two\n\nparagraphs"]


def test_documents_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = sentences(700)
    for name, kind in (("a.parquet", pyarrow.string()), ("b.parquet", pyarrow.large_string())):
        column = pyarrow.array(texts, kind)
        parquet.write_table(pyarrow.table({"n": list(range(700)), "text": column}), tmp_path / name, row_group_size=100)
    assert documents(tokens_of(tmp_path, tmp_path / "out")) == texts * 2


def test_long_documents_are_read_in_pieces() -> None:
    words = " ".join(sentences(20_000))
    assert len(words) > 20 * PIECE
    kinds = {
        "words": words,
        "lines": words.replace(".", ".\n").strip(),
        "one word": "x" * (5 * PIECE + 7),
        "blanks": "a" + " " * (3 * PIECE) + "b",
        "exact": "y" * (2 * PIECE),
    }
    for text in kinds.values():
        for step in (1000, PIECE, 10 * PIECE):
            parts = [*(text[i : i + step] for i in range(0, len(text), step)), None, "short", None, " \n", None]
            pieces = list(pieces_of(iter(parts)))
            assert joined(pieces) == [text, "short", ""]
            assert max(len(piece.text) for piece in pieces) <= PIECE
    # the division does not change the tokens
    ids, _ = small_tokenizer().encode([words])
    in_pieces, _ = small_tokenizer().encode([piece.text for piece in pieces_of([words, None])])
    np.testing.assert_array_equal(in_pieces, ids)
    # a last document without an end counts
    assert list(pieces_of(["broken"])) == [Piece("broken", True)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(alphabet="ab \n", max_size=30)), max_size=40))
def test_pieces_of_any_parts(parts: list[str | None]) -> None:
    expected = [""]
    for part in [*parts, None] if parts and parts[-1] is not None else parts:
        if part is None:
            expected.append("")
        else:
            expected[-1] += part
    assert joined(list(pieces_of(iter(parts)))) == [text.strip() for text in expected[:-1]]


def test_reading_any_range(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokens_of(text, tmp_path / "one", documents="line")
    expected = whole.read(0, whole.num_tokens)
    assert len(list(whole.folder.glob("*.bin"))) == 2
    # shards of a few documents each, and batches of a few pieces
    monkeypatch.setattr(tokens_module, "SHARD_TOKENS", 100)
    monkeypatch.setattr(tokens_module, "MAX_BATCH", 300)
    tokens = tokens_of(text, tmp_path / "many", documents="line")
    assert len(list(tokens.folder.glob("tokens-*.bin"))) > 5
    np.testing.assert_array_equal(tokens.document_lengths(), whole.document_lengths())
    generator = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(generator.integers(0, tokens.num_tokens + 1, 2).tolist())
        np.testing.assert_array_equal(tokens.read(start, stop), expected[start:stop])
    assert tokens.read(5, 6).dtype == np.int64


@pytest.mark.parametrize("min_tokens", [1, 10, 40])
def test_short_documents_are_left_out(
    text: Path, tmp_path: Path, min_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (text / "a.txt").read_text().splitlines() + (text / "b.txt").read_text().splitlines()
    kept = [line for line in lines if small_tokenizer().encode([line])[1][0] >= min_tokens]
    assert 0 < len(kept) <= 90
    for name, batch in (("large", 1 << 20), ("small", 300)):
        monkeypatch.setattr(tokens_module, "MAX_BATCH", batch)
        tokens = tokens_of(text, tmp_path / name, documents="line", min_tokens=min_tokens)
        assert documents(tokens) == kept
        assert tokens.manifest["num_short"] == 90 - len(kept)


def test_nothing_is_long_enough(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"`d2v\.data\.min_tokens` must leave some documents, but all 2 have fewer than"
    ):
        tokens_of(text, tmp_path / "out", min_tokens=10**6)
    assert not list((tmp_path / "out").iterdir())


def test_document_over_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "MAX_BATCH", 1)
    (tmp_path / "a.txt").write_text(" ".join(sentences(6000)), encoding="utf-8")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    tokens = tokens_of(tmp_path, tmp_path / "out", min_tokens=60_000)
    assert documents(tokens) == [(tmp_path / "a.txt").read_text()]


def made_again(monkeypatch: pytest.MonkeyPatch, *arguments: object, **options: object) -> bool:
    """Return whether `tokens_of` tokenizes."""
    calls = []
    encode = type(small_tokenizer()).encode
    with monkeypatch.context() as patch:
        patch.setattr(type(small_tokenizer()), "encode", lambda *texts: calls.append(1) or encode(*texts))
        tokens_of(*arguments, **options)
    return bool(calls)


def test_used_again_only_if_nothing_changed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    assert made_again(monkeypatch, text, root)
    assert not made_again(monkeypatch, text, root)
    # limits on unreadable text do not change the tokens
    assert not made_again(monkeypatch, text, root, max_bad_fraction=0.5, strict=True)
    # the folder may move
    moved = text.rename(tmp_path / "moved")
    assert not made_again(monkeypatch, moved, root)
    assert made_again(monkeypatch, moved, root, min_tokens=2)
    assert made_again(monkeypatch, moved, root, documents="line")
    assert made_again(monkeypatch, moved, root, encoding_errors="replace")
    status = (moved / "a.txt").stat()
    os.utime(moved / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert made_again(monkeypatch, moved, root)
    (moved / "c.txt").write_text("one more")
    assert made_again(monkeypatch, moved, root)
    assert len(list(root.iterdir())) == 6


def test_limits_are_judged_again(text: Path, tmp_path: Path) -> None:
    (text / "c.txt").write_bytes(b"\xff")
    assert tokens_of(text, tmp_path / "out").manifest["num_unreadable"] == 1
    with pytest.raises(DataError, match=r"`d2v\.data\.strict` is true"):
        tokens_of(text, tmp_path / "out", strict=True)
    with pytest.raises(DataError, match=r"1 of 3 files.* are unreadable, and `d2v\.data\.max_bad_fraction` is 0"):
        tokens_of(text, tmp_path / "out", max_bad_fraction=0.0)


def test_files_that_change_meanwhile(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TextFiles(config(text))
    pieces = source.pieces

    def and_change():
        yield from pieces()
        (text / "a.txt").write_text("another")

    monkeypatch.setattr(source, "pieces", and_change)
    with pytest.raises(DataError, match=r"must not change while it is tokenized, but it did\. Start again"):
        tokenized(source, small_tokenizer(), str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("file", ["tokens-00000.bin", "documents-00000.bin", "manifest.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "longer", "missing", "empty", "link"])
def test_edited_file_is_named(text: Path, tmp_path: Path, file: str, fault: str) -> None:
    tokens = tokens_of(text, tmp_path / "out")
    path = tokens.folder / file
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[len(content) // 2] ^= 1
    changed = {"cut": content[: len(content) // 2], "longer": content + b"\0", "empty": b""}.get(fault, content)
    path.unlink()
    if fault == "link":
        (tmp_path / "elsewhere").write_bytes(changed)
        path.symlink_to(tmp_path / "elsewhere")
        if file == "manifest.json":
            pytest.skip("the manifest may be a link: its content is checked")
    elif fault != "missing":
        path.write_bytes(changed)
    with pytest.raises(DataError) as caught:
        tokens_of(text, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"the tokens in '{tokens.folder}' must be as they were written, but {file} is not: ")
    assert message.endswith("Remove that folder; it will be made again.")
    # sizes are always checked
    if file != "manifest.json" and fault != "flipped":
        with pytest.raises(DataError, match=file):
            Tokens(tokens.folder, verify=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(num_tokens=5),
        lambda manifest: manifest.update(files={}),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest.update(files={"../other": {"bytes": 1, "sha256": ""}}),
        lambda manifest: manifest.update(dtype="object"),
        lambda manifest: manifest.update(dtype=[]),
        lambda manifest: manifest.pop("dtype"),
        lambda manifest: manifest.pop("sha256"),
        lambda manifest: manifest.update(inputs="other"),
    ],
)
@pytest.mark.parametrize("fits", [False, True])
def test_edited_manifest(text: Path, tmp_path: Path, change, fits: bool) -> None:
    path = tokens_of(text, tmp_path / "out").folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if fits and "sha256" in manifest:
        # with a matching checksum
        manifest.pop("sha256")
        manifest["sha256"] = tokens_module._digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"must be as they were written, but .* Remove that folder"):
        tokens_of(text, tmp_path / "out")


def test_worker_gets_no_copy(text: Path, tmp_path: Path) -> None:
    tokens = tokens_of(text, tmp_path / "out", documents="line")
    expected = tokens.read(0, tokens.num_tokens)
    sent = pickle.dumps(tokens)
    assert len(sent) < 5000
    np.testing.assert_array_equal(pickle.loads(sent).read(0, tokens.num_tokens), expected)


def start(text: Path, root: Path, output: Path, fault: str | None = None) -> int:
    """Fork a process that tokenizes and prints the number of tokens; return its id."""
    # trained before the fork, and cached
    small_tokenizer()

    def work() -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        faults._fault = faults.Fault(fault) if fault else None
        print(tokens_of(text, root).num_tokens)
        return 0

    return fork(work, output)


@pytest.mark.parametrize("point", ["tokens.shard", "cache.renamed"])
def test_killed_while_writing(text: Path, tmp_path: Path, point: str) -> None:
    root = tmp_path / "out"
    assert wait(start(text, root, tmp_path / "output", f"{point}:1")) == [-signal.SIGKILL]
    assert len(list(root.glob("tokens-*"))) == (point == "cache.renamed")
    tokens_of(text, root)
    left = sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))
    assert len(left) == 1
    assert left[0].startswith("tokens-")


def test_full_disk(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_fault", faults.Fault("tokens.manifest:1:ENOSPC"))
    with pytest.raises(DataError, match=r"`d2v\.data\.tokens_path` must be .*No space left.*Make room"):
        tokens_of(text, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_two_at_once(text: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"output-{number}" for number in range(2)]
    statuses = wait(*[start(text, tmp_path / "out", output) for output in outputs])
    answers = [output.read_text() for output in outputs]
    assert statuses == [0, 0], answers
    assert answers[0] == answers[1]
    assert int(answers[0]) > 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_read_only_folder_with_everything_in_it(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    tokens_of(text, root)
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    monkeypatch.setattr(Path, "mkdir", lambda *arguments, **options: pytest.fail("nothing is written"))
    assert tokens_of(text, root).num_documents == 2


# sample the memory: the peak that the system reports includes that of the parent process
MEASURE = """
import os, sys, threading, time
from pathlib import Path
from tests.helpers.text_files import tokens_of
warm, text, root = map(Path, sys.argv[1:])
tokens_of(warm, root, documents="line")
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, peak = resident(), [0]
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
tokens = tokens_of(text, root)
print((peak[0] - before) // 1024, tokens.num_documents)
"""


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [12, 50])
def test_memory_does_not_grow_with_the_text(text: Path, tmp_path: Path, megabytes: int) -> None:
    # one document, longer than all buffers
    large = tmp_path / "large.txt"
    block = "\n".join(sentences(10_000)) + "\n"
    with large.open("w", encoding="utf-8") as file:
        for _ in range(megabytes * 1_000_000 // len(block.encode()) + 1):
            file.write(block)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, str(text), str(large), str(tmp_path / "out")]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    grown, num_documents = map(int, done.stdout.split()[-2:])
    print(f"{megabytes} MB in {time.monotonic() - started:.1f} s: {grown / 1024:.0f} MiB")
    assert num_documents == 1
    # kB, for threads and a few megabytes of text in flight
    assert grown < 200_000
