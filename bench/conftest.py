"""Fixtures of the benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

# compile times are reported, so disable caches of earlier runs; torch reads the variable at import
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

from bench.measure import Contest, run_contest


@pytest.fixture
def compete(benchmark: Any, device: torch.device) -> Callable[[Contest], None]:
    """Return a function that runs a `Contest` and stores its figures in the benchmark's `extra_info`."""

    def run(contest: Contest) -> None:
        run_contest(contest, benchmark, device)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Append the figures of a benchmark to the file of `--figures` as it ends: pytest-benchmark writes at the end."""
    yield
    path, benchmark = item.config.getoption("--figures"), getattr(item, "funcargs", {}).get("benchmark")
    if path and benchmark is not None and "op" in benchmark.extra_info:
        with open(path, "a") as file:
            file.write(json.dumps(benchmark.extra_info) + "\n")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
