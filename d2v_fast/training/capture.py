"""Capture functions once and replay them, so that the host launches one graph instead of a thousand kernels.

What is captured is behind `Capture`, so that the same code runs with another backend: the tests replay by running the
function again, and refuse every operation that a capture would refuse.
"""

from __future__ import annotations

import warnings
import weakref
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
            RuntimeError: The function does something that cannot be captured, or there is too little memory. What was
                captured before must not be replayed any more.
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
        self._first: Any = None

    def run(self, function: Function) -> None:
        current: Any = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Function) -> Function:
        if self._first is None:
            # an empty graph: torch refuses a pool all of whose graphs are gone
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._first = self._captured(lambda: None)
        replay: Function = self._captured(function).replay
        return replay

    def _captured(self, function: Function) -> Any:
        graph: Any = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # the outer context restores the stream, which the inner one does not do after an error
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                # other threads, such as the loader's, may call CUDA meanwhile
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    function()
                except Exception as error:
                    cause = error
                    raise
        except RuntimeError as error:
            self._clean_up()
            if cause is None:
                raise
            # the end of a broken capture only reports that something failed before
            raise cause from error
        return graph

    def _clean_up(self) -> None:
        """Undo what a broken capture leaves in torch: a generator that refuses to draw, and an open pool of memory."""
        device = self._stream.device.index
        generator: Any = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
        # with the other graphs, it frees the memory of the pool
        self._first = None
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:
            # the end of the capture closed it
            return
        torch._C._cuda_releasePool(device, self._pool)


class Recorder:
    """Captures functions until one cannot be captured; from then on, none is captured or replayed.

    Args:
        capture: The backend.
        refuse: Called with the reason why a function cannot be captured.
    """

    def __init__(self, capture: Capture, refuse: Callable[[str], None]) -> None:
        self._capture, self._refuse = capture, refuse
        self._is_broken = False
        self._replayed: weakref.WeakSet[Replayed] = weakref.WeakSet()

    def add(self, replayed: Replayed) -> None:
        """Let a function be forgotten when the capture of another fails."""
        self._replayed.add(replayed)

    def run(self, function: Function) -> None:
        """Run a function as it will be captured."""
        self._capture.run(function)

    def record(self, function: Function) -> Function | None:
        """Capture a function and return its replay, or None if nothing is captured any more."""
        if self._is_broken:
            return None
        try:
            return self._capture.record(function)
        except RuntimeError as error:
            self._is_broken = True
            for replayed in self._replayed:
                replayed.forget()
            self._refuse((str(error).strip().splitlines() or [type(error).__name__])[0])
            return None


class Replayed:
    """A function that runs itself at first, and is captured and replayed from then on.

    Args:
        recorder: Captures it. It is shared by all functions whose captures share memory.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._num_runs = 0
        self._replay: Function | None = None
        recorder.add(self)

    def __call__(self, function: Function) -> None:
        """Run or replay a function.

        Args:
            function: The same one in every call; it reads and writes fixed places in memory. It is not kept, so that
                its owner, which keeps this object, is freed as soon as nothing refers to it.
        """
        if self._replay is None and self._num_runs >= WARM_UP_RUNS:
            self._replay = self._recorder.record(function)
        if self._replay is not None:
            self._replay()
            return
        self._num_runs += 1
        self._recorder.run(function)

    def forget(self) -> None:
        """Free the capture."""
        self._replay = None


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
