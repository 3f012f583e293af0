"""Check that tensors to be written in place have memory of their own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from d2v_fast.ops._library import is_observed


def check_memory(name: str, values: Iterable[Tensor]) -> None:
    """Check that the elements of tensors have addresses in memory; meta tensors need none.

    Raises:
        ValueError: A tensor is sparse, distributed, without storage, or wrapped by a transform of ``torch.func``.
    """
    if torch.compiler.is_compiling():
        return
    for i, x in enumerate(values):
        problem = ""
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            problem = "is followed by a transform of `torch.func`, under which `ema_update_` cannot read it"
        elif x.layout != torch.strided:
            problem = f"has the layout {x.layout} (pass `.to_dense()`)"
        elif hasattr(x, "to_local"):
            problem = "is distributed (pass the part of this process, `.to_local()`, on every side)"
        elif x.numel() and not x.is_meta and not is_observed() and not x.data_ptr():
            problem = "has no memory, since its storage was freed"
        if problem:
            raise ValueError(f"`{name}[{i}]` must be an ordinary dense tensor, but {problem}.")


def _overlaps_itself(x: Tensor) -> bool:
    """Return whether two elements may share memory: a stride is within the reach of the smaller dimensions."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def check_overlap(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    """Refuse memory that is written through one name and read or written through another one."""
    spans = []
    for kind, tensors in (("teacher", teacher), ("student", student), ("working", working)):
        for i, x in enumerate(tensors):
            # meta tensors have no memory
            if x.numel() and not x.is_meta:
                if kind != "student" and _overlaps_itself(x):
                    raise ValueError(
                        f"`{kind}[{i}]` must have a place in memory for each of its elements, but has strides "
                        f"{x.stride()} for shape {tuple(x.shape)} instead (use `.clone()`)."
                    )
                start = x.data_ptr()
                # the last element that the strides reach
                reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
                spans.append((start, start + (reach + 1) * x.element_size(), kind, i))
    spans.sort()
    furthest = {"teacher": (0, 0), "student": (0, 0), "working": (0, 0)}
    for start, end, kind, i in spans:
        for other, (other_end, j) in furthest.items():
            if start < other_end and not (kind == other == "student"):
                raise ValueError(
                    f"`{kind}[{i}]` and `{other}[{j}]` share memory; "
                    "every tensor that is written must have its own (use `.clone()`)."
                )
        furthest[kind] = max(furthest[kind], (end, i))
