"""EMA update of ViT-B's parameter list: one fused call beside the published loop and the best stock composition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2v_fast.ops import ema_update_

DECAY = 0.9998
WIDTH, DEPTH, HEADS = 768, 12, 12


def vit_base_shapes() -> list[tuple[int, ...]]:
    """The shapes of the 86 million averaged parameters, tensor by tensor."""
    D = WIDTH
    block = [(3 * D, D), (D,), (D,), (D, D), (D,), (D,), (D,), (D,)]  # attention, norm, LayerScale
    block += [(4 * D, D), (4 * D,), (D, 4 * D), (D,), (D,), (D,), (D,)]  # MLP, norm, LayerScale
    front = [(D, 3 * 16 * 16), (D,), (D,), (1, D), (27 * 27 + 3, HEADS)]
    return front + DEPTH * block + [(D,), (D,)]


def published(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """Tensor by tensor: scale, add the scaled student, copy into the module that runs."""
    for t, s, w in zip(teacher, student, working, strict=True):
        t.mul_(DECAY)
        t.add_(s.to(torch.float32), alpha=1 - DECAY)
        w.copy_(t)


def stock(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """The best that PyTorch's own multi-tensor functions do."""
    if student[0].dtype == torch.float32:
        torch._foreach_lerp_(teacher, student, 1 - DECAY)
    else:
        torch._foreach_lerp_(teacher, [s.to(torch.float32) for s in student], 1 - DECAY)
    torch._foreach_copy_(working, teacher)


def fused(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    ema_update_(teacher, student, DECAY, working=working)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", [published, stock, fused], ids=lambda f: f.__name__)
def bench_ema_vit_base(measure, device, implementation, dtype):
    shapes = vit_base_shapes()
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    student = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    working = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]

    expected = [t.lerp(s.float(), 1 - DECAY) for t, s in zip(teacher, student, strict=True)]
    implementation(teacher, student, working)
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)
    del expected

    numel = sum(math.prod(shape) for shape in shapes)
    item = torch.empty((), dtype=dtype).element_size()
    measure(implementation, teacher, student, working, group=f"ema ViT-B {dtype}", num_bytes=numel * (8 + 2 * item))
