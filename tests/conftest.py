"""Options, markers and the two fixtures that every test gets: a seed, and poisoned uninitialised memory."""

from __future__ import annotations

import os

import pytest

# the interpreter must be chosen before Triton is imported; a CUDA run compiles instead
if not any(a.startswith("--device=cuda") or a == "cuda" for a in os.sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="cpu (Triton interpreted) or cuda")
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow; --run-slow runs it"))
        if "gpu" in item.keywords and config.getoption("--device") != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs --device cuda"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device under test: CPU, or CUDA with ``--device cuda``."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed_and_poison(request: pytest.FixtureRequest):
    """Seed torch, and fill uninitialised memory with NaN: whoever reads what was never written fails."""
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
