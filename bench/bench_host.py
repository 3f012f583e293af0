"""Host time: the cost of a call on tiny tensors, with one thread.

A GPU waits for the host if this is longer than its own work; on a CPU a small model pays it at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Contest
from d2v_fast.ops import EmaUpdate, data2vec_loss, ema_update_, layer_norm_gelu, masked_smooth_l1

DECAY = 0.9998
# number of tensors of a ViT-L
NUM_TENSORS, NUM_ELEMENTS = 367, 4
# calls per measurement: a single call is too short to time
CALLS = 5
CPU_ROUNDS = 400


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls `run` `CALLS` times."""

    def calls() -> None:
        for _ in range(CALLS):
            run()

    return calls


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the lowest CPU time of this thread: other processes slow it down, but less than the clock on the wall."""
    lowest = float("inf")
    for _ in range(CPU_ROUNDS):
        start = time.thread_time()
        run()
        lowest = min(lowest, time.thread_time() - start)
    return lowest


@pytest.mark.parametrize("way", ["ema_update_", "EmaUpdate"])
@pytest.mark.parametrize("with_working", [False, True])
def bench_ema(compete: Callable[[Contest], None], device: torch.device, way: str, with_working: bool) -> None:
    teacher = [torch.randn(NUM_ELEMENTS, device=device) for _ in range(NUM_TENSORS)]
    student = [torch.randn_like(t) for t in teacher]
    working = [torch.empty_like(t, dtype=torch.bfloat16) for t in teacher] if with_working else []
    prepared, initial = EmaUpdate(teacher, student, working=working or None), [t.clone() for t in teacher]

    def lists() -> None:
        ema_update_(list(teacher), list(student), DECAY, working=working or None)

    def stock() -> None:
        torch._foreach_lerp_(teacher, student, 1 - DECAY)
        if working:
            torch._foreach_copy_(working, teacher)

    def outcome(run: Callable[[], None]) -> Sequence[Tensor]:
        torch._foreach_copy_(teacher, initial)
        run()
        return [*teacher[:40], *working[:40]]

    compete(
        Contest(
            op="host time",
            case=f"{way}, {NUM_TENSORS} tensors of {NUM_ELEMENTS}{', working copy' if working else ''}, {CALLS} calls",
            ours=repeated(lists if way == "ema_update_" else lambda: prepared(DECAY)),
            peers={"stock": repeated(stock)},
            model_bytes=CALLS * NUM_TENSORS * NUM_ELEMENTS * (14 if working else 12),
            outcome=outcome,
        )
    )


class Nothing(torch.autograd.Function):
    """Computes nothing: its cost is that of torch's own calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def bench_losses(compete: Callable[[Contest], None], benchmark: Any, device: torch.device) -> None:
    """`data2vec_loss`, `masked_smooth_l1` and `layer_norm_gelu`, forward and backward, on tensors of 8 elements."""
    pred = torch.randn(2, 4, device=device, requires_grad=True)
    layers = [torch.randn(1, 2, 4, device=device) for _ in range(2)]
    rows = torch.arange(2, device=device)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    weight, bias = torch.ones(4, device=device, requires_grad=True), torch.zeros(4, device=device, requires_grad=True)

    def ours() -> tuple[Tensor, ...]:
        losses = data2vec_loss(pred, layers, rows=rows).loss, masked_smooth_l1(pred, layers[0][0]).loss
        grads = [torch.autograd.grad(loss, pred)[0] for loss in losses]
        return *grads, *torch.autograd.grad(layer_norm_gelu(x, weight, bias).sum(), (x, weight, bias))

    def stock() -> tuple[Tensor, ...]:
        with torch.no_grad():
            target = torch.stack([F.layer_norm(layer, (4,)) for layer in layers]).mean(0)[0]
        losses = F.mse_loss(pred, target), F.mse_loss(pred, layers[0][0])
        grads = [torch.autograd.grad(loss, pred)[0] for loss in losses]
        y = F.gelu(F.layer_norm(x, (4,), weight, bias))
        return *grads, *torch.autograd.grad(y.sum(), (x, weight, bias))

    scalar, values = torch.zeros((), device=device), torch.zeros(2, 4, device=device)

    def nothing() -> None:
        for output in (scalar, scalar):
            torch.autograd.grad(Nothing.apply(pred, output), pred)
        torch.autograd.grad(Nothing.apply(x, values).sum(), x)

    run_ours, run_stock = repeated(ours), repeated(stock)
    compete(
        Contest(
            op="host time",
            case=f"the losses and norm + GELU, forward and backward, 8 elements, {CALLS} calls",
            ours=run_ours,
            peers={"stock": run_stock},
            model_bytes=CALLS * 8 * 4 * 12,
            outcome=lambda run: ours() if run is run_ours else stock(),
        )
    )
    # of `CALLS` calls, and of as many autograd functions that compute nothing
    benchmark.extra_info |= {"cpu_s": cpu_seconds(run_ours), "cpu_s_of_nothing": cpu_seconds(repeated(nothing))}
