"""Small parts of the networks that several of them use."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02


@torch.no_grad()
def truncated_normal_(tensor: Tensor) -> Tensor:
    """Fill from a normal distribution of deviation 0.02, cut off at one deviation."""
    # through the inverse of the distribution: `nn.init.trunc_normal_` draws and rejects, at 40 times the cost
    inside = math.erf(math.sqrt(0.5))
    return tensor.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2) * INIT_STD)


def init_linear_(linear: nn.Linear) -> None:
    """Truncated normal weight (`truncated_normal_`), zero bias."""
    truncated_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def dropout(x: Tensor, prob: float, training: bool) -> Tensor:
    """`F.dropout`, by `drop` on a CPU."""
    if not training or prob == 0.0:
        return x
    return drop(x, prob) if x.device.type == "cpu" else F.dropout(x, prob)


def drop(x: Tensor, prob: float) -> Tensor:
    """`F.dropout` of a CPU tensor, from 16 random bits per element: a draw for each takes several times as long.

    Args:
        x: any shape.
        prob: in [0, 1), rounded down to a multiple of `2 ** -16`.
    Returns:
        `x` with elements set to zero at that probability, and the others divided by the complement of it.
    """
    num_dropped = int(prob * 2**16)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= num_dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - num_dropped))
