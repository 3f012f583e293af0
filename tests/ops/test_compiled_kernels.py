"""Every Triton kernel as it is launched, compiled and not run: no spills, and accesses of 16 bytes.

One process compiles the kernels of all operations.
"""

from __future__ import annotations

import pytest

from tests.helpers.common import every_capability
from tests.helpers.compiled_kernels import compile_facts

triton = pytest.importorskip("triton")


def test_sizes() -> None:
    from d2v_fast.kernels.sizes import cdiv, next_power_of_2

    for n in [*range(1, 300), 2**20 - 1, 2**20, 2**40 + 1]:
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        for size in (1, 3, 32, 100):
            assert cdiv(n, size) == triton.cdiv(n, size)
    assert cdiv(0, 8) == 0


@every_capability
def test_ema(every_capability: bool) -> None:
    for row in compile_facts("ema", every_capability):
        assert row["spills"] == 0, row
        # a thread has 16 elements of a whole block, so one access of 16 bytes for each byte of an element's width:
        # fp32 teacher and student read, teacher and working copy written; the ragged end of a tensor may be narrow
        student, working = (4 if "fp32" in part else 2 for part in row["case"].split(","))
        assert row["loads"].count(16) >= 4 + student, row
        assert row["stores"].count(16) >= 4 + working, row


@every_capability
def test_topk_target(every_capability: bool) -> None:
    facts = compile_facts("topk_target", every_capability)
    assert {row["capability"] for row in facts} == {80, 90, 100}
    for row in facts:
        assert row["spills"] == 0, row
        # a layer is read by nothing narrower; the rest are single indices and, in the tiles, statistics
        assert row["loads"].count(16) >= 4, row
        assert not {2, 4} & set(row["loads"]), row
        if row["kernel"] == "topk_target_fwd":
            assert set(row["stores"]) == {16}, row


@every_capability
def test_masked_loss(every_capability: bool) -> None:
    for row in compile_facts("masked_loss", every_capability):
        assert row["spills"] == 0, row
        loads, stores = row["loads"], row["stores"]
        if row["kernel"] == "sum_blocks":
            # the losses of the blocks are read by single numbers
            assert set(loads) <= {4, 16}, row
            assert loads.count(16) >= 8 * ("moments" in row["case"]), row
            continue
        # the row map is 8 bytes wide; the incoming gradient and the loss of a block are one number
        assert loads.count(16) >= (2 if row["kernel"] == "scale_gradient" else 3), row
        assert loads.count(2) == stores.count(2) == 0, row
        assert loads.count(4) == (row["kernel"] == "scale_gradient"), row
        assert stores.count(4) == (row["kernel"] == "masked_loss_fwd"), row
        assert stores.count(16) >= 1, row


@every_capability
def test_data2vec_loss(every_capability: bool) -> None:
    for row in compile_facts("data2vec_loss", every_capability):
        assert row["spills"] == 0, row
        if row["kernel"] != "data2vec_loss_fwd":
            continue
        # a prediction and every layer; the rest are the rows, and the block's one sum of losses
        loads, stores = row["loads"], row["stores"]
        assert loads.count(16) >= 7, row
        assert set(loads) == {8, 16}, row
        assert stores.count(16) >= (5 if "moments" in row["case"] else 1), row
        assert len(stores) - stores.count(16) == 1, row


@every_capability
def test_norm_gelu(every_capability: bool) -> None:
    for row in compile_facts("norm_gelu", every_capability):
        assert row["spills"] == 0, row
        loads, stores = row["loads"], row["stores"]
        if row["kernel"] == "sum_programs":
            # the sum of a channel is one number
            assert set(loads) == {16}, row
            continue
        assert loads.count(2) == stores.count(2) == 0, row
        # weight and bias; the rows of one or two tensors; statistics are one number a row
        assert loads.count(16) >= (4 if row["kernel"] == "norm_gelu_fwd" else 6), row
        assert loads.count(4) <= 8, row
        assert stores.count(16) >= 2, row


@every_capability
def test_attention(every_capability: bool) -> None:
    for row in compile_facts("attention", every_capability):
        assert row["spills"] == 0, row
        assert row["shared"] <= 99 * 1024, row
        loads, stores = row["loads"], row["stores"]
        assert loads.count(2) == stores.count(2) == 0, row
        assert stores.count(16) >= (1 if "fp32" in row["case"] else 2), row
        # statistics and positions are one number a row; queries, keys and bias are wide, or asynchronous copies
        assert len(loads) - loads.count(16) <= (40 if "slopes" in row["case"] else 20), row
