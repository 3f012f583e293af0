"""Files that somebody else wrote: limits while reading, and text that no terminal obeys."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_fast.untrusted import MAX_DEPTH, MAX_DIGITS, is_path, parse_json, printable, read_json, read_text


def test_printable() -> None:
    assert printable("a\x1b[2J\n\u202eb") == "a\\x1b[2J\\n\\u202eb"
    assert printable("Ünï 図 ~") == "Ünï 図 ~"
    assert printable(os.fsdecode(b"\xff\xfe.png")) == "\\xff\\xfe.png"
    assert printable("\ud800") == "\\ud800"


@given(st.text(st.characters(codec=None)))
def test_printable_is_one_line_of_text(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()
    assert printable(shown) == shown


def test_is_path() -> None:
    assert is_path("/data/ünï")
    assert is_path(os.fsdecode(b"/data/\xff"))
    assert not is_path("/data/\0")
    assert not is_path("/data/\ud800")


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_depth(opening: str, closing: str) -> None:
    levels = MAX_DEPTH // (2 if opening.startswith("[{") else 1)
    parse_json(nested(levels, opening, closing))
    for depth in (levels + 1, 200, 100_000):
        with pytest.raises(ValueError, match="nested too deeply: more than 32 levels"):
            parse_json(nested(depth, opening, closing))


def test_wide_is_not_deep() -> None:
    assert parse_json(json.dumps([[]] * 10_000)) == [[]] * 10_000


def test_digits() -> None:
    assert parse_json("[" + "9" * MAX_DIGITS + ", -1, 1e400]") == [10**MAX_DIGITS - 1, -1, float("inf")]
    for digits in ("1" * (MAX_DIGITS + 1), "-" + "1" * 5000):
        with pytest.raises(ValueError, match="an integer of more than 18 digits"):
            parse_json(f'{{"a": {digits}}}')


def test_file_size(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, 8) == {"a": 1}
    with pytest.raises(ValueError, match="longer than 7 bytes"):
        read_text(path, 7)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(path, 7)


@pytest.mark.alone
def test_endless_file_is_not_read_to_its_end() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="longer than 1,000,000 bytes"):
        read_text("/dev/zero", 1_000_000)
    assert time.perf_counter() - start < 1
