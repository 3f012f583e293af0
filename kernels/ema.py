"""EMA update of a list of tensors in one launch. Reference: ``d2v_fast/ops/ema.py``.

Memory traffic per parameter: 4 B read and 4 B written of the teacher, 2 or 4 B read of the student, 0, 2 or 4 B written
of the working copy: 12 B for a bf16 student with a bf16 working copy. A table in device memory, built once per model,
holds the addresses, so that one launch updates any number of tensors. With ``decay`` as a device tensor, a CUDA graph
can capture the launch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv

BLOCK = 4096
_TABLES_KEPT = 8

_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _ema_fwd_kernel(
    table,  # [num_tensors, 4] int64: addresses of teacher, student, working; number of elements
    block_tensor,  # [num_blocks] int32: which tensor a block works on
    block_index,  # [num_blocks] int32: which BLOCK of that tensor
    decay_tensor,  # [] fp32 or fp64, read if DECAY_ON_DEVICE
    weight,  # fp32: 1 - decay
    STUDENT: tl.constexpr,
    WORKING: tl.constexpr,
    HAS_WORKING: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if DECAY_ON_DEVICE:
        # fp64 as on the host: in fp32, 1 - 0.9999 has a relative error of 1e-4
        weight = (1.0 - tl.load(decay_tensor).to(tl.float64)).to(tl.float32)
    if weight != 0.0:
        row = table + tl.load(block_tensor + pid).to(tl.int64) * 4
        start = tl.load(block_index + pid).to(tl.int64) * BLOCK
        teacher = tl.load(row).to(tl.pointer_type(tl.float32)) + start
        student = tl.load(row + 1).to(tl.pointer_type(STUDENT)) + start
        working = tl.load(row + 2).to(tl.pointer_type(WORKING)) + start
        left = tl.load(row + 3) - start
        if ALIGNED:
            # addresses from a table have no known alignment, without which loads stay 4 bytes wide
            teacher = tl.multiple_of(teacher, 16)
            student = tl.multiple_of(student, 16)
            working = tl.multiple_of(working, 16)
        offset = tl.arange(0, BLOCK)
        if left >= BLOCK:
            b_t = tl.load(teacher + offset)
            b_s = tl.load(student + offset).to(tl.float32)
            b_new = _lerp(b_t, b_s, weight)
            tl.store(teacher + offset, b_new)
            if HAS_WORKING:
                tl.store(working + offset, b_new.to(WORKING))
        else:
            inside = offset < left
            b_t = tl.load(teacher + offset, mask=inside)
            b_s = tl.load(student + offset, mask=inside).to(tl.float32)
            b_new = _lerp(b_t, b_s, weight)
            tl.store(teacher + offset, b_new, mask=inside)
            if HAS_WORKING:
                tl.store(working + offset, b_new.to(WORKING), mask=inside)


@triton.jit
def _lerp(b_t, b_s, weight):
    # the two forms of torch.lerp, so that weight 1 gives the student exactly
    near = weight < 0.5
    coefficient = tl.where(near, weight, weight - 1.0)
    return tl.fma(b_s - b_t, coefficient, tl.where(near, b_t, b_s))


class _Table(NamedTuple):
    addresses: Tensor
    block_tensor: Tensor
    block_index: Tensor
    aligned: bool


_tables: OrderedDict[tuple, _Table] = OrderedDict()
# a CUDA graph reads the tables of its launches at every replay, so they stay
_captured: dict[tuple, _Table] = {}


def _table(teacher: Sequence[Tensor], student: Sequence[Tensor], working: Sequence[Tensor]) -> _Table:
    """Return the address table of these tensors; build and copy it to the device at the first use."""
    device = teacher[0].device
    sizes = tuple(t.numel() for t in teacher)
    groups = (teacher, student, working or teacher)
    addresses = tuple(tuple(x.data_ptr() for x in group) for group in groups)
    key = (device, addresses, sizes, student[0].dtype, working[0].dtype if working else None)
    table = _tables.get(key)
    if table is not None:
        _tables.move_to_end(key)
        if _is_captured(device):
            _captured[key] = table
        return table
    rows = torch.tensor([*addresses, sizes], dtype=torch.int64).T.contiguous()
    num_blocks = torch.tensor([cdiv(n, BLOCK) for n in sizes], dtype=torch.int64)
    block_tensor = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), num_blocks)
    first_block = torch.cumsum(num_blocks, 0) - num_blocks
    block_index = torch.arange(len(block_tensor)) - first_block[block_tensor.long()]
    table = _Table(
        rows.to(device),
        block_tensor.to(device),
        block_index.to(device, torch.int32),
        all(address % 16 == 0 for group in addresses for address in group),
    )
    _tables[key] = table
    if len(_tables) > _TABLES_KEPT:
        _tables.popitem(last=False)
    return table


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Launch(NamedTuple):
    """One launch, for the tensors of one student dtype and one working dtype."""

    table: _Table
    student: torch.dtype
    working: torch.dtype | None


def prepare(teacher: Sequence[Tensor], student: Sequence[Tensor], working: Sequence[Tensor]) -> list[Launch]:
    """Prepare the launches of one update of contiguous tensors; they are valid until a tensor moves.

    There is one launch per pair of student dtype and working dtype, so nearly every model has one.
    """
    groups: dict[tuple, list[int]] = {}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.numel():
            groups.setdefault((s.dtype, working[i].dtype if working else None), []).append(i)
    return [
        Launch(
            _table(*([group[i] for i in members] if group else [] for group in (teacher, student, working))), *dtypes
        )
        for dtypes, members in groups.items()
    ]


def launch(launches: Sequence[Launch], decay: float, decay_tensor: Tensor | None) -> None:
    """Update the tensors of `prepare`."""
    for table, student, working in launches:
        _ema_fwd_kernel[(len(table.block_tensor),)](
            table.addresses,
            table.block_tensor,
            table.block_index,
            decay_tensor if decay_tensor is not None else table.addresses,
            1.0 - decay,
            STUDENT=_TL_DTYPE[student],
            WORKING=_TL_DTYPE[working or torch.float32],
            HAS_WORKING=working is not None,
            DECAY_ON_DEVICE=decay_tensor is not None,
            ALIGNED=table.aligned,
            BLOCK=BLOCK,
            num_warps=8,
        )


def ema_update(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    decay: float,
    decay_tensor: Tensor | None,
    working: Sequence[Tensor],
) -> None:
    """Launch the update; update tensors with gaps through a contiguous copy."""
    plain = [[x if x.is_contiguous() else x.contiguous() for x in group] for group in (teacher, student, working)]
    launch(prepare(*plain), decay, decay_tensor)
    for target, copy in zip([*teacher, *working], [*plain[0], *plain[2]], strict=True):
        if target is not copy:
            target.copy_(copy)
