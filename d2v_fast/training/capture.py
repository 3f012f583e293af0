"""Capture functions once and replay them, so that the host launches one graph instead of a thousand kernels.

What is captured is behind `Capture`, so that the same code runs with another backend: the tests replay by running the
function again, and refuse every operation that a capture would refuse.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

Function = Callable[[], None]
Value = TypeVar("Value")

# runs before a capture: they compile, tune and allocate, which a capture must not do
WARM_UP_RUNS = 3


class Capture(Protocol):
    """Captures functions without arguments that read and write fixed places in memory."""

    def run(self, function: Function) -> None:
        """Run a function as it will be captured, for example on the same stream."""

    def record(self, function: Function) -> Function:
        """Capture a function without running it, and return its replay.

        Raises:
            RuntimeError: The function does something that cannot be captured.
        """


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory. They must be replayed one after the other.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)
        self._pool: Any = torch.cuda.graph_pool_handle()

    def run(self, function: Function) -> None:
        current: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Function) -> Function:
        graph: Any = torch.cuda.CUDAGraph()
        # other threads, such as the loader's, may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        replay: Function = graph.replay
        return replay


class Replayed:
    """A function that runs itself at first, and is captured and replayed from then on.

    Args:
        function: Reads and writes fixed places in memory.
        capture: The backend.
        refuse: Called with the reason if the function cannot be captured; from then on it runs itself.
    """

    def __init__(self, function: Function, capture: Capture, refuse: Callable[[str], None]) -> None:
        self._function, self._capture, self._refuse = function, capture, refuse
        self._num_runs = 0
        self._captures = True
        self._replay: Function | None = None

    def __call__(self) -> None:
        if self._replay is None and self._captures and self._num_runs >= WARM_UP_RUNS:
            self._replay = self._recorded()
        if self._replay is not None:
            self._replay()
            return
        self._num_runs += 1
        self._capture.run(self._function)

    def _recorded(self) -> Function | None:
        try:
            return self._capture.record(self._function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._captures = False
            self._refuse((str(error).strip().splitlines() or [type(error).__name__])[0])
            return None


class RecentlyUsed(Generic[Value]):
    """The values of the keys that were used last.

    Args:
        limit: Most values that are kept, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made by `make` if it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        if len(self._values) == self._limit:
            # freed before the new value needs memory
            self._values.popitem(last=False)
        value = self._values[key] = make()
        return value
