"""Code that several tests share is not in a test module, so that a test can change without breaking others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

# also in the text of a program that a test starts
FROM_A_TEST = re.compile(r"\b(?:from|import)\s+tests(?:\.\w+)*\.test_\w+|\bfrom\s+tests(?:\.\w+)*\s+import\s+test_\w+")


def test_no_file_imports_a_test_module() -> None:
    sources = {path: path.read_text(encoding="utf-8") for folder in ("tests", "bench") for path in files_in(folder)}
    assert len(sources) > 100
    found = {path.as_posix(): FROM_A_TEST.findall(text) for path, text in sources.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def files_in(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("from tests.ops." + "test_ema import make", 1),
        ("import tests.ops." + "test_ema as other", 1),
        ("from tests.ops import " + "test_ema", 1),
        ("from tests.helpers.runs import tiny_file", 0),
        ("from tests.ops.ema_reference import make", 0),
    ],
)
def test_imports_are_found(line: str, number: int) -> None:
    assert len(FROM_A_TEST.findall(line)) == number
