"""What every test gets: a seed, and poisoned uninitialized memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# `nohup` makes processes ignore SIGHUP, which some tests send
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Seed torch, and fill uninitialized memory with NaN, so that a test fails if an operation reads it."""
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def quick_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train with one thread, as forked processes do, and without pictures, events, probe and export.

    A test that is marked `reports` gets these.
    """
    from tests.helpers.runs import leave_out_reports

    before = torch.get_num_threads()
    # the last digits of a loss depend on the number of threads
    torch.set_num_threads(1)
    if request.node.get_closest_marker("reports") is None:
        leave_out_reports(monkeypatch.setattr)
    yield
    torch.set_num_threads(before)
