"""The fixture that every benchmark of an operation uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
