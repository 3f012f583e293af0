"""Fixtures of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
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


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
