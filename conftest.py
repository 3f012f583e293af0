"""Options and markers of tests and benchmarks."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from d2v_fast import ops

# tests that run at the same time share the cores
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

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


def pytest_configure(config: pytest.Config) -> None:
    """Choose between Triton's interpreter and its compiler, before anything imports Triton.

    The workers of pytest-xdist get the option, but not the command line.
    """
    os.environ.setdefault("TRITON_INTERPRET", "0" if config.getoption("--device") == "cuda" else "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip files without a test of the one mark that a run asks for, because importing all files takes long."""
    mark = config.getoption("-m")
    is_module = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if mark in ("alone", "waits") and is_module and f"pytest.mark.{mark}" not in collection_path.read_text("utf-8"):
        return True
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    lines = [f"torch {torch.__version__}, device {device} ({name}), backends {ops.backends()}"]
    if MISSING:
        lines.append(f"not installed: {', '.join(MISSING)}; skipped: {', '.join(collect_ignore_glob)}")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow; --run-slow runs it"))
        if "gpu" in item.keywords and config.getoption("--device") != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device under test: CPU, or CUDA with ``--device cuda``."""
    return torch.device(request.config.getoption("--device"))
