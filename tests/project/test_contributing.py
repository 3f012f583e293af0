"""What an outside contributor meets: workflows, hooks, templates, citation and changelog agree with the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from d2v_fast import __version__
from tests.helpers.places import ROOT

yaml = pytest.importorskip("yaml")
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_workflows_run_targets_of_the_makefile() -> None:
    commands = [step["run"] for path in WORKFLOWS for step in steps(path) if "run" in step]
    targets = {target for command in commands for target in command.removeprefix("make ").split()}
    assert all(command.startswith("make ") for command in commands)
    assert [target for target in targets if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)] == []
    assert targets >= {"lint", "test", "test-minimal", "dist", "docs", *Path(ROOT / ".ci/run").read_text().split()[-3:]}


def test_workflows_test_every_python() -> None:
    (matrix,) = (job["strategy"]["matrix"] for job in read(WORKFLOWS[0])["jobs"].values() if "strategy" in job)
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", PROJECT)


def test_workflows_may_only_read() -> None:
    for path in WORKFLOWS:
        assert read(path)["permissions"] == {"contents": "read"}
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps(path) if "uses" in step)


def test_every_target_is_explained() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    explained = set(re.findall(r"^([\w-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert set(phony.split()) == explained


def test_hooks_are_the_tools_of_lint() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["entry"].split()[0] for hook in repository["hooks"]}
    lint = MAKEFILE.partition("\nlint:")[2].partition("\n\n")[0]
    assert entries == {f".venv/bin/{tool}" for tool in re.findall(r"\$\(BIN\)/([\w-]+)", lint)}


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.stem)
def test_issue_templates(path: Path) -> None:
    form = read(path)
    if path.stem == "config":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)


def test_citation() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert f'license = "{citation["license"]}"' in PROJECT
    assert f'name = "{citation["authors"][0]["name"]}"' in PROJECT
    assert {reference["url"][-10:] for reference in citation["references"]} == {"2202.03555", "2212.07525"}
    assert all(reference["authors"] and reference["title"] for reference in citation["references"])


def test_changelog_has_this_version_below_unreleased() -> None:
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", headings[1])
