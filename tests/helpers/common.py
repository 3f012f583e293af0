"""Comparison by the two-times rule and of random samples, odd memory layouts, and Triton compiled without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact
from torch import Tensor

from d2v_fast.checkpoints.files import Checkpoint, verified_checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def opened(folder: Path) -> Checkpoint:
    """Open and verify the checkpoint in `step-N`; it is closed when it is garbage collected."""
    return verified_checkpoint(folder, int(folder.name.removeprefix("step-")))


def assert_within_twice(
    actual: Tensor, eager: Tensor, truth: Tensor, *, floor: float = 1e-6, name: str = "result"
) -> None:
    """Assert that the largest error of ``actual`` is at most twice that of the eager composition, plus a floor.

    Both errors are measured against the fp64 ``truth``; flash-attention's tests use the same rule.
    """
    scale = truth.abs().max().clamp_min(1e-30).item() if truth.numel() else 1.0
    error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = 2 * ((eager.double() - truth).abs().max().item() if truth.numel() else 0.0) + floor * scale
    assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e} (scale {scale:.3e})"
    assert not actual.isnan().any(), f"{name} holds NaN"


def assert_same_share(sample: np.ndarray, reference: np.ndarray) -> None:
    """Assert that two boolean samples can have the same probability.

    Uses Fisher's exact test, since rare events are far from normal, at the level of 5 standard errors."""
    share = (sample.sum() + reference.sum()) / (sample.size + reference.size)
    error = np.sqrt(share * (1 - share) * (1 / sample.size + 1 / reference.size))
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


COMPILE_PRELUDE = """
import json, os, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def facts(kernel, signature, constexprs, aligned=(), num_warps=4, capabilities=(80, 90, 100), **options):
    '''What ptxas made of a kernel: spilled bytes, shared memory, and how often each width of global access occurs.'''
    if os.environ.get("EVERY_CAPABILITY"):
        capabilities = (80, 90, 100)
    attrs = {}
    for name in aligned:
        path, kind = (kernel.arg_names.index(name),), signature[name]
        # alignment is set per element of a tuple
        for where in [(*path, i) for i in range(len(kind))] if isinstance(kind, tuple) else [path]:
            attrs[where] = [["tt.divisibility", 16]]
    rows = []
    for capability in capabilities:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        target = GPUTarget("cuda", capability, 32)
        out = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
        ptx = out.asm["ptx"]
        rows.append({
            "capability": capability,
            "loads": re.findall(r"ld\\.global[\\w.:]*?\\.(v\\d\\.)?[bfus](\\d+)", ptx),
            "stores": re.findall(r"st\\.global[\\w.:]*?\\.(v\\d\\.)?[bfus](\\d+)", ptx),
            "spills": spilled_bytes(out.asm["cubin"]),
            "shared": out.metadata.shared,
        })
    return rows

def spilled_bytes(cubin):
    '''Local memory that a kernel's frame takes, out of cuobjdump's resource usage.'''
    import subprocess, tempfile, pathlib
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin); f.flush()
        command = [str(tool), "--dump-resource-usage", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\\d+).*?LOCAL:(\\d+)", text)
    return int(found[1]) + int(found[2])

"""


def compile_facts(code: str, every_capability: bool = False) -> list[dict]:
    """Run ``code`` after ``COMPILE_PRELUDE`` in a process where Triton compiles, and return the list that it prints.

    With ``every_capability``, compile each variant for sm_80, sm_90 and sm_100 regardless of what it asks for."""
    environment = {"TRITON_INTERPRET": "0", "EVERY_CAPABILITY": "1" if every_capability else ""}
    return json.loads(run_python(COMPILE_PRELUDE + code, **environment).strip().splitlines()[-1])


every_capability = pytest.mark.parametrize(
    "every_capability", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["main", "all"]
)
"""Compile the main variants for every GPU generation, and the others for one; or, slow, all for every one."""


def width_bytes(accesses: list[list[str]]) -> list[int]:
    """Return the bytes that each global access of a thread moves, from the PTX suffixes of ``facts``."""
    return [int(bits) // 8 * (int(re.sub(r"\D", "", vector)) if vector else 1) for vector, bits in accesses]


Launcher = Callable[..., object]
