"""Tensors for the EMA update and its expected result."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.helpers.common import DTYPES

SHAPES = [(768, 33), (1,), (63,), (1023,), (16384 + 5,), (0,), (3, 0, 2), (), (2, 3, 5, 7)]


WORKING = [None, *DTYPES]


def make(device: torch.device, student_dtype: torch.dtype, working_dtype: torch.dtype | None, shapes=SHAPES):
    teacher = [torch.randn(shape, device=device) for shape in shapes]
    student = [torch.randn(shape, device=device).to(student_dtype) for shape in shapes]
    working = None if working_dtype is None else [torch.empty(s, device=device, dtype=working_dtype) for s in shapes]
    return teacher, student, working


def expected(teacher: list[Tensor], student: list[Tensor], decay: float) -> list[Tensor]:
    """Return the correctly rounded FMA of the lerp form, computed in fp64, where fp32 products are exact."""
    weight = torch.tensor(1.0 - decay, dtype=torch.float32).double()
    out = []
    for t, s in zip(teacher, student, strict=True):
        difference = (s.float() - t).double()
        near = t.double() + weight * difference
        far = s.double() + (weight.float() - 1).double() * difference
        out.append((near if weight < 0.5 else far).float())
    return out
