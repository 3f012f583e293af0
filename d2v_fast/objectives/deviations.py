"""How much predictions and targets vary between masked positions."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

_EPSILON = 1e-6


class Deviations(NamedTuple):
    """Standard deviation over all masked positions, averaged over the channels, of target and prediction."""

    target: float
    prediction: float


def deviations(moments: Tensor, num_rows: int) -> Deviations:
    """Return how much targets and predictions vary between masked positions. Values near zero indicate collapse.

    Args:
        moments: `[4, D]`, sums over all rows of prediction, prediction^2, target, target^2.
        num_rows: N, over all processes.
    Returns:
        Mean over channels of sqrt(unbiased variance + 1e-6), as in the published code; NaN for fewer than 2 rows.
    """
    if num_rows < 2:
        return Deviations(math.nan, math.nan)
    # fp64, for the difference of two large sums
    total = moments.double().cpu()

    def deviation(sums: Tensor, squares: Tensor) -> float:
        variance = (squares - sums**2 / num_rows) / (num_rows - 1)
        return (variance.clamp_min(0) + _EPSILON).sqrt().mean().item()

    return Deviations(target=deviation(total[2], total[3]), prediction=deviation(total[0], total[1]))
