"""Forward and backward pass of attention with a learned bias, and with ALiBi from the places of visible frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Compiled, Contest
from d2v_fast.ops import attention_with_alibi, attention_with_bias

# heads, tokens, width of a head, samples on a GPU and on a CPU
SIZES = {"ViT-B": (12, 197, 64, 128, 2), "ViT-L": (16, 197, 64, 64, 2), "speech 2.0 Base": (12, 312, 64, 64, 2)}

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend by products, as published."""
    return torch.matmul((torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)) + bias).softmax(-1), v)


def stock(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend by PyTorch's operation; of its fused kernels, one has a gradient of the bias."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_bias_of(places: Tensor, attend: Attend) -> Attend:
    """Return attention whose last argument are slopes of ALiBi, with the bias in memory."""
    distances = (places[:, None, :, None] - places[:, None, None, :]).abs()

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        return attend(q, k, v, (-slopes[:, None, None] * distances).to(q.dtype))

    return run


def forward_backward(attend: Attend, qkv: Tensor, learned: Tensor, grad: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Return a function that computes value and gradients of packed queries, keys and values, and of the bias."""

    def run() -> Sequence[Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = learned if learned.dim() == 1 else learned[..., : qkv.shape[1]]
        y = attend(q, k, v, bias)
        return y.detach(), *torch.autograd.grad(y, (qkv, learned), grad)

    return run


@pytest.mark.parametrize("size", SIZES)
def bench_attention(compete: Callable[[Contest], None], device: torch.device, size: str) -> None:
    heads, tokens, width, on_gpu, on_cpu = SIZES[size]
    samples, dtype = (on_gpu, torch.bfloat16) if device.type == "cuda" else (on_cpu, torch.float32)
    qkv = torch.randn(samples, tokens, 3, heads, width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(samples, tokens, heads, width, device=device).to(dtype).transpose(1, 2)
    ours: Attend = attention_with_bias
    peers: dict[str, Attend] = {"published": plain, "stock": stock, "torch.compile": torch.compile(plain)}
    if "2.0" in size:
        learned = torch.rand(heads, device=device).mul_(0.1).requires_grad_()
        # half of the frames are visible
        places = torch.rand(samples, 2 * tokens, device=device).argsort(-1)[:, :tokens].sort(-1).values
        ours = lambda q, k, v, slopes: attention_with_alibi(q, k, v, slopes, positions=places)  # noqa: E731
        peers = {name: with_bias_of(places, attend) for name, attend in peers.items()}
    else:
        # rows that start at multiples of 8, as the encoder's
        learned = torch.randn(1, heads, tokens, tokens + -tokens % 8, device=device).to(dtype).requires_grad_()

    def outcome(run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        *others, of_learned = run()
        # that of a slope is the sum of millions of terms of either sign: a small one has the error of the large ones
        return *others, of_learned / of_learned.abs().max()

    runs = {name: forward_backward(attend, qkv, learned, grad) for name, attend in peers.items()}
    runs["torch.compile"] = Compiled(runs["torch.compile"])
    low = dtype != torch.float32
    compete(
        Contest(
            op="attention_with_alibi" if "2.0" in size else "attention_with_bias",
            case=f"{size}, {samples} x {heads} x {tokens} x {width}, {'bf16' if low else 'fp32'}",
            ours=forward_backward(ours, qkv, learned, grad),
            peers=runs,
            outcome=outcome,
            # forward: three read, one written; backward: five read (with output and its gradient), three written
            model_bytes=12 * samples * tokens * heads * width * qkv.itemsize,
            rtol=5e-2 if low else 1e-3,
            atol=2e-1 if low else 1e-3,
        )
    )
