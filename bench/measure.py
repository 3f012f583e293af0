"""Measure an implementation and its peers in turn, in one process, on the same inputs.

The speed of a shared machine drifts, so figures are compared within a round only: in every round each peer runs once,
then the memory bandwidth is measured, then our implementation runs. `model_bytes` is the minimum memory traffic of an
operation. The bandwidth is measured on as many bytes: on a CPU by a STREAM scale in place (a copy would also read its
destination, which `model_bytes` excludes), on a GPU by a copy.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 7, 41
# upper bound of the bytes for measuring the bandwidth
MAX_LINE_BYTES = 1 << 30
# of a GPU that sleeps for a number of cycles
_MAX_CLOCK_HZ, _MAX_SLEEP_S = 2e9, 0.02


@dataclass(frozen=True)
class Contest:
    """One case of one operation.

    Attributes:
        op, case: name of the operation and of the case, with sizes and dtypes.
        ours: runs our implementation on fixed inputs.
        peers: other implementations by name. The compile time of a `Compiled` one is reported separately.
        outcome: runs an implementation and returns its result for the comparison; by default its return value.
        model_bytes: minimum memory traffic that the operation requires, in bytes.
        rtol, atol: allowed differences between a peer's result and ours.
        missing: peers that cannot run here, by name, with the reason.
        seconds: approximate duration of the measurement.
    """

    op: str
    case: str
    ours: Callable[[], Any]
    peers: Mapping[str, Callable[[], Any]]
    model_bytes: int
    outcome: Callable[[Callable[[], Any]], Sequence[Tensor]] = lambda run: run()
    rtol: float = 1e-4
    atol: float = 1e-5
    missing: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 3.0


class Compiled:
    """A peer whose first call compiles; the time of that call is reported separately."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.compile_s: float | None = None
        self._run = run

    def __call__(self) -> Any:
        if self.compile_s is not None:
            return self._run()
        start = time.perf_counter()
        result = self._run()
        self.compile_s = time.perf_counter() - start
        return result


def run_contest(contest: Contest, benchmark: Any, device: torch.device) -> None:
    """Check that all results agree, time the implementations in turn, and store figures in `benchmark.extra_info`."""
    peers, missing = dict(contest.peers), dict(contest.missing)
    expected = [x.clone() for x in contest.outcome(contest.ours)]
    for name, peer in contest.peers.items():
        try:
            found = contest.outcome(peer)
        except (RuntimeError, NotImplementedError) as error:
            # report a peer that fails; our own failure is an error
            del peers[name]
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        assert len(found) == len(expected), name
        for mine, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(theirs.float(), mine.float(), rtol=contest.rtol, atol=contest.atol, msg=name)
        del found
    del expected
    gc.collect()

    line = Line(contest.model_bytes, device)
    timed = {name: _waiting(peer, device) for name, peer in peers.items()}
    ours, run_line = _waiting(contest.ours, device), _waiting(line.run, device)
    one_round = sum(_seconds(run) for run in (*timed.values(), run_line, ours))
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, contest.seconds / one_round)))
    seconds: dict[str, list[float]] = {name: [] for name in (*timed, "line")}

    def others() -> None:
        # rotate the order, so that no peer always follows the same one
        names = list(timed)
        turn = len(seconds["line"]) % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(_seconds(timed[name]))
        seconds["line"].append(_seconds(run_line))

    benchmark.group = contest.op
    benchmark.pedantic(ours, setup=others, rounds=rounds)
    if benchmark.stats is None:
        return
    own = list(benchmark.stats.stats.data)
    info = benchmark.extra_info
    info |= {"op": contest.op, "case": contest.case, "bytes": contest.model_bytes, "rounds": rounds}
    info |= describe_device(device)
    info |= quantiles(own)
    info["gb_per_s"] = contest.model_bytes / info["p50_s"] / 1e9
    info["line_gb_per_s"] = line.bytes / float(np.median(seconds["line"])) / 1e9
    info["percent_of_line"] = 100 * info["gb_per_s"] / info["line_gb_per_s"]
    info["peak_bytes"] = peak_bytes(contest.ours, device)
    info["missing"] = missing
    info["peers"] = {}
    for name, peer in peers.items():
        row = compared(seconds[name], own) | {"peak_bytes": peak_bytes(peer, device)}
        if isinstance(peer, Compiled):
            row["compile_s"] = peer.compile_s
        info["peers"][name] = row
    if device.type == "cuda":
        info |= cuda_facts(contest.ours, contest.model_bytes)
        line_gb_per_s = cuda_facts(line.run, line.bytes)["device_gb_per_s"]
        info["device_percent_of_line"] = 100 * info["device_gb_per_s"] / line_gb_per_s
        for name, peer in peers.items():
            info["peers"][name] |= cuda_facts(peer, contest.model_bytes)


class Line:
    """Bandwidth of the machine on `num_bytes`, half read, half written: a scale in place on a CPU, a copy on a GPU."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        n = max(1, min(num_bytes, MAX_LINE_BYTES) // 8)
        self.bytes = 8 * n
        self._x = torch.ones(n, device=device)
        self._y = torch.empty_like(self._x) if device.type == "cuda" else None

    def run(self) -> None:
        if self._y is None:
            self._x.mul_(1.0000001)
        else:
            self._y.copy_(self._x)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that one call needs on top of what was allocated before; None if they cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # freed blocks that the allocator retains would hide new allocations
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def cuda_facts(run: Callable[[], Any], model_bytes: int, calls: int = 20) -> dict[str, Any]:
    """Measure device time with a cold cache, kernel launches, and host synchronization of one call."""
    flush = torch.empty(64 * 1024 * 1024, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    run()
    start_s = time.perf_counter()
    for _ in range(calls):
        run()
    # how long the host takes to ask for the work, as long as no queue is full
    facts: dict[str, Any] = {"host_s": (time.perf_counter() - start_s) / calls}
    torch.cuda.synchronize()
    # the device sleeps until the host has asked for all of a call: between kernels it would wait for the host
    cycles = int(_MAX_CLOCK_HZ * min(_MAX_SLEEP_S, 2 * facts["host_s"] + 1e-4))
    for start, stop in events:
        torch.cuda._sleep(cycles)
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    device_s = float(np.median([start.elapsed_time(stop) for start, stop in events])) / 1e3
    facts |= {"device_s": device_s, "device_gb_per_s": model_bytes / device_s / 1e9}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if str(e.device_type).endswith("CUDA") and not e.name.startswith("Mem")]
    facts["launches"] = len(kernels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        facts["waits_for_device"] = False
    except RuntimeError:
        facts["waits_for_device"] = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return facts


def quantiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median, 20th and 80th percentile."""
    return {f"{name}_s": value for name, value in _quantiles(seconds).items()}


def compared(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Return the quantiles of a peer's times and of their ratios to ours within rounds."""
    return {**quantiles(theirs), "ratio": _quantiles(np.array(theirs) / np.array(ours))}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe the device, threads and torch version of a figure."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
    return {"device": name, "device_type": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _waiting(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    def timed() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return dict(zip(("p20", "p50", "p80"), map(float, np.quantile(values, (0.2, 0.5, 0.8))), strict=True))


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _cpu_name() -> str:
    if sys.platform == "linux":
        with suppress(OSError):
            for text in Path("/proc/cpuinfo").read_text().splitlines():
                if text.startswith("model name"):
                    return text.partition(":")[2].strip()
    return "cpu"
