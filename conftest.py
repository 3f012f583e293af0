"""Options and markers of tests and benchmarks."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # imported where it is used: the process that passes tests on to workers computes nothing
    import torch

# to look for garbage among what the imports make takes a fifth of their time; tests look for it again
gc.disable()

# tests that run at the same time share the cores: threads of one worker would only wait for those of the others
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# as in runs of several processes, which some tests fork
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# what one test may take of the time of `make test`, 5 minutes of two cores, if it is not marked `slow`
MOST_COMPUTED_S = 10
DEAR = pytest.StashKey[list[str]]()
BACKENDS = pytest.StashKey[str]()

# a GPU machine without network may lack some of these; the tests of the operations need only torch
NEEDED_FOR_TRAINING = ("pydantic", "numba", "numpy", "safetensors", "sklearn", "PIL")
MISSING = [name for name in NEEDED_FOR_TRAINING if find_spec(name) is None]
TESTS_OF_TRAINING = [
    f"tests/{folder.name}/*"
    for folder in (Path(__file__).parent / "tests").iterdir()
    if folder.is_dir() and folder.name != "ops"
]
collect_ignore_glob = [*TESTS_OF_TRAINING] if MISSING else []
if "numba" in MISSING:
    collect_ignore_glob.append("bench/bench_masking.py")
if MISSING or find_spec("transformers") is None:
    collect_ignore_glob.append("bench/bench_step.py")
if find_spec("hypothesis") is None:
    MISSING.append("hypothesis")
    for name in ("masked_loss", "odd_inputs", "topk_target"):
        collect_ignore_glob.append(f"tests/ops/test_{name}.py")
    collect_ignore_glob.extend(TESTS_OF_TRAINING)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (Triton interpreted) or cuda")
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--only-device", action="store_true", help="run only the tests that use the device under test")
    choices = ("with", "without", "only")
    parser.addoption("--compiled-peers", default="with", choices=choices, help="benchmarks beside torch.compile")
    parser.addoption("--figures", metavar="FILE", help="append the figures of each benchmark to FILE as it ends")
    parser.addoption("--outcomes", metavar="FILE", help="append the outcome of each test to FILE as it comes")


def pytest_configure(config: pytest.Config) -> None:
    """Choose between Triton's interpreter and its compiler, before anything imports Triton.

    The workers of pytest-xdist get the option, but not the command line.
    """
    on_gpu = config.getoption("--device") == "cuda"
    os.environ.setdefault("TRITON_INTERPRET", "0" if on_gpu else "1")
    if on_gpu:
        # without it, every product warns while deterministic algorithms are asked for, and a warning is an error
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.getoption("--outcomes", None) and not hasattr(config, "workerinput"):
        from tests.helpers.outcomes import OutcomeLog

        config.pluginmanager.register(OutcomeLog(Path(config.getoption("--outcomes"))))


def pytest_collection_finish() -> None:
    """Exempt what the imports made from the search for garbage, here and in forked processes."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a test of the kind that a run asks for, because importing all files takes long."""
    wanted = [r"pytest\.mark\.waits"] if config.getoption("-m") == "waits" else []
    if config.getoption("--only-device"):
        wanted.append(r"def \w+\([^)]*\bdevice\b|pytest\.mark\.gpu")
    is_module = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if wanted and is_module:
        text = collection_path.read_text("utf-8")
        if not all(re.search(pattern, text) for pattern in wanted):
            return True
    return None


def computed_s() -> float:
    """Return the seconds of computing of this process and of those that it started and that have ended.

    Unlike a clock, they say how dear a test is on a busy machine, too.
    """
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Remember a test that computes for too long and is not marked `slow`."""
    start = computed_s()
    result = yield
    seconds = computed_s() - start
    if seconds > MOST_COMPUTED_S and "slow" not in item.keywords:
        item.config.stash.setdefault(DEAR, []).append(f"{seconds:.0f} s  {item.nodeid}")
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that shows the summary about this worker and its tests."""
    if hasattr(session.config, "workeroutput"):
        from d2v_fast import ops

        session.config.workeroutput["backends"] = str(ops.backends())
        session.config.workeroutput["dear"] = session.config.stash.get(DEAR, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker says; one that crashed says nothing."""
    said = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(DEAR, []).extend(said.get("dear", []))
    if "backends" in said:
        node.config.stash[BACKENDS] = said["backends"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the backends of the workers, and the tests that compute for too long."""
    if backends := config.stash.get(BACKENDS, ""):
        terminalreporter.line(f"backends of the workers {backends}")
    if dear := config.stash.get(DEAR, []):
        terminalreporter.section(f"tests that computed for more than {MOST_COMPUTED_S} s")
        terminalreporter.line("Make them cheaper, or mark them `slow` and say why: `make test` has to fit 5 minutes.")
        for line in dear:
            terminalreporter.line(line)


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        lines = [f"device {device}"]
    else:
        import torch

        from d2v_fast import ops

        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        lines = [f"torch {torch.__version__}, device {device} ({name}), backends {ops.backends()}"]
    if MISSING:
        lines.append(f"not installed: {', '.join(MISSING)}; skipped: {', '.join(collect_ignore_glob)}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--only-device"):
        config.hook.pytest_deselected(items=[item for item in items if not uses_device(item)])
        items[:] = filter(uses_device, items)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow; --run-slow runs it"))
        if "gpu" in item.keywords and config.getoption("--device") != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


def uses_device(item: pytest.Item) -> bool:
    """Return whether a test runs something on the device under test."""
    is_parameter = "device" in getattr(getattr(item, "callspec", None), "params", ())
    return ("device" in getattr(item, "fixturenames", ()) and not is_parameter) or "gpu" in item.keywords


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return the device under test: CPU, or CUDA with ``--device cuda``.

    Faults of a kernel arrive late, so the test that caused one waits for it. CUDA cannot be used after one: a worker of
    pytest-xdist exits then, and another takes its place.
    """
    import torch

    device = torch.device(request.config.getoption("--device"))
    yield device
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" not in os.environ:
                raise
            print(f"{request.node.nodeid}: {error}", file=sys.__stderr__, flush=True)
            os._exit(1)
