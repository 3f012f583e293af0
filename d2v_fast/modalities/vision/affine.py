"""Compiled rotation, zoom and shift of a batch of small gray images in one cubic resampling."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from d2v_fast.masking import compiled

__all__ = ["warp"]


@compiled
def _cubic(x: float) -> float:
    """Evaluate Keys' cubic convolution kernel with a = -1/2, which is of third order and exact at the samples."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return ((-0.5 * x + 2.5) * x - 4) * x + 2
    return 0.0


@compiled
def warp(
    out: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    motions: npt.NDArray[np.float64],
) -> None:
    """Rotate, zoom and shift `images[ids]` into `out`.

    Args:
        out: fp32 `[B, H, H]`, overwritten. H is free; the field of view is that of the source.
        images: fp32 `[S, G, G]` in [0, 1]. Pixels outside an image count as 0.
        ids: int64 `[B]`.
        motions: fp64 `[B, 4]`: rotation in radians, log of the zoom, shift right and shift down in source pixels.
    """
    side, source = out.shape[1], images.shape[1]
    step = source / side
    center = (source - 1) / 2
    weights = np.empty(4)
    for b in range(len(ids)):
        image = images[ids[b]]
        turn, log_zoom, right, down = motions[b]
        shrink = math.exp(-log_zoom)
        along, across = math.cos(turn) * shrink, math.sin(turn) * shrink
        for row in range(side):
            for col in range(side):
                # map the output pixel back to a point of the source
                u = (col + 0.5) * step - 0.5 - center - right
                v = (row + 0.5) * step - 0.5 - center - down
                x = along * u + across * v + center
                y = along * v - across * u + center
                x0, y0 = math.floor(x), math.floor(y)
                for k in range(4):
                    weights[k] = _cubic(x - (x0 - 1 + k))
                value = 0.0
                for i in range(max(y0 - 1, 0), min(y0 + 3, source)):
                    line = 0.0
                    for j in range(max(x0 - 1, 0), min(x0 + 3, source)):
                        line += weights[j - x0 + 1] * image[i, j]
                    value += _cubic(y - i) * line
                out[b, row, col] = min(max(value, 0.0), 1.0)
