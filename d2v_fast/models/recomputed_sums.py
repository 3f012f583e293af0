"""Inputs of a decoder's convolutions that the backward pass computes again, instead of keeping them.

Shape letters: R rows (sequences), T places, C channels.

An input is the sum of an earlier one and of the norms with GELU of the convolutions between them, whose results are
kept for those norms anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.models.layers import can_recompute

# at most so many terms are computed again for one input; the input behind them is kept
_MOST_TERMS = 2


class RecomputedSums:
    """The input of each convolution in turn.

    Args:
        x: `[R, T, C]`, the first input.
        activate: returns what a convolution's result `[R, T, C]` adds to its input.

    Attributes:
        x: the next input.
    """

    def __init__(self, x: Tensor, activate: Callable[[Tensor], Tensor]) -> None:
        self.x, self._activate = x, activate
        # `x` is the sum of both; without results, it is kept itself
        self._first: Tensor | None = None
        self._results: tuple[Tensor, ...] = ()

    def step(self, result: Tensor, *, is_added: bool) -> None:
        """Go on to the next input.

        Args:
            result: `[R, T, C]`, of the convolution of `x`.
            is_added: whether the next input is a sum with `x`.
        """
        terms = self._results if is_added else ()
        if not is_added:
            self._first = None
        elif not terms:
            self._first = self.x.detach()
        self._results = () if len(terms) == _MOST_TERMS else (*terms, result.detach())
        y = self._activate(result)
        self.x = _add(self.x, y) if is_added else y

    def saving(self, convolution: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which the convolution of `x` does not save `x` for the backward pass."""
        if not self._results or not can_recompute(self.x, next(convolution.parameters())):
            return nullcontext()
        # parameters may be elsewhere in the backward pass
        makers: dict[int, Callable[[], Tensor]] = {_storage(p): p.detach for p in convolution.parameters()}
        makers[_storage(self.x)] = _Recomputation(self._first, self._results, self._activate)

        def pack(tensor: Tensor) -> Any:
            make = makers.get(_storage(tensor))
            return tensor if make is None else (make, tensor.shape, tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            make, *layout = packed
            return make().as_strided(*layout)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Recomputation:
    """The sum of `first`, if there is one, and the activated results."""

    def __init__(self, first: Tensor | None, results: tuple[Tensor, ...], activate: Callable[[Tensor], Tensor]) -> None:
        self._first, self._results, self._activate = first, results, activate

    @torch.no_grad()
    def __call__(self) -> Tensor:
        x, results = self._first, self._results
        if x is None:
            x, results = self._activate(results[0]), results[1:]
        for result in results:
            x = _add(x, self._activate(result))
        return x


def _add(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum, in place of `y` where it has the dtype of the sum."""
    return y.add_(x) if x.dtype == y.dtype else x + y


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
