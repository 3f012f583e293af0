"""What the benchmarks compare before they measure: results that a GPU computes in another order must pass, too."""

from __future__ import annotations

import pytest
import torch

from bench import bench_attention, bench_masked_loss
from bench.measure import Contest


@pytest.mark.parametrize(("device", "is_exact"), [("cpu", True), ("meta", False)])
def test_losses_with_and_without_moments(device: str, is_exact: bool) -> None:
    """On a CPU they are the same bit for bit; every other device may add in another order."""
    contests: list[Contest] = []
    bench_masked_loss.bench_without_moments(contests.append, torch.device(device), "bf16", "smooth L1")
    (contest,) = contests
    assert (contest.rtol == contest.atol == 0.0) == is_exact


@pytest.mark.parametrize("size", ["ViT-B", "speech 2.0 Base"])
def test_gradients_of_a_bias_are_relative_to_the_largest(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a slope sums terms of either sign, so that a small one has the error of the large ones."""
    contests: list[Contest] = []
    monkeypatch.setitem(bench_attention.SIZES, size, (2, 9, 8, 3, 3))
    # importing the compiler takes seconds
    monkeypatch.setattr(torch, "compile", lambda function: function)
    bench_attention.bench_attention(contests.append, torch.device("cpu"), size)
    (contest,) = contests
    mine, theirs = (contest.outcome(run) for run in (contest.ours, contest.peers["published"]))
    assert mine[-1].abs().max() == 1.0
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=contest.rtol, atol=contest.atol)
