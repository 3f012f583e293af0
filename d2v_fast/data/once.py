"""Read a data set once where a run asks for it several times, such as for its classes and for both its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

__all__ = ["read_once", "reading_once"]

P = ParamSpec("P")
T = TypeVar("T")

_results: ContextVar[dict[Any, Any] | None] = ContextVar("results", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """Let functions with `read_once` return the result of an earlier call with equal arguments, inside the block.

    Nothing is remembered outside of it, where the files may have changed.
    """
    token = _results.set({})
    try:
        yield
    finally:
        _results.reset(token)


def read_once(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that reads files; see `reading_once`. Its arguments are hashable, its result is not changed.

    Args:
        function: what reads.
    """

    @functools.wraps(function)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        results = _results.get()
        if results is None:
            return function(*args, **kwargs)
        key = (function, args, frozenset(kwargs.items()))
        if key not in results:
            results[key] = function(*args, **kwargs)
        result: T = results[key]
        return result

    return found
