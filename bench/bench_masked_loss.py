"""The loss on gathered rows, forward and backward: fused, and plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import masked_smooth_l1

NUM_ROWS, WIDTH, BETA = 5800, 768, 2.0


def eager(pred: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(pred.float(), target, beta=BETA, reduction="none").sum(-1).sum()


def fused(pred: Tensor, target: Tensor) -> Tensor:
    return masked_smooth_l1(pred, target, beta=BETA, reduction="sum").loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", [eager, fused], ids=lambda f: f.__name__)
def bench_masked_loss(measure, device, implementation, dtype):
    torch.manual_seed(0)
    pred = torch.randn(NUM_ROWS, WIDTH, device=device).to(dtype).requires_grad_()
    target = torch.randn(NUM_ROWS, WIDTH, device=device)

    def forward_backward() -> Tensor:
        return torch.autograd.grad(implementation(pred, target), pred)[0]

    (expected,) = torch.autograd.grad(eager(pred, target), pred)
    torch.testing.assert_close(implementation(pred, target), eager(pred, target), rtol=1e-4, atol=0)
    torch.testing.assert_close(forward_backward(), expected, rtol=1e-2, atol=1e-6)
    item = torch.empty((), dtype=dtype).element_size()
    measure(forward_backward, group=f"masked_smooth_l1 {dtype}", num_bytes=NUM_ROWS * WIDTH * (4 + 2 * item))
