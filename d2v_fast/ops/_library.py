"""The ``torch.library`` of this package: schemas, and the kernel of each device.

PyTorch's dispatcher chooses the backend. The reference is the default kernel; C++ is registered for the CPU key if
``_C.so`` was built, and Triton for the CUDA key if Triton can be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Storage types of the operations, whose kernels compute in fp32."""

CHECKED_DTYPES = (*FLOAT_DTYPES, torch.float64)
"""With fp64, in which the reference runs: to check a result, not to train."""

library = torch.library.Library("d2v", "DEF")
library.define("cpu_capability() -> int")

_C_PATH = Path(__file__).resolve().parent.parent / "_C.so"
# how to obtain the kernels: an installed package has no sources to build them from
_BUILD = (
    f"install a C++20 compiler and make, and run `pip install -e .` again in {_C_PATH.parent.parent}"
    if (_C_PATH.parent.parent / "CMakeLists.txt").is_file()
    else "install a wheel of d2v_fast for this platform, or, with a C++20 compiler and make, d2v_fast again from its "
    "source archive or a clone (`pip install --force-reinstall --no-deps`)"
)
HAS_CPP = False
"""True if the C++ kernels were built and loaded. Otherwise CPU tensors use the PyTorch reference."""


@cache
def has_triton() -> bool:
    """Return whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def define(
    schema: str, reference: Callable[..., Any], triton_launcher: str, check: Callable[..., None] | None = None
) -> None:
    """Define the operation ``d2v::<schema>`` with its reference and the name of its Triton launcher.

    Args:
        schema: ``name(arguments) -> result`` in PyTorch's schema language.
        reference: Default kernel, which defines the operation's meaning.
        triton_launcher: ``module.function`` below ``d2v_fast.kernels``, imported at the first call with a CUDA tensor.
        check: Called with the operation's arguments before the reference or Triton. The C++ kernel does its own checks.
    """
    name = schema.partition("(")[0]
    library.define(schema)

    @wraps(reference)
    def default(*args: Any) -> Any:
        if (missing := missing_kernels("cpu")) is not None:
            _say_once(missing)
        if check is not None:
            check(*args)
        return reference(*args)

    def on_cuda(*args: Any) -> Any:
        if check is not None:
            check(*args)
        if (missing := missing_kernels("cuda")) is not None:
            _say_once(missing)
            return reference(*args)
        first = _first_tensor(args)
        if first.dtype == torch.float64:
            # the kernels compute in fp32
            return reference(*args)
        launcher = _launcher(triton_launcher)
        # Triton launches on the current device, which may differ from that of the tensors
        with torch.cuda.device(first.device):
            return launcher(*args)

    library.impl(name, default, "CompositeExplicitAutograd")
    library.impl(name, on_cuda, "CUDA")
    arguments = getattr(torch.ops.d2v, name).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if written:
        _raise_versions(name, written)
    # torch.vmap cannot derive a batching rule for lists of tensors
    library.impl(name, _no_batch(name) if written else reference, "FuncTorchBatchedDecomposition")


def _no_batch(name: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise RuntimeError(f"`{name}` writes in place and cannot run under torch.vmap; call it outside.")

    return refuse


@cache
def _launcher(triton_launcher: str) -> Callable[..., Any]:
    module, _, function = triton_launcher.partition(".")
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"d2v_fast.kernels.{module}"), function)
    return launcher


def _raise_versions(name: str, written: Sequence[int]) -> None:
    """Raise the version counters of the arguments at `written` for every kernel, as torch's operations do.

    Autograd then refuses to use a graph that saved the old values.
    """
    operation = getattr(torch.ops.d2v, name).default

    def below_autograd(keyset: Any, *args: Any) -> Any:
        for i in written:
            # an inference tensor has no counter and is skipped
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operation.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    library.impl(name, below_autograd, "ADInplaceOrView", with_keyset=True)


def define_in_cpp(schema: str) -> None:
    """Define an operation that has a C++ kernel only. Call it only if `in_cpp` is true."""
    library.define(schema)


@cache
def in_cpp(name: str) -> bool:
    """Return whether the C++ kernels were built and have this operation: a build may be older than this file."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"d2v::{name}", "CompositeExplicitAutograd")
    return found


