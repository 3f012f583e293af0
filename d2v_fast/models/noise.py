"""Normal noise that depends on keys, not on the order in which it is drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64 (see `masking.streams`), as signed integers
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)

# so many rows at once, whose intermediate results stay in the cache
_ROWS_ON_CPU = 128


def normal_noise(keys: Tensor, rows: Tensor, num_places: int, width: int) -> Tensor:
    """Return standard normal noise for rows of sequences, a function of a sequence's key and the place alone.

    So it does not depend on how a batch is split among micro-steps and processes.

    Args:
        keys: int64 `[R]`, one per sequence.
        rows: int64 `[N]`, flat indices `r * T + t`.
        num_places: T.
        width: D.

    Returns:
        fp32 `[N, D]`, on the device of the keys.
    """
    noise = torch.empty(len(rows), width, device=rows.device)
    size = _ROWS_ON_CPU if rows.device.type == "cpu" else max(1, len(rows))
    for some, into in zip(rows.split(size), noise.split(size), strict=True):
        _fill(into, keys, some, num_places)
    return noise


def _fill(noise: Tensor, keys: Tensor, rows: Tensor, num_places: int) -> None:
    """Write the noise of some rows to `[N, D]`."""
    # two normal values from each 64 random bits, by Box and Muller
    width = noise.shape[1]
    half = (width + 1) // 2
    counters = (rows % num_places)[:, None] * half + torch.arange(1, half + 1, device=rows.device)
    bits = _mix(keys.index_select(0, rows // num_places)[:, None] + counters * _GOLDEN)
    # in (0, 1], and in [0, 1)
    radius = ((_shifted(bits, 40) + 1).float() * 2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float() * (2.0 * math.pi * 2.0**-24)
    torch.mul(radius, angle.cos(), out=noise[:, :half])
    second = width - half
    torch.mul(radius[:, :second], angle[:, :second].sin(), out=noise[:, half:])


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Return unsigned integers shifted to the right."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _MULTIPLY_1
    bits = (bits ^ _shifted(bits, 27)) * _MULTIPLY_2
    return bits ^ _shifted(bits, 31)
