"""Compile the Triton kernels as their launchers launch them, without a GPU, and tell what ptxas made of them.

    TRITON_INTERPRET=0 python -m tests.helpers.compiled_kernels [operation...] [--all]

prints registers, spilled bytes and widths of global accesses of every kernel. The launchers run on meta tensors of
published sizes, their launches are recorded and compiled, so that what is checked is what a GPU would get.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

EVERY = (80, 90, 100)
HOPPER = (90,)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """A call of a launcher, and the capabilities for which it is compiled if not every case is asked for."""

    name: str
    call: Callable[[], object]
    capabilities: tuple[int, ...] = ()


class Launch(NamedTuple):
    """A recorded launch; `options` holds keyword arguments that are not the kernel's, such as `num_warps`."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    grid: tuple[int, ...]


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(count: int) -> torch.Tensor:
    return empty(count, dtype=torch.int64)


def topk_target_cases() -> Iterator[Case]:
    from d2v_fast.kernels.topk_target import topk_target

    def case(
        name: str,
        shape: tuple[int, int, int],
        norms: tuple[int, int],
        dtype: torch.dtype = BF16,
        full: bool = False,
        capabilities: tuple[int, ...] = (),
    ) -> Case:
        layers = [empty(*shape, dtype=dtype)] * 6
        rows, lengths = (None, indices(shape[0])) if full else (indices(1000), None)
        return Case(f"{name} {_short(dtype)}", lambda: topk_target(layers, *norms, rows, lengths, 1e-5), capabilities)

    yield case("vision", (128, 196, 768), (1, 1), capabilities=EVERY)
    yield case("vision", (128, 196, 768), (1, 1), FP32)
    yield case("vision large", (64, 196, 1024), (1, 1))
    yield case("vision large", (64, 196, 1024), (1, 1), FP32)
    yield case("wide", (4, 196, 1280), (1, 0))
    yield case("wide", (4, 196, 1280), (1, 0), FP32)
    yield case("speech", (12, 992, 768), (2, 1), capabilities=EVERY)
    yield case("speech", (12, 992, 768), (2, 1), FP32)
    yield case("speech, padded", (12, 992, 768), (2, 1), full=True)
    yield case("short", (16, 196, 768), (2, 0), capabilities=HOPPER)
    yield case("short", (16, 196, 768), (2, 0), FP32)
    yield case("batch", (12, 992, 1024), (3, 0))
    yield case("final instance", (12, 992, 768), (1, 2), capabilities=HOPPER)
    yield case("final instance, large", (12, 992, 1024), (2, 2), FP32)


def norm_gelu_cases() -> Iterator[Case]:
    from d2v_fast.kernels import norm_gelu

    # as on an H100 or H200
    norm_gelu.num_sms = lambda device: 132
    layer_norm_gelu, layer_norm_gelu_backward = norm_gelu.layer_norm_gelu, norm_gelu.layer_norm_gelu_backward

    def case(width: int, dtype: torch.dtype, capabilities: tuple[int, ...] = ()) -> Iterator[Case]:
        x, weight = empty(8, 49_999, width, dtype=dtype), empty(width, dtype=dtype)
        of_rows = [empty(8, 49_999, dtype=FP32)] * 2
        name = f"width {width} {_short(dtype)}"
        yield Case(name, lambda: layer_norm_gelu(x, weight, weight, 1e-5), capabilities)
        yield Case(name, lambda: layer_norm_gelu_backward(x, x, weight, weight, *of_rows), capabilities)

    yield from case(512, BF16, EVERY)
    yield from case(512, FP32)
    yield from case(768, FP16)
    yield from case(1024, BF16)
    yield from case(4096, BF16)


