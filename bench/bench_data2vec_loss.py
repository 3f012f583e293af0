"""Target and loss of a ViT-B step: fused, and as the plain composition of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import data2vec_loss, masked_smooth_l1, topk_target

NUM_IMAGES, NUM_PATCHES, WIDTH, TOP_K, BETA = 16, 196, 768, 6, 2.0


def published(pred: Tensor, layers: list[Tensor], rows: Tensor) -> Tensor:
    """Normalise every layer at every position, average, normalise, pick the masked rows, plain Smooth L1."""
    normed = [F.layer_norm(layer.float(), (WIDTH,)) for layer in layers]
    target = F.layer_norm(sum(normed) / len(normed), (WIDTH,)).flatten(0, 1)[rows]
    return F.smooth_l1_loss(pred.float(), target, beta=BETA)


def two_ops(pred: Tensor, layers: list[Tensor], rows: Tensor) -> Tensor:
    target = topk_target(layers, layer_norm="layer", final_norm="layer", rows=rows)
    return masked_smooth_l1(pred, target, beta=BETA).loss


def fused(pred: Tensor, layers: list[Tensor], rows: Tensor) -> Tensor:
    return data2vec_loss(pred, layers, layer_norm="layer", final_norm="layer", rows=rows, beta=BETA).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", [published, two_ops, fused], ids=lambda f: f.__name__)
def bench_data2vec_loss_vit_base(measure, device, implementation, dtype):
    torch.manual_seed(0)
    shape = (NUM_IMAGES, NUM_PATCHES, WIDTH)
    layers = [torch.randn(shape, device=device).to(dtype) for _ in range(TOP_K)]
    rows = torch.randperm(NUM_IMAGES * NUM_PATCHES)[: NUM_IMAGES * 120].sort().values.to(device)
    pred = torch.randn(len(rows), WIDTH, device=device).to(dtype).requires_grad_()

    expected = published(pred, layers, rows)
    (gradient,) = torch.autograd.grad(expected, pred)

    def forward_backward() -> None:
        torch.autograd.grad(implementation(pred, layers, rows), pred)

    loss = implementation(pred, layers, rows)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], gradient, rtol=1e-2, atol=1e-8)
    item = torch.empty((), dtype=dtype).element_size()
    num_bytes = len(rows) * WIDTH * item * (TOP_K + 2)
    measure(forward_backward, group=f"data2vec_loss ViT-B {dtype}", num_bytes=num_bytes)
