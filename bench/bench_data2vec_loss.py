"""Target and loss in one operation, compared with the two operations in sequence and with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.bench_masked_loss import forward_backward, plain_loss, stock_loss
from bench.bench_topk_target import SIZES, make_inputs, published, stock, target_bytes
from bench.measure import Compiled, Contest
from d2v_fast.ops import data2vec_loss, masked_smooth_l1, topk_target

BETAS = {"v1 vision": 2.0, "v1 text": 4.0, "v2 image": 0.0}
# data2vec 2.0: number of masks per sample, whose predictions share the targets
MASKS = {"v2 image": 16}


@pytest.mark.parametrize("name", BETAS)
def bench_data2vec_loss(compete: Callable[[Contest], None], device: torch.device, name: str) -> None:
    size, beta = SIZES[name], BETAS[name]
    layers, rows = make_inputs(size, torch.float32, device)
    masks = MASKS.get(name, 1)
    target_rows = torch.arange(len(rows), device=device).repeat(masks) if masks > 1 else None
    pred = torch.randn(len(rows) * masks, size.width, device=device, requires_grad=True)
    layer_norm, final_norm = size.layer_norm, size.final_norm

    def spread(target: Tensor) -> Tensor:
        return target if target_rows is None else target.index_select(0, target_rows)

    def fused(p: Tensor, moments: bool = True) -> Tensor:
        return data2vec_loss(
            p,
            layers,
            layer_norm=layer_norm,
            final_norm=final_norm,
            rows=rows,
            target_rows=target_rows,
            beta=beta,
            reduction="sum",
            moments=moments,
        ).loss

    def without_moments(p: Tensor) -> Tensor:
        return fused(p, moments=False)

    def two_ops(p: Tensor) -> Tensor:
        target = topk_target(layers, layer_norm=layer_norm, final_norm=final_norm, rows=rows)
        return masked_smooth_l1(p, target, beta=beta, reduction="sum", target_rows=target_rows).loss

    def as_published(p: Tensor) -> Tensor:
        return plain_loss(p, spread(published(size)(layers, rows)), beta)

    def of_stock(p: Tensor) -> Tensor:
        return stock_loss(p, spread(stock(size)(layers, rows)), beta)

    compete(
        Contest(
            op="data2vec_loss",
            case=f"{name}, fp32, {size.layer_norm}+{size.final_norm}{f', {masks} masks' if masks > 1 else ''}",
            ours=forward_backward(fused, pred),
            peers={
                "two ops": forward_backward(two_ops, pred),
                "without moments": forward_backward(without_moments, pred),
                "published": forward_backward(as_published, pred),
                "stock": forward_backward(of_stock, pred),
                "torch.compile": Compiled(forward_backward(torch.compile(as_published), pred)),
            },
            model_bytes=target_bytes(size, len(rows), 4) + 8 * size.width * len(pred),
            rtol=1e-3,
            atol=1e-3,
        )
    )
