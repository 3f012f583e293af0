"""Any edit of a valid file is refused by key or changes the parsed configuration; none is ignored."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2v_fast.config import ConfigError, load_config, parse_config
from tests.helpers.places import ROOT
from tests.helpers.runs import TINY

CONFIGS = ROOT / "configs"
# with the optional sections of DeepSpeed that are checked key by key
FULL = load_config(CONFIGS / "digits.json").to_dict() | {
    "fp16": {"enabled": False, "initial_scale_power": 12},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "none"}},
}
PARSED = parse_config(FULL).to_dict()


def leaves(section: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in section.items():
        found += leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return found


def place_of(raw: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path[:-1]:
        raw = raw[part]
    return raw


def value_at(raw: dict[str, Any], path: tuple[str, ...]) -> Any:
    return place_of(raw, path).get(path[-1])


def outcome(raw: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What is parsed, or what is said against it."""
    try:
        return parse_config(raw).to_dict(), ""
    except ConfigError as error:
        return None, "\n".join(error.problems)


def is_named(path: tuple[str, ...], said: str) -> bool:
    """Whether a sentence names the key itself, or one that it does not go with, which then mentions this one."""
    dotted = ".".join(path)
    return f"`{dotted}`" in said or f"`{dotted}." in said or f"`{path[-1]}`" in said


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
)
values = scalars | st.lists(scalars, max_size=4) | st.dictionaries(st.text(max_size=5), scalars, max_size=2)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(leaves(FULL)), values)
def test_any_value(path: tuple[str, ...], value: Any) -> None:
    raw = copy.deepcopy(FULL)
    place_of(raw, path)[path[-1]] = value
    parsed, said = outcome(raw)
    if parsed is None:
        assert is_named(path, said), (path, value, said)
        return
    assert json.loads(json.dumps(parsed, allow_nan=False)) == parsed
    # 2 for 2.0 is no change, true for 1 is refused
    assert value_at(parsed, path) == (list(value) if isinstance(value, tuple) else value), (path, value)
    if value != value_at(PARSED, path):
        assert parsed != PARSED
        assert parse_config(raw).digest() != parse_config(FULL).digest() or not decides_numbers(path)


def decides_numbers(path: tuple[str, ...]) -> bool:
    """Whether a key is one that the digest of a configuration is about."""
    if path[:2] == ("d2v", "run"):
        return path[2:] in {("seed",), ("device",), ("compile",), ("cuda_graph",), ("kept_samples",)}
    return path[:2] != ("d2v", "probe") and path != ("d2v", "data", "num_workers")


@pytest.mark.parametrize("path", leaves(FULL), ids=".".join)
def test_any_key_taken_out(path: tuple[str, ...]) -> None:
    """It is required, and named, or has its default, which is written out."""
    raw = copy.deepcopy(FULL)
    del place_of(raw, path)[path[-1]]
    parsed, said = outcome(raw)
    if parsed is None:
        assert is_named(path, said), said
        return
    others = [other for other in leaves(PARSED) if other != path]
    assert all(value_at(parsed, other) == value_at(PARSED, other) for other in others)
    if path[0] == "d2v":
        assert path[-1] in place_of(parsed, path)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(leaves(FULL)), st.data())
def test_any_key_twice(path: tuple[str, ...], data: st.DataObject) -> None:
    """A second value for a key of the same section is refused, whatever it is."""
    text = json.dumps(FULL)
    key = json.dumps(path[-1]) + ": "
    starts = [i for i in range(len(text)) if text.startswith(key, i)]
    start = data.draw(st.sampled_from(starts))
    second = json.dumps(
        data.draw(
            scalars.filter(
                lambda value: value == value and abs(value or 0) != float("inf") if isinstance(value, float) else True
            )
        )
    )
    refuses(f"{text[:start]}{key}{second}, {text[start:]}", f"`{path[-1]}` appears twice in one section")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(leaves(FULL)), st.sampled_from(["NaN", "Infinity", "-Infinity"]))
def test_no_number(path: tuple[str, ...], word: str) -> None:
    raw = copy.deepcopy(FULL)
    place_of(raw, path)[path[-1]] = "@"
    refuses(json.dumps(raw).replace('"@"', word), f"`{word}` is not a JSON number")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_file(data: st.DataObject) -> None:
    text = json.dumps(FULL, indent=2)
    refuses(text[: data.draw(st.integers(0, len(text) - 1))], "not valid JSON: ")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_changed(data: st.DataObject, tmp_path: Path) -> None:
    """Refused in words, or another configuration, or the same where JSON gives the byte no meaning."""
    content = bytearray(json.dumps(TINY, indent=1).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    file = tmp_path / "c.json"
    file.write_bytes(content)
    try:
        parsed = load_config(file).to_dict()
    except ConfigError as error:
        said = error.problems
        if str(file) not in str(error) or not all("`" in text or "JSON" in text for text in said):
            raise
        return
    if parsed == parse_config(TINY).to_dict():
        assert json.loads(content) == TINY


def refuses(text: str, sentence: str) -> None:
    """The text is refused with this sentence."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        with pytest.raises(ConfigError) as caught:
            load_config(file.name)
    assert sentence in str(caught.value)


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(TINY), encoding="utf-8-sig")
    assert load_config(tmp_path / "c.json") == parse_config(TINY)
