"""xformers' memory-efficient attention, where the package can be imported and runs on this device.

Shape letters: B batch, T tokens, D width, H heads, N packed tokens, S segments.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


@cache
def load() -> Any:
    """Return `xformers.ops`.

    Raises:
        Exception: whatever a broken build raises when it is imported.
    """
    return import_module("xformers.ops")


def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try forward and backward pass, and return why xformers cannot run; None if it can.

    Args:
        device: of the run.
        dtype: of the forward pass.
    """
    if device.type != "cuda":
        return f"xformers has attention for GPUs only, and this run is on a {device.type}"
    try:
        load()
    except Exception as error:
        return f"xformers cannot be imported ({type(error).__name__}: {error})"
    try:
        _try(device, dtype)
    except Exception as error:
        # its own message has a paragraph for every kernel
        reason = " ".join(str(error).split())[:300]
        return f"xformers cannot run its attention in {dtype} ({type(error).__name__}: {reason})"
    return None


def _try(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 16, 16, device=device, dtype=dtype, requires_grad=True)
    mask = block_diagonal(torch.tensor([0, 6, 16], dtype=torch.int32, device=device))
    attend_packed(x, x, x, mask, 0.1).sum().backward()
    bias = torch.zeros(1, 1, 16, 16, device=device, dtype=dtype, requires_grad=True)
    attend_with_bias(x, x, x, bias, 0.1).sum().backward()


def is_usable(x: Tensor) -> bool:
    """Return whether a tensor is where xformers can attend: other devices use PyTorch's attention."""
    if x.device.type != "cuda":
        return False
    try:
        load()
    except Exception:
        # a run is refused at its start; other commands read its encoder without the package
        return False
    return True


def block_diagonal(offsets: Tensor) -> Any:
    """Return the mask with which packed tokens attend within their segments. The host waits for the offsets.

    Args:
        offsets: int32 `[S + 1]`, start of each segment, and N.
    """
    sizes = offsets.diff().tolist()
    return load().fmha.attn_bias.BlockDiagonalMask.from_seqlens(sizes, device=offsets.device)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, mask: Any, prob: float) -> Tensor:
    """Compute attention of packed tokens `[1, H, N, D / H]`, with a mask of `block_diagonal` and dropout."""
    return _attend(q, k, v, mask, prob)


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, prob: float) -> Tensor:
    """Compute attention of `[B, H, T, D / H]` with a bias `[1, H, T, T]` whose rows start at multiples of 8 elements.

    The bias gets a gradient, which xformers writes for each sample and torch sums.
    """
    return _attend(q, k, v, bias.to(q.dtype).expand(len(q), -1, -1, -1), prob)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, prob: float) -> Tensor:
    # [B, H, T, D / H] to [B, T, H, D / H] and back
    tokens = (x.transpose(1, 2) for x in (q, k, v))
    attended: Tensor = load().memory_efficient_attention(*tokens, attn_bias=bias, p=prob)
    return attended.transpose(1, 2)
