"""Counter-based random numbers, which depend on a seed and counters, not on earlier draws.

A stream is identified by (seed, purpose, epoch, id). Its key is a hash of the four, and its n-th number is
that of splitmix64 (Steele, Lea and Flood 2014): the mixed sum of the key and n times the golden ratio. So
workers, processes and resumed runs agree without sharing state, and the numbers do not change with the
version of any library.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "AUGMENT",
    "CHANNELS",
    "DROP",
    "FEW",
    "GOLDEN",
    "MASK",
    "MIX",
    "NOISE",
    "ORDER",
    "SPLIT",
    "STEP_ORDER",
    "clone_keys",
    "permutation",
    "stream_keys",
    "uniforms",
]

# purposes of streams; each has its own streams
MASK, AUGMENT, ORDER, SPLIT, STEP_ORDER, DROP, NOISE, CHANNELS, FEW, MIX = 1, 2, 3, 4, 5, 6, 7, 8, 9, 10

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_keys(seed: int, purpose: int, epoch: int, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Return the keys of the streams of the given ids, uint64 `[B]`. Numbers are taken modulo 2**64."""
    keys = np.zeros(1, dtype=np.uint64)
    for value in (seed, purpose, epoch):
        keys = _mix((keys ^ np.uint64(value & 0xFFFF_FFFF_FFFF_FFFF)) + GOLDEN)
    return _mix((keys ^ ids.astype(np.uint64)) + GOLDEN)


def clone_keys(keys: npt.NDArray[np.uint64], num_clones: int) -> npt.NDArray[np.uint64]:
    """Derive further keys from each of `keys`, uint64 `[B, num_clones]`. Clone m does not depend on `num_clones`."""
    return _mix((keys[:, None] ^ np.arange(num_clones, dtype=np.uint64)) + GOLDEN)


def uniforms(keys: npt.NDArray[np.uint64], num: int) -> npt.NDArray[np.float64]:
    """Return the first `num` numbers of each stream, uniform in [0, 1), `[B, num]`."""
    positions = np.arange(1, num + 1, dtype=np.uint64) * GOLDEN
    bits = _mix(keys[:, None] + positions)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """Return a random permutation of 0 to `size` - 1, int64 `[size]`."""
    keys = stream_keys(seed, purpose, epoch, np.arange(size, dtype=np.int64))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
