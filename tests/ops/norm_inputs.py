"""Inputs of `layer_norm_gelu`."""

from __future__ import annotations

import torch


def make(device, shape, dtype, weight_dtype=torch.float32, scale=2.0):
    """Return input, weight and bias that require gradients, and an incoming gradient."""
    x = (torch.randn(shape, device=device) * scale + 0.5).to(dtype).requires_grad_()
    weight = (torch.randn(shape[-1], device=device) * 0.5 + 1.0).to(weight_dtype).requires_grad_()
    bias = torch.randn(shape[-1], device=device).to(weight_dtype).requires_grad_()
    return x, weight, bias, torch.randn(shape, device=device).to(dtype)
