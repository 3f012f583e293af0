"""Forward and backward pass of the loss: on contiguous rows, with gathers before it, and with a row map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Compiled, Contest
from d2v_fast.ops import masked_smooth_l1

WIDTH = 768
# v1 speech, per GPU and step; v2 images: 16 samples with 16 masks each, 157 of 196 patches masked
NUM_ROWS, NUM_POSITIONS = 5800, 11_900
SAMPLES, MASKS, MASKED, PATCHES = 16, 16, 157, 196
BETAS = {"smooth L1": 2.0, "squared error": 0.0}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Loss = Callable[..., Tensor]


def plain_loss(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Compute the published loss: fp32, elementwise, summed over channels, then over rows."""
    if beta == 0.0:
        return F.mse_loss(pred.float(), target.float(), reduction="none").sum(-1).sum()
    return F.smooth_l1_loss(pred.float(), target.float(), beta=beta, reduction="none").sum(-1).sum()


def stock_loss(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Compute the same loss without the intermediate tensor."""
    if beta == 0.0:
        return F.mse_loss(pred.float(), target.float(), reduction="sum")
    return F.smooth_l1_loss(pred.float(), target.float(), beta=beta, reduction="sum")


def forward_backward(loss: Loss, pred: Tensor, *others: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that computes the loss and the gradient of `pred`."""

    def run() -> tuple[Tensor, Tensor]:
        value = loss(pred, *others)
        (gradient,) = torch.autograd.grad(value, pred)
        return value.detach(), gradient

    return run


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_rows(compete: Callable[[Contest], None], device: torch.device, dtype: str, beta: str) -> None:
    """Contiguous rows, as in our model, whose head runs on masked rows only."""
    pred = torch.randn(NUM_ROWS, WIDTH, device=device).to(DTYPES[dtype]).requires_grad_()
    target = torch.randn(NUM_ROWS, WIDTH, device=device)
    contend(
        compete,
        f"v1 speech, {dtype}, {beta}",
        (pred, target),
        ours=lambda p, t: masked_smooth_l1(p, t, beta=BETAS[beta], reduction="sum").loss,
        published=lambda p, t: plain_loss(p, t, BETAS[beta]),
        stock=lambda p, t: stock_loss(p, t, BETAS[beta]),
        num_bytes=NUM_ROWS * WIDTH * (4 + 2 * pred.itemsize),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_without_moments(compete: Callable[[Contest], None], device: torch.device, dtype: str, beta: str) -> None:
    """The loss of a step that is not logged, beside that of one that is; a GPU adds it in another order."""
    pred = torch.randn(NUM_ROWS, WIDTH, device=device).to(DTYPES[dtype]).requires_grad_()
    target = torch.randn(NUM_ROWS, WIDTH, device=device)

    def loss(moments: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        def ours(p: Tensor) -> Tensor:
            return masked_smooth_l1(p, target, beta=BETAS[beta], reduction="sum", moments=moments).loss

        return forward_backward(ours, pred)

    compete(
        Contest(
            op="masked_smooth_l1",
            case=f"without moments, {NUM_ROWS} rows, {dtype}, {beta}",
            ours=loss(moments=False),
            peers={"with moments": loss(moments=True)},
            model_bytes=NUM_ROWS * WIDTH * (4 + 2 * pred.itemsize),
            rtol=0.0 if device.type == "cpu" else 1e-6,
            atol=0.0,
        )
    )


@pytest.mark.parametrize("beta", BETAS)
def bench_with_gathers(compete: Callable[[Contest], None], device: torch.device, beta: str) -> None:
    """Predictions and targets at every position, of which the loss uses the masked ones."""
    pred = torch.randn(NUM_POSITIONS, WIDTH, device=device, requires_grad=True)
    target = torch.randn(NUM_POSITIONS, WIDTH, device=device)
    rows = torch.randperm(NUM_POSITIONS)[:NUM_ROWS].sort().values.to(device)
    mask = torch.zeros(NUM_POSITIONS, dtype=torch.bool, device=device).index_fill_(0, rows, True)

    def ours(p: Tensor, t: Tensor) -> Tensor:
        return masked_smooth_l1(p.index_select(0, rows), t, beta=BETAS[beta], reduction="sum", target_rows=rows).loss

    contend(
        compete,
        f"v1 speech with gathers, fp32, {beta}",
        (pred, target),
        ours=ours,
        published=lambda p, t: plain_loss(p[mask], t[mask], BETAS[beta]),
        stock=lambda p, t: stock_loss(p.index_select(0, rows), t.index_select(0, rows), BETAS[beta]),
        # predictions and targets at the rows, the gradient at every position
        num_bytes=WIDTH * 4 * (2 * NUM_ROWS + NUM_POSITIONS),
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_row_map(compete: Callable[[Contest], None], device: torch.device, dtype: str, beta: str) -> None:
    """data2vec 2.0 on images: sixteen masks of one image share its targets."""
    masked = torch.stack([torch.randperm(PATCHES)[:MASKED].sort().values for _ in range(SAMPLES * MASKS)])
    sample = torch.arange(SAMPLES).repeat_interleave(MASKS)
    target_rows = (sample[:, None] * PATCHES + masked).flatten().to(device)
    mask = torch.zeros(SAMPLES * MASKS, PATCHES, dtype=torch.bool).scatter_(1, masked, True).to(device)
    pred = torch.randn(len(target_rows), WIDTH, device=device).to(DTYPES[dtype]).requires_grad_()
    target = torch.randn(SAMPLES, PATCHES, WIDTH, device=device)

    contend(
        compete,
        f"v2 image, row map, {dtype}, {beta}",
        (pred, target),
        ours=lambda p, t: (
            masked_smooth_l1(p, t.flatten(0, 1), beta=BETAS[beta], reduction="sum", target_rows=target_rows).loss
        ),
        published=lambda p, t: plain_loss(p, t.repeat_interleave(MASKS, 0)[mask], BETAS[beta]),
        stock=lambda p, t: stock_loss(p, t.flatten(0, 1).index_select(0, target_rows), BETAS[beta]),
        num_bytes=WIDTH * (len(target_rows) * 2 * pred.itemsize + SAMPLES * PATCHES * 4),
    )


def contend(
    compete: Callable[[Contest], None],
    case: str,
    inputs: tuple[Tensor, Tensor],
    *,
    ours: Loss,
    published: Loss,
    stock: Loss,
    num_bytes: int,
) -> None:
    """Compare forward and backward passes with the peers and the compiled stock form."""
    pred, target = inputs
    low = pred.dtype != torch.float32
    peers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "published": forward_backward(published, pred, target),
        "stock": forward_backward(stock, pred, target),
        "torch.compile": Compiled(forward_backward(torch.compile(stock), pred, target)),
    }
    compete(
        Contest(
            op="masked_smooth_l1",
            case=case,
            ours=forward_backward(ours, pred, target),
            peers=peers,
            model_bytes=num_bytes,
            rtol=2e-2 if low else 1e-4,
            atol=2e-2 if low else 1e-5,
        )
    )
