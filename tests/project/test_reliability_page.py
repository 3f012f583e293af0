"""docs/reliability.md names tests that exist, all promises and all faults."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.helpers.places import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if re.match(r"\| *(\d+)? *\|", line)]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@cache
def functions(file: str) -> dict[str, bool]:
    """The test functions of a file, and whether they are slow whatever their parameters."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    all_slow = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and "mark.slow" in ast.unparse(node)
        for node in tree.body
    )
    return {
        node.name: all_slow or any(ast.unparse(one) == "pytest.mark.slow" for one in node.decorator_list)
        for node in tests
    }


def test_named_tests_exist() -> None:
    """Slow tests, and no others, are called slow."""
    for file, name in sorted(set(NAMED)):
        assert (ROOT / file).is_file(), file
        assert name in functions(file), f"{file}::{name}"
        slow = f"slow: `{file}::{name}`" in PAGE
        assert slow == functions(file)[name], f"{file}::{name}"


def test_nothing_looks_like_a_test_and_is_not_checked() -> None:
    assert PAGE.count("::") == len(NAMED)


def test_every_promise_and_every_fault_is_there() -> None:
    assert re.findall(r"^\*\*(R\d+) ", PAGE, re.MULTILINE) == [f"R{number}" for number in range(1, 13)]
    assert [int(row[0]) for row in ROWS if row[0].strip()] == list(range(1, 36))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip() or "more")
def test_every_fault_has_a_test_or_says_why_not(row: list[str]) -> None:
    _, injected, happens, shown = (cell.strip() for cell in row)
    assert injected
    assert shown or happens == "not yet read"