def masked_loss_cases() -> Iterator[Case]:
    from d2v_fast.kernels.masked_loss import masked_smooth_l1, scale_gradient_

    def case(
        name: str,
        num_rows: int,
        dtype: torch.dtype = BF16,
        beta: float = 2.0,
        moments: bool = False,
        mapped: bool = False,
        width: int = 768,
        capabilities: tuple[int, ...] = (),
    ) -> Case:
        pred, target = empty(num_rows, width, dtype=dtype), empty(2512 if mapped else num_rows, width, dtype=FP32)
        rows = indices(num_rows) if mapped else None
        name = f"{name}{' map' * mapped}{' moments' * moments} {_short(dtype)}"
        return Case(name, lambda: masked_smooth_l1(pred, target, rows, beta, 1.0, True, True, moments), capabilities)

    for moments in (False, True):
        yield case("5,800", 5800, moments=moments, capabilities=EVERY)
        yield case("40,192", 40_192, moments=moments, mapped=True, capabilities=HOPPER)
        yield case("15,053", 15_053, FP32, 0.0, moments)
        yield case("large", 15_053, FP16, 2.0, moments, width=1024)
    slope, factor = empty(5800, 768), torch.empty((), device="meta")
    yield Case("backward bf16", lambda: scale_gradient_(slope, factor, 1.0, True), HOPPER)


def data2vec_loss_cases() -> Iterator[Case]:
    from d2v_fast.kernels.data2vec_loss import data2vec_loss

    def case(
        name: str,
        norms: tuple[int, int],
        dtype: torch.dtype = BF16,
        moments: bool = False,
        width: int = 768,
        capabilities: tuple[int, ...] = (),
    ) -> Case:
        layers = [empty(128, 196, width, dtype=dtype)] * 6
        pred, rows = empty(15_053, width, dtype=dtype), indices(15_053)
        arguments = (pred, layers, *norms, rows, None, 1e-5, None, 2.0, 1.0, True, True, moments)
        return Case(f"{name}{' moments' * moments} {_short(dtype)}", lambda: data2vec_loss(*arguments), capabilities)

    for moments in (False, True):
        yield case("vision", (1, 1), moments=moments, capabilities=EVERY)
        yield case("vision", (1, 1), FP32, moments)
        yield case("instance", (2, 0), BF16, moments)
        yield case("final instance", (1, 2), FP32, moments)
        yield case("vision large", (1, 1), BF16, moments, 1024)
        yield case("vision large", (2, 1), FP32, moments, 1024)
        yield case("wide", (1, 1), BF16, moments, 1280)


def ema_cases() -> Iterator[Case]:
    from d2v_fast.kernels.ema import ema_update

    def case(student: torch.dtype, working: torch.dtype, capabilities: tuple[int, ...] = ()) -> Case:
        groups = [[empty(768, 768, dtype=dtype)] for dtype in (FP32, student, working)]
        decay = torch.empty((), dtype=torch.float64, device="meta")
        name = f"{_short(student)} student, {_short(working)} copy"
        return Case(name, lambda: ema_update(groups[0], groups[1], 0.0, decay, groups[2]), capabilities)

    yield case(BF16, BF16, EVERY)
    yield case(FP32, BF16, HOPPER)
    yield case(FP32, FP32)
    yield case(FP16, FP16)


def attention_cases() -> Iterator[Case]:
    from d2v_fast.kernels.attention import attention_with_bias
    from d2v_fast.kernels.attention_backward import attention_with_bias_backward

    def case(
        width: int, placed: bool = False, dtype: torch.dtype = BF16, capabilities: tuple[int, ...] = ()
    ) -> Iterator[Case]:
        q = empty(128, 197, 12, width, dtype=dtype).transpose(1, 2)
        bias = empty(12, dtype=FP32) if placed else empty(1, 12, 197, 200, dtype=dtype)[..., :197]
        lse = empty(128, 12, 197, dtype=FP32)
        positions, lengths = (empty(128, 197, dtype=torch.int32), indices(128)) if placed else (None, None)
        others = positions, lengths, indices(1), 0.1
        name = f"width {width}{' slopes' * placed} {_short(dtype)}"
        yield Case(name, lambda: attention_with_bias(q, q, q, bias, *others), capabilities)
        yield Case(name, lambda: attention_with_bias_backward(q, q, q, q, bias, q, lse, *others, True), capabilities)

    yield from case(64, capabilities=HOPPER)
    yield from case(80)
    yield from case(64, placed=True)
    yield from case(64, dtype=FP32)
    yield from case(80, dtype=FP32)
    yield from case(80, placed=True, dtype=FP32)


