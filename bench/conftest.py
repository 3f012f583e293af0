"""The one way in which a benchmark measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """`measure(function, *arguments, group=, num_bytes=)`: median of rounds, GB/s on the bytes that must be moved.

    On CUDA the device is waited for inside the timed call, so launch time counts.
    """

    def run(function: Callable[..., Any], *arguments: Any, group: str, num_bytes: int, rounds: int = 15) -> None:
        def timed() -> None:
            function(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.pedantic(timed, rounds=rounds, warmup_rounds=2)
        benchmark.extra_info["bytes"] = num_bytes
        benchmark.extra_info["gb_per_s"] = num_bytes / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        benchmark.extra_info["threads"] = torch.get_num_threads()

    return run
