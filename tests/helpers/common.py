"""Comparison by the two-times rule and of random samples, and odd memory layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_within_twice(
    actual: Tensor, eager: Tensor, truth: Tensor, *, times: float = 2.0, floor: float = 1e-6, name: str = "result"
) -> None:
    """Assert that the largest error of ``actual`` is at most `times` that of the eager composition, plus a floor.

    Both errors are measured against the fp64 ``truth``; flash-attention's tests use the same rule.
    """
    scale = truth.abs().max().clamp_min(1e-30).item() if truth.numel() else 1.0
    error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = times * ((eager.double() - truth).abs().max().item() if truth.numel() else 0.0) + floor * scale
    assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e} (scale {scale:.3e})"
    assert not actual.isnan().any(), f"{name} holds NaN"


def assert_same_share(sample: np.ndarray, reference: np.ndarray) -> None:
    """Assert that two boolean samples can have the same probability.

    Uses Fisher's exact test, since rare events are far from normal, at the level of 5 standard errors."""
    from scipy.stats import fisher_exact

    share = (sample.sum() + reference.sum()) / (sample.size + reference.size)
    error = (share * (1 - share) * (1 / sample.size + 1 / reference.size)) ** 0.5
    # most differences are far below what this slow test would object to
    if abs(sample.mean() - reference.mean()) <= 2 * error:
        return
    table = [[sample.sum(), (~sample).sum()], [reference.sum(), (~reference).sum()]]
    assert fisher_exact(table).pvalue >= 5.7e-7, table


def non_contiguous(x: Tensor) -> Tensor:
    """Copy a tensor into every second row of a buffer filled with NaN."""
    buffer = torch.full(
        (2 * x.shape[0], *x.shape[1:]),
        float("nan") if x.is_floating_point() else -1,
        dtype=x.dtype,
        device=x.device,
    )
    view = buffer[::2]
    view.copy_(x)
    return view


def run_python(code: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter, for modes that are chosen at import, and return its standard output."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


every_capability = pytest.mark.parametrize(
    "every_capability", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["main", "all"]
)
"""Compile the main cases of ``compiled_kernels``; or, slow, all of them for every GPU generation."""


Launcher = Callable[..., object]
