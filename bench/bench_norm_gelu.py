"""Forward and backward pass of layer norm and GELU, at the output sizes of the convolutions for speech."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Compiled, Contest
from d2v_fast.ops import layer_norm_gelu

# 15.6 s of audio at 16 kHz, the published crop, are 49,999 frames after the first convolution and 1562 after the sixth
SIZES = {"conv 1, 10 s": (1, 31_999, 512), "conv 6, 15.6 s": (4, 1562, 512)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply two operations to channels-last input."""
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias))


def published(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply the operations as Transformers and fairseq do, between channels-first convolutions."""
    return F.gelu(F.layer_norm(x.transpose(-2, -1), weight.shape, weight, bias).transpose(-2, -1))


def forward_backward(operation: Operation, grad: Tensor, *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that computes value and gradients; channels-first results are transposed."""
    first = grad.shape[-1] != inputs[1].shape[0]

    def run() -> tuple[Tensor, ...]:
        y = operation(*inputs)
        grad_x, *others = torch.autograd.grad(y, inputs, grad)
        y = y.detach()
        return (y.mT, grad_x.mT, *others) if first else (y, grad_x, *others)

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_norm_gelu(compete: Callable[[Contest], None], device: torch.device, dtype: str, size: str) -> None:
    shape = SIZES[size]
    x = torch.randn(shape, device=device).to(DTYPES[dtype])
    grad = torch.randn(shape, device=device).to(DTYPES[dtype])
    weight = torch.rand(shape[-1], device=device).add(0.5).to(DTYPES[dtype]).requires_grad_()
    bias = torch.randn(shape[-1], device=device).to(DTYPES[dtype]).requires_grad_()
    x_first, grad_first = x.mT.contiguous().requires_grad_(), grad.mT.contiguous()
    x.requires_grad_()
    low = dtype != "fp32"
    compete(
        Contest(
            op="layer_norm_gelu",
            case=f"{size}, {' x '.join(map(str, shape))}, {dtype}",
            ours=forward_backward(layer_norm_gelu, grad, x, weight, bias),
            peers={
                "published": forward_backward(published, grad_first, x_first, weight, bias),
                "stock": forward_backward(stock, grad, x, weight, bias),
                "torch.compile": Compiled(forward_backward(torch.compile(stock), grad, x, weight, bias)),
            },
            # forward: one read, one written; backward: two read, one written
            model_bytes=5 * x.numel() * x.itemsize,
            # in bf16, PyTorch rounds between its two operations, and its sums over rows differ by several percent
            outcome=(lambda run: run()[:2]) if low else (lambda run: run()),
            rtol=5e-2 if low else 1e-3,
            atol=1e-1 if low else 1e-2,
        )
    )
