"""What several tests share: comparison by the two-times rule, comparison of random samples, odd memory layouts, Triton
compiled without a GPU."""

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
    """The checkpoint in `step-N`, verified. It is closed when it is dropped."""
    return verified_checkpoint(folder, int(folder.name.removeprefix("step-")))


def assert_within_twice(
    actual: Tensor, eager: Tensor, truth: Tensor, *, floor: float = 1e-6, name: str = "result"
) -> None:
    """The largest error of ``actual`` against the fp64 ``truth`` is at most twice that of the eager composition,
    plus a floor.

    The rule of thumb of flash-attention's tests: the fused form may not be worse than what one would have written.
    """
    scale = truth.abs().max().clamp_min(1e-30).item() if truth.numel() else 1.0
    error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
    allowed = 2 * ((eager.double() - truth).abs().max().item() if truth.numel() else 0.0) + floor * scale
    assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e} (scale {scale:.3e})"
    assert not actual.isnan().any(), f"{name} holds NaN"


def assert_same_share(sample: np.ndarray, reference: np.ndarray) -> None:
    """Two samples of something that is True or False could have the same probability: Fisher's exact test (rare events
    are far from normal) at what 5 standard errors would allow."""
    table = [[sample.sum(), (~sample).sum()], [reference.sum(), (~reference).sum()]]
    assert fisher_exact(table).pvalue >= 5.7e-7, table


def non_contiguous(x: Tensor) -> Tensor:
    """The same values in memory with gaps: every second element of a twice as wide buffer along the first dimension."""
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
    """Standard output of ``code`` in a fresh interpreter, for modes that are chosen at import."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


COMPILE_PRELUDE = """
import json, os, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def facts(kernel, signature, constexprs, aligned=(), num_warps=4, capabilities=(80, 90, 100)):
    '''What ptxas made of a kernel: registers, spilled bytes, and how often each width of global access occurs.'''
    if os.environ.get("EVERY_CAPABILITY"):
        capabilities = (80, 90, 100)
    attrs = {}
    for name in aligned:
        path, kind = (kernel.arg_names.index(name),), signature[name]
        # the elements of a tuple are aligned one by one
        for where in [(*path, i) for i in range(len(kind))] if isinstance(kind, tuple) else [path]:
            attrs[where] = [["tt.divisibility", 16]]
    rows = []
    for capability in capabilities:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        out = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        ptx = out.asm["ptx"]
        rows.append({
            "capability": capability,
            "loads": re.findall(r"ld\\.global[\\w.:]*?\\.(v\\d\\.)?[bfus](\\d+)", ptx),
            "stores": re.findall(r"st\\.global[\\w.:]*?\\.(v\\d\\.)?[bfus](\\d+)", ptx),
            "spills": spilled_bytes(out.asm["cubin"]),
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
    """Run ``code`` after ``COMPILE_PRELUDE`` in a process where Triton compiles; it prints a JSON list made by
    ``facts``. With ``every_capability`` each variant is compiled for sm_80, sm_90 and sm_100, whatever it asks for."""
    environment = {"TRITON_INTERPRET": "0", "EVERY_CAPABILITY": "1" if every_capability else ""}
    return json.loads(run_python(COMPILE_PRELUDE + code, **environment).strip().splitlines()[-1])


every_capability = pytest.mark.parametrize(
    "every_capability", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["main", "all"]
)
"""Compile the main variants for every GPU generation, and the others for one; or, slow, all for every one."""


def width_bytes(accesses: list[list[str]]) -> list[int]:
    """Bytes that each global access of a thread moves, from the PTX suffixes that ``facts`` reports."""
    return [int(bits) // 8 * (int(re.sub(r"\D", "", vector)) if vector else 1) for vector, bits in accesses]


Launcher = Callable[..., object]