def tensor_list(name: str, value: object) -> list[Tensor]:
    """Return a list, tuple or iterator of tensors as a list, consumed once.

    Args:
        name: Name of the argument, for messages.
        value: The user's argument. `check_tensors` checks its elements.

    Raises:
        TypeError: The value has no order, or is a single tensor or module.
    """
    if type(value) is list or type(value) is tuple:
        return list(value)
    if isinstance(value, torch.nn.Module) and not isinstance(value, torch.nn.ParameterList):
        raise TypeError(
            f"`{name}` must be a list of tensors, but is a module ({type(value).__name__}) instead: pass "
            "`list(module.parameters())`, or `dict(module.named_parameters())` to match by name."
        )
    if isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a list of tensors, but is one tensor instead: pass `[tensor]`.")
    if isinstance(value, (Mapping, set, frozenset, str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"`{name}` must be a list of tensors, or another sequence or iterator of them, but is "
            f"{type(value).__name__} instead."
        )
    return list(value)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless an argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, but is {type(value).__name__} instead.")


def check_tensors(name: str, values: Iterable[object]) -> None:
    """Check that all elements are tensors.

    Raises:
        TypeError: An element is None, a pair from `named_parameters()`, or anything else that is not a tensor.
    """
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            continue
        hint = ""
        if value is None:
            hint = ": leave it out of every list"
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            hint = ": of `named_parameters()` pass `dict(module.named_parameters())`, which is matched by name"
        raise TypeError(f"`{name}[{i}]` must be a tensor, but is {type(value).__name__} instead{hint}.")


def wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype that arithmetic runs in: fp32, or fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def is_observed() -> bool:
    """Return whether a dispatch mode is active, such as that of fake tensors, which intercepts every operation."""
    return torch._C._len_torch_dispatch_stack() > 0


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    first = args[0]
    return first if isinstance(first, Tensor) else first[0]


def load_cpp() -> None:
    """Load ``_C.so``. Call once, after every schema is defined."""
    global HAS_CPP
    if not _C_PATH.exists():
        return
    try:
        torch.ops.load_library(str(_C_PATH))
        HAS_CPP = True
    except OSError as error:
        warnings.warn(
            f"{_C_PATH} exists but cannot be loaded ({error}), so CPU tensors use the slower PyTorch reference. It "
            f"needs torch 2.10 or later, and a system as new as the one that built it. To replace it, {_BUILD}.",
            RuntimeWarning,
            stacklevel=2,
        )


def missing_kernels(device_type: str) -> str | None:
    """Return a message if tensors of a device use the slower reference; None if its kernels are available.

    Args:
        device_type: "cpu" or "cuda".

    Examples:
        >>> missing_kernels("meta") is None
        True
    """
    if device_type == "cpu" and not HAS_CPP:
        return f"the C++ kernels of d2v_fast are not built, CPU tensors use the slower PyTorch reference: {_BUILD}"
    if device_type == "cuda" and not has_triton():
        return "Triton is not installed, CUDA tensors use the slower PyTorch reference: `pip install triton`"
    return None


def backends() -> dict[str, str]:
    """Return the backends that run: ``{"cpu": "c++ (avx512)" | "reference", "cuda": "triton" | "reference" | "none"}``.

    Examples:
        >>> sorted(backends())
        ['cpu', 'cuda']
    """
    cpu = "reference"
    if HAS_CPP:
        cpu = f"c++ ({('baseline', 'avx2', 'avx512')[torch.ops.d2v.cpu_capability()]})"
    cuda = "none"
    if torch.cuda.is_available():
        cuda = "triton" if has_triton() else "reference"
    return {"cpu": cpu, "cuda": cuda}
