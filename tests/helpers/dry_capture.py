"""A capture without a GPU: it runs a function and refuses what a real capture refuses, and a replay runs it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "repeat_interleave"),
    # copies the lengths
    "ctc_loss",
)


class NoHostReads(TorchDispatchMode):
    """Refuse operations that make the host wait for values, which a capture refuses as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(part in name for part in HOST_READS):
            raise RuntimeError(f"{name} reads values on the host")
        indices = args[1] if name.startswith("aten.index.") else ()
        if any(index is not None and index.dtype == torch.bool for index in indices):
            raise RuntimeError(f"{name} by a mask has a shape that depends on values")
        return func(*args, **(kwargs or {}))


class NoHostTensors(TorchDispatchMode):
    """Refuse operations on CPU tensors: in a captured function they are copies between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not (isinstance(value, Tensor) and value.is_cpu), f"{func} with a tensor on the host"
        return result


class DryCapture:
    """Record by running under `NoHostReads`, and replay by running again; the first replay is that run."""

    def __init__(self) -> None:
        self.runs = self.records = self.replays = 0

    def run(self, function: Callable[[], None]) -> None:
        self.runs += 1
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        with NoHostReads():
            function()
        is_run = True

        def replay() -> None:
            nonlocal is_run
            self.replays += 1
            if not is_run:
                function()
            is_run = False

        return replay


class NoCapture(DryCapture):
    """Never capture."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("this is refused")
