"""EMA update of the parameter lists of real models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.measure import Compiled, Contest
from bench.optional_peers import apex_ema
from d2v_fast.ops import ema_update_

DECAY = 0.9998
Shapes = list[tuple[int, ...]]


def vit_shapes(D: int, depth: int, heads: int) -> Shapes:
    """Return the shapes of the published vision model: BEiT-style blocks with LayerScale, one shared position bias."""
    block: Shapes = [(3 * D, D), (D,), (D,), (D, D), (D,), (D,), (D,), (D,)]  # attention, norm, LayerScale
    block += [(4 * D, D), (4 * D,), (D, 4 * D), (D,), (D,), (D,), (D,)]  # MLP, norm, LayerScale
    front: Shapes = [(D, 3 * 16 * 16), (D,), (D,), (1, D), (27 * 27 + 3, heads)]
    return front + depth * block + [(D,), (D,)]


def wav2vec_base_shapes() -> Shapes:
    """Return the averaged shapes of the speech model: positional convolutions, Transformer layers, input norm."""
    D = 768
    layer: Shapes = 4 * [(D, D), (D,)] + [(D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,), (D,), (D,)]
    return 5 * [(D, D // 16, 19), (D,)] + 12 * layer + [(D,), (D,)]


MODELS = {
    "ViT-B": vit_shapes(768, 12, 12),
    "ViT-L": vit_shapes(1024, 24, 16),
    "wav2vec-Base": wav2vec_base_shapes(),
    # on a GPU only: 16 GB with a student and a working copy in fp32
    "1 B": vit_shapes(1408, 40, 16),
}


def published(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """Update tensor by tensor: scale, add the scaled student, copy into the working module."""
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        t.mul_(DECAY)
        t.add_(s.to(torch.float32), alpha=1 - DECAY)
        if working:
            working[i].copy_(t)


def stock(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """Update with PyTorch's multi-tensor functions."""
    if student[0].dtype != torch.float32:
        student = [s.to(torch.float32) for s in student]
    torch._foreach_lerp_(teacher, student, 1 - DECAY)
    if working:
        torch._foreach_copy_(working, teacher)


def for_compile(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """Update by the formula, for the compiler to fuse."""
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        t.copy_(torch.lerp(t, s.to(torch.float32), 1 - DECAY))
        if working:
            working[i].copy_(t)


CASES = [(m, d, w) for m in MODELS for d in (torch.float32, torch.bfloat16) for w in (False, True)]


@pytest.mark.parametrize(("model", "dtype", "with_working"), CASES)
def bench_ema(
    compete: Callable[[Contest], None], device: torch.device, model: str, dtype: torch.dtype, with_working: bool
) -> None:
    if model == "1 B" and device.type == "cpu":
        pytest.skip("for GPUs only: 16 GB of tensors")
    shapes, item = MODELS[model], dtype.itemsize
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    student = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    working = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes] if with_working else []
    # compiling a list takes a minute: limit it to one model
    is_short = model == "ViT-B" and dtype == torch.float32
    peers = {"published": published, "stock": stock}
    bound = {name: _bind(f, teacher, student, working) for name, f in peers.items()}
    missing = {}
    if is_short:
        bound["torch.compile"] = Compiled(torch.compile(_bind(for_compile, teacher, student, working)))
    else:
        missing["torch.compile"] = "measured at ViT-B in fp32 only: compiling takes a minute per list"
    if not working:
        found, absent = apex_ema(teacher, student, DECAY)
        bound |= found
        missing |= absent

    initial = [t.clone() for t in teacher[:40]]

    def outcome(run: Callable[[], None]) -> Sequence[Tensor]:
        for t, first in zip(teacher, initial, strict=False):
            t.copy_(first)
        run()
        return [*teacher[:40], *working[:40]]

    numel = sum(math.prod(shape) for shape in shapes)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    compete(
        Contest(
            op="ema_update_",
            case=f"{model}, {name} student{', working copy' if with_working else ''}",
            ours=lambda: ema_update_(teacher, student, DECAY, working=working or None),
            peers=bound,
            outcome=outcome,
            model_bytes=numel * (8 + item * (2 if with_working else 1)),
            rtol=1e-5 if item == 4 else 1e-2,
            atol=1e-6,
            missing=missing,
        )
    )


def _bind(
    update: Callable[..., None], teacher: list[Tensor], student: list[Tensor], working: list[Tensor]
) -> Callable[[], None]:
    return lambda: update(teacher, student, working)
