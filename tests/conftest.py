"""What every test gets: a seed, and poisoned uninitialized memory."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator

import pytest

# `nohup` makes processes ignore SIGHUP, which some tests send
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@functools.cache
def seed() -> Callable[[int], object]:
    """Return what seeds torch; `torch.manual_seed` makes a stack trace for each kind of device that is not there."""
    # not at the top: the process that passes tests on to workers reads this file, too
    import torch

    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(scope="session", autouse=True)
def _disk_in_memory() -> Iterator[None]:
    """Flush nothing to the disk: tests end processes, not machines, and a run of a few steps waits mostly for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Seed torch, and fill uninitialized memory with NaN, so that a test fails if an operation reads it."""
    import torch

    seed()(1234)
    # unlike `use_deterministic_algorithms`, it does not import torch's compiler
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def quick_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train with one thread, as forked processes do, and without pictures, events, probe and export.

    A test that is marked `reports` gets these.
    """
    import torch

    from tests.helpers.runs import leave_out_reports

    before = torch.get_num_threads()
    # the last digits of a loss depend on the number of threads
    torch.set_num_threads(1)
    if request.node.get_closest_marker("reports") is None:
        leave_out_reports(monkeypatch.setattr)
    yield
    torch.set_num_threads(before)
