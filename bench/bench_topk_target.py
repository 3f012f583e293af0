"""The target of a speech step (instance norm over time): fused, and as the plain composition of the published code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.ops import topk_target

NUM_SAMPLES, NUM_FRAMES, WIDTH, TOP_K = 4, 500, 768, 8


def published(layers: list[Tensor], rows: Tensor) -> Tensor:
    """Transpose, instance norm, transpose back, average all positions, pick the masked rows."""
    normed = [F.instance_norm(layer.float().transpose(1, 2)).transpose(1, 2) for layer in layers]
    return (sum(normed) / len(normed)).flatten(0, 1)[rows]


def fused(layers: list[Tensor], rows: Tensor) -> Tensor:
    return topk_target(layers, layer_norm="instance", final_norm="none", rows=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", [published, fused], ids=lambda f: f.__name__)
def bench_topk_target_speech(measure, device, implementation, dtype):
    torch.manual_seed(0)
    layers = [torch.randn(NUM_SAMPLES, NUM_FRAMES, WIDTH, device=device).to(dtype) for _ in range(TOP_K)]
    rows = torch.randperm(NUM_SAMPLES * NUM_FRAMES)[: NUM_SAMPLES * NUM_FRAMES // 2].sort().values.to(device)
    torch.testing.assert_close(implementation(layers, rows), published(layers, rows), rtol=1e-4, atol=1e-4)
    item = torch.empty((), dtype=dtype).element_size()
    num_bytes = WIDTH * (NUM_SAMPLES * NUM_FRAMES * TOP_K * item + len(rows) * 4)
    measure(implementation, layers, rows, group=f"topk_target speech {dtype}", num_bytes=num_bytes)
