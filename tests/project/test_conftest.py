"""The options of the tests: which form of the Triton kernels runs, and which files a run collects."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import conftest
from bench.gpu import read_outcomes
from tests.helpers.places import ROOT


def config(**options: Any) -> pytest.Config:
    """A configuration with these options alone."""
    return SimpleNamespace(getoption=lambda name, *default: options.get(name.strip("-"), *default))  # type: ignore[return-value]


@pytest.mark.parametrize(("device", "interpreted"), [("cpu", "1"), ("cuda", "0")])
def test_device_decides_whether_triton_interprets(
    device: str, interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    conftest.pytest_configure(config(device=device))
    assert os.environ["TRITON_INTERPRET"] == interpreted
    monkeypatch.setenv("TRITON_INTERPRET", "given")
    conftest.pytest_configure(config(device=device))
    assert os.environ["TRITON_INTERPRET"] == "given"


def test_this_process_has_the_form_of_its_device(request: pytest.FixtureRequest) -> None:
    """Also in a worker of pytest-xdist, whose command line has no options."""
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret == (request.config.getoption("--device") != "cuda")


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"m": "waits"}, "acd"),
        ({"m": "not waits"}, ""),
        ({"m": ""}, ""),
        ({"m": "", "only-device": True}, "abc"),
    ],
)
def test_only_files_with_a_test_of_the_kind_are_read(tmp_path: Path, options: dict[str, Any], ignored: str) -> None:
    lines = "@pytest.mark.slow", "pytestmark = pytest.mark.waits", "device = 1", "def test_x(\n    device,\n): ..."
    for name, line in zip("abcd", lines, strict=True):
        (tmp_path / f"test_{name}.py").write_text(f"{line}\n")
    (tmp_path / "conftest.py").write_text("")
    chosen = config(**{"only-device": False, **options})
    found = [path for path in sorted(tmp_path.iterdir()) if conftest.pytest_ignore_collect(path, chosen)]
    assert "".join(path.stem.removeprefix("test_") for path in found) == ignored


@pytest.mark.parametrize(
    "text",
    [
        "Warning: Profiler clears events at the end of each cycle.Only events from the current cycle will be reported.",
        "Memory Efficient attention defaults to a non-deterministic algorithm.",
    ],
)
def test_warnings_of_supported_versions_of_torch_are_no_errors(text: str) -> None:
    """Those of the oldest version, and of a GPU: they would fail the first benchmark of a process there."""
    warnings.warn(text, UserWarning, stacklevel=1)


def test_tests_that_use_the_device() -> None:
    def item(**attributes: Any) -> pytest.Item:
        return SimpleNamespace(**{"fixturenames": [], "keywords": {}, **attributes})  # type: ignore[return-value]

    assert conftest.uses_device(item(fixturenames=["tmp_path", "device"]))
    assert conftest.uses_device(item(keywords={"gpu": 1}))
    assert not conftest.uses_device(item(fixturenames=["tmp_path"]))
    parameter = SimpleNamespace(params={"device": "x"})
    assert not conftest.uses_device(item(fixturenames=["device"], callspec=parameter))


def test_tests_of_the_operations_need_only_torch() -> None:
    """A GPU machine may have no other package: whatever these tests import at once is there, or pytest skips them."""
    allowed = {"__future__", "pytest", "torch", "hypothesis", "tests", "d2v_fast", *sys.stdlib_module_names}
    todo, seen = sorted((ROOT / "tests" / "ops").glob("*.py")), set[Path]()
    while todo:
        path = todo.pop()
        seen.add(path)
        for node in ast.parse(path.read_text("utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in allowed, f"{path} imports {name}"
                if name.startswith("d2v_fast"):
                    assert name.split(".")[1] in ("ops", "kernels", "models"), f"{path} imports {name}"
                module = ROOT / f"{name.replace('.', '/')}.py"
                if name.startswith("tests.") and module.exists() and module not in seen:
                    todo.append(module)
    assert len(seen) > 20


# slow: a whole run of pytest in a process, for `make gpu` only
@pytest.mark.slow
def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    """Also in several processes, of which one dies: nothing that has ended is lost."""
    log = tmp_path / "outcomes.log"
    (tmp_path / "conftest.py").write_text(
        "import pathlib\n"
        "from tests.helpers.outcomes import OutcomeLog\n"
        "def pytest_configure(config):\n"
        "    if not hasattr(config, 'workerinput'):\n"
        f"        config.pluginmanager.register(OutcomeLog(pathlib.Path({str(log)!r})))\n"
    )
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_fails(): assert 1 == 2, 'a reason'\n"
        "def test_passes(): pass\n"
        "def test_skips(): pytest.skip('not here')\n"
        "def test_dies(): os._exit(1)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest", "--rootdir", str(tmp_path), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    collected, outcomes = read_outcomes(log)
    assert collected == 4
    words = {name.partition("::")[2]: outcome for name, (outcome, _) in outcomes.items()}
    assert words == {"test_fails": "failed", "test_passes": "passed", "test_skips": "skipped", "test_dies": "failed"}
    assert "a reason" in outcomes["test_some.py::test_fails"][1]
    assert "assert 1 == 2" in log.with_name("outcomes.log.failures").read_text()


@pytest.mark.parametrize(("keywords", "is_named"), [((), True), (("slow",), False)])
def test_a_test_that_computes_for_long_is_named(
    keywords: tuple[str, ...], is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "MOST_COMPUTED_S", 0.02)

    def session() -> SimpleNamespace:
        return SimpleNamespace(config=SimpleNamespace(stash=pytest.Stash()))

    worker, main = session(), session()
    worker.config.workeroutput = {}
    for name, iterations in (("quick", 1), ("dear", 5_000_000)):
        running = conftest.pytest_runtest_protocol(
            SimpleNamespace(nodeid=name, keywords=keywords, config=worker.config)  # type: ignore[arg-type]
        )
        next(running)
        sum(range(iterations))
        with pytest.raises(StopIteration):
            next(running)
    conftest.pytest_sessionfinish(worker)  # type: ignore[arg-type]
    conftest.pytest_testnodedown(SimpleNamespace(config=main.config, workeroutput=worker.config.workeroutput))
    conftest.pytest_testnodedown(SimpleNamespace(config=main.config))
    assert [line.split()[-1] for line in main.config.stash[conftest.DEAR]] == (["dear"] if is_named else [])
    said: list[str] = []
    terminal = SimpleNamespace(section=said.append, line=said.append)
    conftest.pytest_terminal_summary(terminal, main.config)  # type: ignore[arg-type]
    assert any("dear" in line for line in said) == is_named
    assert said[0].startswith("backends of the workers {'cpu': ")
