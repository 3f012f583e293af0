"""Captures: what is kept, what happens when one fails, and the dry capture of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v_fast.training.capture import WARM_UP_RUNS, CudaCapture, RecentlyUsed, Recorder, Replayed
from tests.helpers.dry_capture import DryCapture, NoHostReads, NoHostTensors


def test_recently_used() -> None:
    made: list[str] = []

    def make(key: str) -> Callable[[], str]:
        return lambda: made.append(key) or key

    cache: RecentlyUsed[str] = RecentlyUsed(2)
    for key in "abacab":
        assert cache.get(key, make(key)) == key
    # `c` replaced `b`, which was used before `a`
    assert made == ["a", "b", "c", "b"]
    assert len(cache) == 2


def test_a_function_that_cannot_be_captured_ends_all_captures() -> None:
    """All functions run on, what was captured before is freed, and the reason is said once."""

    class Second(DryCapture):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            if self.records:
                raise torch.OutOfMemoryError("this is refused\nbecause of that")
            return super().record(function)

    calls, reasons, capture = ["", ""], list[str](), Second()
    recorder = Recorder(capture, reasons.append)
    functions = [Replayed(recorder) for _ in calls]

    def call(number: int) -> None:
        calls[number] += "x"

    num_calls = WARM_UP_RUNS + 3
    for number in (0, 1, 0, 1):
        for _ in range(num_calls):
            functions[number](partial(call, number))
    assert [len(made) for made in calls] == [2 * num_calls] * 2
    assert (capture.records, capture.replays) == (1, 3)
    assert reasons == ["this is refused"]


class FakeCuda:
    """The functions of `torch.cuda` that a capture calls.

    Attributes:
        streams: the current stream is the last one.
        events: what was done to the generator and the pool.
        captures: number of captures that began.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[Any] = ["default"]
        self.events: list[str] = []
        self.captures = 0
        side = SimpleNamespace(device=SimpleNamespace(index=0))

        @contextmanager
        def graph(graph: Any, **options: Any) -> Iterator[None]:
            assert options == {"pool": "pool", "stream": side, "capture_error_mode": "thread_local"}
            self.captures += 1
            self.streams.append(side)
            try:
                yield
            except ValueError:
                # without leaving the stream
                raise RuntimeError("operation failed due to a previous error during capture") from None
            self.streams.pop()

        @contextmanager
        def stream(stream: Any) -> Iterator[None]:
            before = list(self.streams)
            yield from self._restoring(before)

        generator = SimpleNamespace(
            clone_state=lambda: "a clone", graphsafe_set_state=lambda state: self.events.append(f"generator: {state}")
        )
        fakes = {
            "Stream": lambda device: side,
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda device: self.streams[-1],
            "stream": stream,
            "graph": graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "default_generators": [generator],
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, partial(self._pool_event, name), raising=False)

    def _pool_event(self, name: str, *pool: Any) -> None:
        self.events.append(f"{name} {pool}")

    def _restoring(self, before: list[Any]) -> Iterator[None]:
        try:
            yield
        finally:
            self.streams[:] = before


def test_a_broken_cuda_capture_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised, and stream, generator and pool are as they were."""
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))
    lengths: list[int] = []

    def fine() -> None:
        lengths.append(len(cuda.streams))

    def broken() -> None:
        raise ValueError("the cause")

    capture.record(fine)()
    capture.record(fine)()
    assert lengths == [2, 2]
    # an empty graph came first, and keeps the pool
    assert cuda.captures == 3
    assert cuda.events == []
    with pytest.raises(ValueError, match="the cause"):
        capture.record(broken)
    assert cuda.streams == ["default"]
    assert cuda.events == [
        "generator: a clone",
        "_cuda_endAllocateToPool (0, 'pool')",
        "_cuda_releasePool (0, 'pool')",
    ]


def test_host_reads_are_noticed() -> None:
    """The dry capture would fail on what a real one fails on."""
    x = torch.randn(4)
    for reads in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(RuntimeError, match=r"on the host|depends on values"), NoHostReads():
            reads()


def test_copies_from_the_host_are_noticed() -> None:
    x = torch.zeros(3, device="meta")
    with NoHostTensors():
        _ = x + 1.0
        with pytest.raises(AssertionError, match="on the host"):
            x.add_(torch.tensor([1.0, 2.0, 3.0]).to("meta"))
