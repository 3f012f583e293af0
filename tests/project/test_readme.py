"""The README: what it shows runs, what it names exists, and it stays short."""

from __future__ import annotations

import re

import pytest

from tests.helpers.places import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")),
]
SECTIONS = [
    *("Install", "Quickstart", "Speed", "The operations in your own loop", "Read the code in this order", "More GPUs"),
    *("Limits", "Citation", "License"),
]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str) -> list[str]:
    """The fenced blocks of commands."""
    return re.findall(r"```\n(.*?)```", text, re.DOTALL)


def test_operations_example_runs():
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "d2v_fast.ops" in block]
    loop = code.partition("\nfor ")[2].splitlines()
    assert 0 < len(loop) <= 10
    names: dict[str, object] = {}
    exec(code, names)
    assert names["loss"].item() > 0
    student, teacher = names["student"], names["teacher"]
    assert all((s - t).abs().max() > 0 for s, t in zip(student.parameters(), teacher.parameters(), strict=True))


def test_order_and_size():
    assert re.findall(r"^## (.*)", README, re.MULTILINE) == SECTIONS
    lines = README.splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 100
    assert len(re.findall(r"^\d\. `", section("Read the code in this order"), re.MULTILINE)) == 6
    assert [len(block.splitlines()) for block in blocks(section("Quickstart"))] == [2]
    assert [len(block.splitlines()) for block in blocks(section("More GPUs"))] == [3]
    assert len(re.findall(r"^\|", section("Speed"), re.MULTILINE)) == 2 + 5


@pytest.mark.parametrize("document", PAGES)
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    pattern = r"\b(?:configs|docs|bench|tests|d2v_fast|csrc|kernels)/[\w/-]+\.(?:json|md|py|cpp|h|png|svg)\b"
    named = set(re.findall(pattern, text))
    assert named or document not in ("README.md", "CONTRIBUTING.md", "docs/architecture.md")
    missing = [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text())
    assert document != "README.md" or len(targets) > 10
    assert [
        target for target in targets if "://" not in target and not (ROOT / target.partition("#")[0]).exists()
    ] == []


@pytest.mark.parametrize("document", PAGES)
def test_targets_exist(document):
    """Every `make TARGET` of a command or in backticks, `make train-speech` too."""
    text = (ROOT / document).read_text()
    targets = re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []
    if document == "README.md":
        assert {"train", "train-speech", "train-text", "bench", "docs"} <= set(targets)


def test_presets_exist():
    """Every configuration that the README names as one, by its own name."""
    named = re.findall(r"d2v-fast \w+ (\w+) ", README) + re.findall(r"\.\.\. \| `(\w+)` \|", README)
    assert {"images_small", "digits", "speech"} <= set(named)
    assert [name for name in named if not (ROOT / "configs" / f"{name}.json").exists()] == []


def test_badges_are_true():
    project = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r"Python :: (3\.\d+)", project)
    (license,) = re.findall(r'^license = "(.*)"', project, re.MULTILINE)
    (torch,) = re.findall(r"^dependencies = .*torch>=([0-9.]+)", project, re.MULTILINE)
    badges = ROOT.glob("docs/images/*.svg")
    shown = {path.stem: re.findall(r"<title>(.*)</title>", path.read_text())[0] for path in badges}
    assert shown == {
        "license": f"license: {license}",
        "python": f"Python: {pythons[0]} to {pythons[-1]}",
        "torch": f"PyTorch: {torch} or later",
    }
    assert all(f"![{title}](docs/images/{name}.svg)" in README for name, title in shown.items())
    assert f'requires-python = ">={pythons[0]}"' in project
