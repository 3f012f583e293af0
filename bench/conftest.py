"""Fixtures of the benchmarks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

# compile times are reported, so disable caches of earlier runs; torch reads the variable at import
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch

from bench.measure import Compiled, Contest, run_contest


@pytest.fixture
def compete(request: pytest.FixtureRequest, benchmark: Any, device: torch.device) -> Callable[[Contest], None]:
    """Return a function that runs a `Contest` and stores its figures in the benchmark's `extra_info`."""
    compiled = request.config.getoption("--compiled-peers")

    def run(contest: Contest) -> None:
        kinds = {"with": (True, False), "without": (False,), "only": (True,)}[compiled]
        peers = {name: peer for name, peer in contest.peers.items() if isinstance(peer, Compiled) in kinds}
        if compiled == "only" and not peers:
            pytest.skip("no peer is compiled")
        run_contest(replace(contest, peers=peers), benchmark, device)

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
