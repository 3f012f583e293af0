"""Files of others are read with limits, and their text cannot control a terminal."""

from __future__ import annotations

import json
import os
import pickle
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2v_fast.files.reading import (
    MAX_DEPTH,
    MAX_DIGITS,
    NotRegularError,
    is_path,
    open_regular,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
    require_regular,
)


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


def test_many_values() -> None:
    assert parse_json("[0, [1], {}]", max_values=5) == [0, [1], {}]
    for text in ("[0, [1], {}]", "[[[[[]]]]]", '{"a": [1, 2, "b,", 3, {}]}', '["\\"", 1, 2, 3, 4]'):
        with pytest.raises(ValueError, match="holds more than 4 values"):
            parse_json(text, max_values=4)
    # commas and brackets in strings are no values
    assert parse_json('["a, b, c, [, {, \\", d, e, \\\\", 7]', max_values=2) == ['a, b, c, [, {, ", d, e, \\', 7]


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


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """What is no regular file, by what messages call it, each also behind a link."""
    places = {what: tmp_path / what.replace(" ", "-") for what in ("a pipe", "a folder", "a socket")}
    os.mkfifo(places["a pipe"])
    places["a folder"].mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(places["a socket"]))
    return {**places, "a device": Path("/dev/zero")}


def test_only_regular_files_are_opened(odd: dict[str, Path], tmp_path: Path) -> None:
    readers = (open_regular, require_regular, lambda one: read_text(one, 100), lambda one: read_json(one, 100))
    for what, path in odd.items():
        link = tmp_path / f"link-to-{path.name}"
        link.symlink_to(path)
        for place in (path, link):
            for read in readers:
                with pytest.raises(NotRegularError) as caught:
                    read(place)
                assert str(caught.value) == f"'{place}' is not a regular file, but {what}"
                assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_links_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "real" / "sub" / "a").write_bytes(b"content")
    # the folder itself may be a link
    (tmp_path / "run").symlink_to("real")
    (tmp_path / "real" / "linked").symlink_to("sub")
    (tmp_path / "real" / "b").symlink_to("sub/a")
    run = tmp_path / "run"
    assert read_bytes(run / "sub" / "a", 7, below=run) == b"content"
    assert read_bytes(run / "linked" / "a", 7) == read_bytes(run / "b", 7) == b"content"
    with pytest.raises(NotRegularError, match=r"'.*run/linked/a' is not a regular file, but in '.*run/linked', a link"):
        read_bytes(run / "linked" / "a", 7, below=run)
    with pytest.raises(NotRegularError, match=r"'.*run/b' is not a regular file, but a link"):
        read_bytes(run / "b", 7, below=run)
    for outside in (run / ".." / "real" / "sub" / "a", tmp_path / "real" / "sub" / "a"):
        with pytest.raises(ValueError, match="is not in the subpath"):
            read_bytes(outside, 7, below=run)


def test_pipe_that_replaces_the_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    before = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: before)
        with pytest.raises(NotRegularError, match="a pipe"):
            open_regular(path)
