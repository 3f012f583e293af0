"""The target and the loss from plain PyTorch operations in any precision: fp64 is the truth, fp32 the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYER_NORMS = ("none", "layer", "instance", "batch")
FINAL_NORMS = ("none", "layer", "instance")


def make_layers(
    shape: tuple[int, int, int], num_layers: int, dtype: torch.dtype, device: torch.device, offset: float = 0.0
) -> list[Tensor]:
    """Return layers whose channels, positions and layers differ in mean and spread."""
    num_samples, num_positions, width = shape
    channel = torch.randn(width, device=device)
    position = torch.randn(num_samples, num_positions, 1, device=device)
    return [
        (torch.randn(shape, device=device) * (0.5 + k) + channel + position + offset).to(dtype)
        for k in range(num_layers)
    ]


def _normalized(x: Tensor, dim: int | tuple[int, ...], eps: float) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / torch.sqrt((x - mean).square().mean(dim, keepdim=True) + eps)


def _apply(x: Tensor, norm: str, lengths: list[int], eps: float) -> Tensor:
    """Apply a norm; padding keeps its values under a norm over positions and must not be read."""
    if norm == "none":
        return x
    if norm == "layer":
        return _normalized(x, 2, eps)
    out = x.clone()
    if norm == "instance":
        for b, n in enumerate(lengths):
            if n:
                out[b, :n] = _normalized(x[b, :n], 0, eps)
        return out
    flat = torch.cat([x[b, :n] for b, n in enumerate(lengths)])
    if flat.shape[0]:
        for b, part in enumerate(_normalized(flat, 0, eps).split(lengths)):
            out[b, : lengths[b]] = part
    return out


def plain_target(
    layers: Sequence[Tensor],
    layer_norm: str,
    final_norm: str,
    rows: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute `topk_target` step by step in `dtype`."""
    num_samples, num_positions, _ = layers[0].shape
    valid = [num_positions] * num_samples if lengths is None else lengths.tolist()
    average = sum(_apply(x.to(dtype), layer_norm, valid, eps) for x in layers) / len(layers)
    target = _apply(average, final_norm, valid, eps)
    if rows is not None:
        return target.flatten(0, 1)[rows]
    for b, n in enumerate(valid):
        target[b, n:] = 0.0
    return target


def plain_loss(
    pred: Tensor,
    target: Tensor,
    beta: float,
    scale: float,
    reduction: str,
    target_rows: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Compute `masked_smooth_l1` with PyTorch's own losses in `dtype`, differentiable."""
    p, t = pred.to(dtype), target.to(dtype)
    if target_rows is not None:
        t = t[target_rows]
    if beta == 0.0:
        values = torch.nn.functional.mse_loss(p, t, reduction="none")
    else:
        values = torch.nn.functional.smooth_l1_loss(p, t, reduction="none", beta=beta)
    total = values.sum() * scale
    return total / max(pred.numel(), 1) if reduction == "mean" else total


def plain_moments(pred: Tensor, target: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the sums over rows of both sides and of their squares per channel, `[4, D]`."""
    p, t = pred.detach().to(dtype), target.to(dtype)
    return torch.stack([p.sum(0), p.square().sum(0), t.sum(0), t.square().sum(0)])
