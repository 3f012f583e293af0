"""Exponential moving average of a whole model in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from d2v_fast.ops._library import FLOAT_DTYPES, define


def ema_update_reference(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    working: Sequence[Tensor],
) -> None:
    """``teacher <- lerp(teacher, student, 1 - decay)`` in fp32, then ``working <- teacher``; decay 1 touches
    nothing."""
    if decay_tensor is None:
        if decay == 1.0:
            return
        weight = torch.tensor(1.0 - decay, dtype=torch.float32)
        frozen = torch.tensor(False)
    else:
        weight = (1.0 - decay_tensor.double()).float()
        frozen = decay_tensor == 1.0
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        updated = torch.lerp(t, s.to(torch.float32), weight.to(t.device))
        # a frozen teacher stays as it is even where the student holds NaN
        t.copy_(torch.where(frozen.to(t.device), t, updated))
        if working:
            working[i].copy_(torch.where(frozen.to(t.device), working[i], t.to(working[i].dtype)))


define(
    "ema_update_(Tensor(a!)[] teacher, Tensor[] student, float decay, Tensor? decay_tensor, Tensor(b!)[] working)"
    " -> ()",
    ema_update_reference,
    "ema.ema_update",
)


@torch.library.register_fake("d2v::ema_update_")
def _fake(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    working: Sequence[Tensor],
) -> None:
    return None


def ema_update_(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float | Tensor,
    *,
    working: Sequence[Tensor] | None = None,
) -> None:
    """Move the teacher towards the student, in place: ``teacher <- decay * teacher + (1 - decay) * student``.

    The EMA of data2vec (arXiv 2202.03555, section 3.2, "teacher parameterization") for a list of tensors at once:
    one kernel launch on a GPU, one parallel loop on a CPU. Arithmetic is fp32 in the form of ``torch.lerp``.

    Args:
        teacher: Tensors of any shape, fp32: in bf16 nearly every update at decay 0.9999 would be rounded away.
        student: As many tensors of the same shapes on the same device; fp32, bf16 or fp16. Only read.
        decay: In [0, 1]. A float, or a 0-d fp64 or fp32 tensor on that device, which a CUDA graph can capture. 1
            changes nothing, 0 copies.
        working: Optional tensors of the same shapes, fp32, bf16 or fp16, that receive the updated teacher in the
            same pass (the copy that the teacher's forward runs on).

    Raises:
        ValueError: Lists of different lengths, different shapes or devices, a dtype not listed above, a decay
            outside [0, 1], a teacher that shares memory with the student or the working copy, or a teacher or working
            copy with several elements in one place of memory (an expanded tensor).

    Example:
        >>> teacher, student = [torch.zeros(3)], [torch.ones(3)]
        >>> ema_update_(teacher, student, 0.75)
        >>> teacher[0]
        tensor([0.2500, 0.2500, 0.2500])
    """
    teacher, student = list(teacher), list(student)
    working = [] if working is None else list(working)
    _check(teacher, student, working)
    decay_value, decay_tensor = 1.0, None
    if isinstance(decay, Tensor):
        if decay.ndim != 0 or decay.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "`decay` must be a float or a 0-d fp32 or fp64 tensor, "
                f"but is a {decay.dtype} tensor of shape {tuple(decay.shape)} instead."
            )
        if teacher and decay.device != teacher[0].device:
            raise ValueError(f"`decay` must be on {teacher[0].device}, but is on {decay.device} instead.")
        decay_tensor = decay
    else:
        decay_value = float(decay)
        if not 0.0 <= decay_value <= 1.0:
            raise ValueError(f"`decay` must be in [0, 1], but is {decay_value} instead.")
        if decay_value == 1.0:
            return
    if not teacher:
        return
    with torch.no_grad():
        torch.ops.d2v.ema_update_(teacher, student, decay_value, decay_tensor, working)


def _check(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
    for name, others in (("student", student), ("working", working)):
        if name == "working" and not others:
            continue
        if len(others) != len(teacher):
            raise ValueError(
                f"`{name}` must have as many tensors as `teacher` ({len(teacher)}), but has {len(others)} instead."
            )
        for i, (t, other) in enumerate(zip(teacher, others, strict=True)):
            if other.shape != t.shape:
                raise ValueError(
                    f"`{name}[{i}]` must have the shape of `teacher[{i}]`, {tuple(t.shape)}, "
                    f"but has {tuple(other.shape)} instead."
                )
            if other.dtype not in FLOAT_DTYPES:
                raise ValueError(f"`{name}[{i}]` must be fp32, bf16 or fp16, but is {other.dtype} instead.")
            if other.device != t.device:
                raise ValueError(
                    f"`{name}[{i}]` must be on {t.device} as `teacher[{i}]` is, but is on {other.device} instead."
                )
    for i, t in enumerate(teacher):
        if t.dtype != torch.float32:
            raise ValueError(
                f"`teacher[{i}]` must be fp32 (lower precision loses most updates), but is {t.dtype} instead."
            )
    # under torch.compile there are no addresses to compare; the eager call that came before has compared them
    if not torch.compiler.is_compiling():
        _check_overlap(teacher, student, working)


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements may share memory: where a dimension does not step over all that the smaller ones reach."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _check_overlap(teacher: list[Tensor], student: list[Tensor], working: list[Tensor]) -> None:
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
