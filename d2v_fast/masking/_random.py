"""Shared by all samplers: the compiler, and the numbers of `streams.uniforms` one by one.

All integers that are mixed are uint64, because numba converts mixed signs to floats. numba recompiles a cached function
when its own file changes, not when this file does: after a change here, remove `__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from d2v_fast.masking.streams import GOLDEN

__all__ = ["below", "checked_ids", "choose", "compiled", "unit"]

_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_11, _SHIFT_27, _SHIFT_30, _SHIFT_31, _SHIFT_32 = (np.uint64(n) for n in (11, 27, 30, 31, 32))
_TO_UNIT = 2.0**-53


def checked_ids(sample_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return `sample_ids` as a contiguous array; raise ValueError unless they are int64 `[B]`."""
    ids = np.ascontiguousarray(sample_ids)
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise ValueError(f"`sample_ids` must be int64 [B], but is {ids.dtype} {list(ids.shape)} instead.")
    return ids


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, without the GIL, and cache the machine code on disk if a folder is writable."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        # no writable cache folder: compile once per process
        return njit(nogil=True, error_model="numpy")(function)


@compiled
def _mix(value: np.uint64) -> np.uint64:
    value = (value ^ (value >> _SHIFT_30)) * _MULTIPLY_1
    value = (value ^ (value >> _SHIFT_27)) * _MULTIPLY_2
    return value ^ (value >> _SHIFT_31)


@compiled
def unit(state: np.uint64) -> np.float64:
    """Return the number in [0, 1) at position `state` of a stream."""
    return np.float64(_mix(state) >> _SHIFT_11) * _TO_UNIT


@compiled
def below(state: np.uint64, limit: int) -> np.int64:
    """Return an integer in [0, limit); the bias of the multiplication is below limit / 2**32."""
    return np.int64(((_mix(state) >> _SHIFT_32) * np.uint64(limit)) >> _SHIFT_32)


@compiled
def choose(flags: npt.NDArray[np.uint8], state: np.uint64, population: int, num: int) -> np.uint64:
    """Set `num` of the first `population` flags, which must be clear, with every choice equally likely.

    Returns the position of the stream after `num` draws (Floyd's algorithm, Bentley 1987).
    """
    for last in range(population - num, population):
        state += GOLDEN
        pick = below(state, last + 1)
        if flags[pick]:
            pick = last
        flags[pick] = 1
    return state
