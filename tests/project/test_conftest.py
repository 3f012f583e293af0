"""The options of the tests: which form of the Triton kernels runs, and which files a run collects."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import conftest


def config(**options: str) -> pytest.Config:
    """A configuration with these options alone."""
    return SimpleNamespace(getoption=lambda name: options[name.strip("-")])  # type: ignore[return-value]


@pytest.mark.parametrize(("device", "interpreted"), [("cpu", "1"), ("cuda", "0")])
def test_device_decides_whether_triton_interprets(
    device: str, interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    conftest.pytest_configure(config(device=device))
    assert os.environ["TRITON_INTERPRET"] == interpreted
    monkeypatch.setenv("TRITON_INTERPRET", "given")
    conftest.pytest_configure(config(device=device))
    assert os.environ["TRITON_INTERPRET"] == "given"


def test_this_process_has_the_form_of_its_device(request: pytest.FixtureRequest) -> None:
    """Also in a worker of pytest-xdist, whose command line has no options."""
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.interpret == (request.config.getoption("--device") != "cuda")


def test_only_files_with_a_test_of_the_mark_are_read(tmp_path: Path) -> None:
    for name, line in (("a", "@pytest.mark.slow"), ("b", "pytestmark = pytest.mark.waits"), ("c", "")):
        (tmp_path / f"test_{name}.py").write_text(f"{line}\n")
    (tmp_path / "conftest.py").write_text("")
    ignored = {
        mark: [path.name for path in sorted(tmp_path.iterdir()) if conftest.pytest_ignore_collect(path, config(m=mark))]
        for mark in ("waits", "not waits", "")
    }
    assert ignored == {
        "waits": ["test_a.py", "test_c.py"],
        "not waits": [],
        "": [],
    }


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
    assert bool(said) == is_named
