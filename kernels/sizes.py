"""Sizes of grids and tiles, computed on the host.

Triton's functions of these names also run in kernels. Outside of them their wrapper takes longer than all else that a
launcher computes.
"""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """Return `x / y` rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for `n` >= 1."""
    return 1 << (n - 1).bit_length()
