"""Every instruction set of the C++ kernels gives the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.ops import HAS_CPP
from tests.helpers.common import run_python

OPERATIONS = """
import itertools
import torch
from d2v_fast.ops import backends, data2vec_loss, ema_update_, layer_norm_gelu, masked_smooth_l1, topk_target
from tests.ops.target_reference import FINAL_NORMS, LAYER_NORMS, make_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
results = {"loss": [], "norm": [], "teacher": [], "working": []}
torch.manual_seed(7)
for dtype, other in zip(DTYPES, (*DTYPES[1:], DTYPES[0])):
    layers = make_layers((2, 70, 157), 3, dtype, torch.device("cpu"), 10.0)
    rows = torch.randint(0, 140, (91,))
    pred = torch.randn(91, 157).to(other).requires_grad_()
    for first, final in itertools.product(LAYER_NORMS, FINAL_NORMS):
        results["loss"].append(topk_target(layers, layer_norm=first, final_norm=final, rows=rows))
    target = results["loss"][-1].to(dtype)
    for beta in (0.0, 1.5):
        for loss, moments in (
            masked_smooth_l1(pred, target, beta=beta),
            (masked_smooth_l1(pred, target, beta=beta, moments=False).loss, pred[:0]),
            data2vec_loss(pred, layers, layer_norm="instance", final_norm="layer", rows=rows, beta=beta),
        ):
            results["loss"] += [loss.detach(), moments, *torch.autograd.grad(loss, pred)]
torch.manual_seed(6)
for dtype in DTYPES:
    x = torch.randn(70, 157).to(dtype).requires_grad_()
    weight, bias = torch.randn(157, requires_grad=True), torch.randn(157, requires_grad=True)
    y = layer_norm_gelu(x, weight, bias)
    results["norm"] += [y.detach(), *torch.autograd.grad(y, (x, weight, bias), torch.randn(70, 157).to(dtype))]
torch.manual_seed(5)
sizes = (1, 63, 16384 * 3 + 7)
teacher = [torch.randn(n) for n in sizes]
student = [torch.randn(n).to(dtype) for n, dtype in zip(sizes, DTYPES)]
working = [torch.empty_like(value) for value in student]
ema_update_(teacher, student, 0.9995, working=working)
results["teacher"], results["working"] = teacher, working
"""


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    "capability",
    ["baseline", pytest.param("avx2", marks=pytest.mark.slow), pytest.param("avx512", marks=pytest.mark.slow)],
)
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    """Compare a process that is limited to one instruction set with this process.

    The losses agree bit for bit. The baseline has no FMA, so `layer_norm_gelu` and the EMA round differently there.
    """
    saved = tmp_path / "results.pt"
    code = OPERATIONS + f"torch.save(results, {str(saved)!r}); print(backends()['cpu'])"
    assert f"c++ ({capability})" in run_python(code, D2V_CPU_CAPABILITY=capability)
    there = torch.load(saved)
    names: dict[str, Any] = {}
    exec(OPERATIONS, names)
    here = names["results"]
    for kind in here:
        assert len(there[kind]) == len(here[kind]) > 0
        for i, (other, mine) in enumerate(zip(there[kind], here[kind], strict=True)):
            if capability != "baseline" or kind == "loss":
                assert torch.equal(other, mine), f"{kind} {i}"
            elif kind == "norm":
                # a last bit of fp32 may tip the rounding to 16 bits
                tolerance = {} if mine.dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
                torch.testing.assert_close(other, mine, **tolerance, msg=f"{kind} {i}")
            elif kind == "teacher":
                torch.testing.assert_close(other, mine, rtol=2e-7, atol=1e-7, msg=f"{kind} {i}")
    for copy, value in zip(there["working"], there["teacher"], strict=True):
        assert torch.equal(copy, value.to(copy.dtype))
