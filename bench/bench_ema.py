"""EMA update of ViT-B's parameter list: one fused call beside the published loop and the best stock composition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.config import VisionModelConfig
from d2v_fast.data2vec import VisionModel
from d2v_fast.ops import ema_update_

DECAY = 0.9998


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
    with torch.device("meta"):
        shapes = [p.shape for p in VisionModel(VisionModelConfig()).parameters()]
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    student = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    working = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]

    expected = [t.lerp(s.float(), 1 - DECAY) for t, s in zip(teacher, student, strict=True)]
    implementation(teacher, student, working)
    torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)
    del expected

    numel = sum(shape.numel() for shape in shapes)
    item = torch.empty((), dtype=dtype).element_size()
    measure(implementation, teacher, student, working, group=f"ema ViT-B {dtype}", num_bytes=numel * (8 + 2 * item))