OPERATIONS = {
    "attention": attention_cases,
    "topk_target": topk_target_cases,
    "masked_loss": masked_loss_cases,
    "data2vec_loss": data2vec_loss_cases,
    "norm_gelu": norm_gelu_cases,
    "ema": ema_cases,
}


def record(call: Callable[[], object]) -> list[Launch]:
    """Return the launches of a call, which do not run."""
    from triton.runtime.jit import JITFunction

    launches = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        launches.append(Launch(self, arguments, {k: v for k, v in kwargs.items() if k not in names}, tuple(grid)))

    before, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = before
    return launches


class Specialization(NamedTuple):
    """How Triton types the arguments of a launch. Keys are paths: the argument's index, and an index into a tuple."""

    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]

    def kind_of(self, value: Any, path: tuple[int, ...], fixed: bool) -> Any:
        """Return Triton's type of an argument; note a constant, and what is known to be a multiple of 16."""
        if isinstance(value, tuple):
            return tuple(self.kind_of(item, (*path, i), fixed) for i, item in enumerate(value))
        if value is None or (type(value) is int and value == 1 and not fixed):
            self.constants[path] = value
            return "constexpr"
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if type(number) is int and number % 16 == 0 and not fixed:
            self.attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        if type(value) is int:
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return "u1" if isinstance(value, bool) else "fp32"


def compile_launch(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile a recorded launch as Triton would at run time, and return facts of the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, known = {}, Specialization({}, {})
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], known.constants[i,] = "constexpr", value
        else:
            signature[parameter.name] = known.kind_of(value, (i,), parameter.do_not_specialize)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=known.constants, attrs=known.attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, spills = resources(built.asm["cubin"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": built.metadata.shared,
        "loads": access_bytes("ld", built.asm["ptx"]),
        "stores": access_bytes("st", built.asm["ptx"]),
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers of a thread and bytes of its frame in local memory, which hold what is spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    return int(found[1]), int(found[2]) + int(found[3])


def access_bytes(instruction: str, ptx: str) -> list[int]:
    """Return the bytes that each global access of a thread moves."""
    accesses = re.findall(instruction + r"\.global[\w.:]*?\.(?:v(\d)\.)?[bfus](\d+)", ptx)
    return [int(bits) // 8 * int(vector or 1) for vector, bits in accesses]


def facts(operation: str, every: bool) -> Iterator[dict[str, Any]]:
    """Compile the launches of all cases of an operation."""
    for case in OPERATIONS[operation]():
        for launch in record(case.call):
            for capability in EVERY if every else case.capabilities:
                yield {
                    "operation": operation,
                    "case": case.name,
                    "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
                    "capability": capability,
                    "warps": launch.options["num_warps"],
                    "grid": launch.grid,
                } | compile_launch(launch, capability)


def compile_facts(operation: str, every: bool) -> list[dict[str, Any]]:
    """Return `facts` from the process that compiles for all operations."""
    return [row for row in _all_facts(every) if row["operation"] == operation]


@functools.cache
def _all_facts(every: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.helpers.compiled_kernels", "--json", *OPERATIONS, *["--all"] * every]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _short(dtype: torch.dtype) -> str:
    return POINTERS[dtype][1:]


def _counted(widths: list[int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(Counter(widths).items(), reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="*", metavar="operation", help=", ".join(OPERATIONS))
    parser.add_argument("--all", action="store_true", help="every case for sm_80, sm_90 and sm_100")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args()
    if not options.json:
        print(f"{'kernel':24} {'case':28}  sm warps         grid regs spills shared  bytes of accesses")
    for operation in options.operations or OPERATIONS:
        for row in facts(operation, options.all):
            if options.json:
                print(json.dumps(row))
                continue
            print(
                f"{row['kernel']:24} {row['case']:28} {row['capability']:3} {row['warps']:5} "
                f"{'x'.join(map(str, row['grid'])):>12} {row['registers']:4} {row['spills']:6} {row['shared']:6}  "
                f"loads {_counted(row['loads'])}; stores {_counted(row['stores'])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
