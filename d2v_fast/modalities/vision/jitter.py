"""Compiled random brightness, contrast and saturation of one image, bit for bit as Pillow's `ImageEnhance`."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from d2v_fast.masking import compiled

__all__ = ["jitter_"]


def jitter_(levels: npt.NDArray[np.uint8], order: float, strengths: list[float]) -> None:
    """Change brightness, contrast and saturation in place.

    Args:
        levels: uint8 `[C, H, W]`, contiguous. With one channel there is no saturation.
        order: In [0, 1); picks one of the orders of the changes.
        strengths: Factors of brightness, contrast and saturation; 1 changes nothing.
    """
    flat = levels.reshape(-1)
    planes = levels.reshape(len(levels), -1)
    # gray weighs as three equal channels, which add up to one
    red, green, blue = planes if len(planes) == 3 else (planes[0],) * 3
    steps = ["brightness", "contrast", "saturation"][: 3 if len(planes) == 3 else 2]
    factors = dict(zip(steps, map(np.float32, strengths), strict=False))
    order *= math.factorial(len(steps))
    while steps:
        index, order = divmod(order, math.factorial(len(steps) - 1))
        step = steps.pop(int(index))
        if step == "saturation":
            _saturate(red, green, blue, factors[step])
        else:
            _scale(flat, _mean_gray(red, green, blue) if step == "contrast" else 0, factors[step])


@compiled
def _clipped(value: np.float32) -> np.uint8:
    low = np.float32(0.0) if value < np.float32(0.0) else value
    return np.uint8(np.int32(np.float32(255.0) if low > np.float32(255.0) else low))


@compiled
def _gray(red: np.uint8, green: np.uint8, blue: np.uint8) -> np.int32:
    weighted = np.int32(red) * np.int32(19595) + np.int32(green) * np.int32(38470) + np.int32(blue) * np.int32(7471)
    return np.int32((weighted + np.int32(0x8000)) >> np.int32(16))


@compiled
def _mean_gray(red: npt.NDArray[np.uint8], green: npt.NDArray[np.uint8], blue: npt.NDArray[np.uint8]) -> np.int32:
    total = 0
    for i in range(len(red)):
        total += _gray(red[i], green[i], blue[i])
    return np.int32(total / len(red) + 0.5)


@compiled
def _saturate(
    red: npt.NDArray[np.uint8], green: npt.NDArray[np.uint8], blue: npt.NDArray[np.uint8], strength: np.float32
) -> None:
    """Move each level away from its pixel's gray."""
    for i in range(len(red)):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        base = _gray(red[i], green[i], blue[i])
        red[i] = _clipped(np.float32(base) + strength * np.float32(r - base))
        green[i] = _clipped(np.float32(base) + strength * np.float32(g - base))
        blue[i] = _clipped(np.float32(base) + strength * np.float32(b - base))


@compiled
def _scale(levels: npt.NDArray[np.uint8], base: int, strength: np.float32) -> None:
    """Move each level away from `base`."""
    for i in range(len(levels)):
        levels[i] = _clipped(np.float32(base) + strength * np.float32(np.int32(levels[i]) - np.int32(base)))
