"""What the README shows runs, and what it names exists."""

from __future__ import annotations

import re

import pytest

from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text()


def test_operations_example_runs():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "d2v_fast.ops" in block]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["loss"].item() > 0
    student, teacher = names["student"], names["teacher"]
    assert all((s - t).abs().max() > 0 for s, t in zip(student.parameters(), teacher.parameters(), strict=True))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    named = set(
        re.findall(r"\b(?:configs|docs|bench|tests|d2v_fast|csrc|kernels)/[\w/]+\.(?:json|md|py|cpp|h)\b", text)
    )
    assert named
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)
    assert "train" in targets
    for target in targets:
        assert f"\n{target}:" in makefile, target
