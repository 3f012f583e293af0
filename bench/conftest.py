"""The fixture that every benchmark of an operation uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# compile times are reported: none may come out of an earlier run; read when torch is imported first
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

from bench.measure import Contest, run_contest


@pytest.fixture
def compete(benchmark: Any, device: torch.device) -> Callable[[Contest], None]:
    """`compete(Contest(...))`: ours beside its peers; figures go to `extra_info` of the benchmark."""

    def run(contest: Contest) -> None:
        run_contest(contest, benchmark, device)

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
