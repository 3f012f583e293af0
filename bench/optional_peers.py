"""Optional peers: NVIDIA apex and Liger. If one cannot run, the reason is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Peers = tuple[dict[str, Callable[[], Any]], dict[str, str]]


def apex_ema(teacher: list[Tensor], student: list[Tensor], decay: float) -> Peers:
    """Return apex's multi-tensor `out = a * x + b * y`, which supports fp32 and fp16 but not bf16."""
    name = "apex axpby"
    if reason := _unfit(teacher[0].device) or _bf16(student):
        return {}, {name: reason}
    try:
        # import exact symbols: `apex` on PyPI is another package
        from amp_C import multi_tensor_axpby
        from apex.multi_tensor_apply import multi_tensor_applier
    except ImportError as error:
        return {}, {name: _absent("NVIDIA apex", error)}
    overflow = torch.zeros(1, dtype=torch.int32, device=teacher[0].device)
    lists = [teacher, student, teacher]
    return {name: lambda: multi_tensor_applier(multi_tensor_axpby, overflow, lists, decay, 1.0 - decay, -1)}, {}


def layer_norms(example: Tensor) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Return layer norms without parameters over the last dimension, by name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    if reason := _unfit(example.device):
        return found, {"apex layer norm": reason, "Liger layer norm": reason}
    missing: dict[str, str] = {}
    width = example.shape[-1]
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm

        found["apex layer norm"] = lambda x: fused_layer_norm(x, (width,), 1e-5)
    except ImportError as error:
        missing["apex layer norm"] = _absent("NVIDIA apex", error)
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        one, zero = example.new_ones(width), example.new_zeros(width)
        found["Liger layer norm"] = lambda x: LigerLayerNormFunction.apply(x, one, zero, 1e-5)
    except ImportError as error:
        missing["Liger layer norm"] = _absent("liger-kernel", error)
    return found, missing


def _unfit(device: torch.device) -> str:
    return "" if device.type == "cuda" else "runs on CUDA only"


def _bf16(tensors: Sequence[Tensor]) -> str:
    return "has no bf16" if any(x.dtype == torch.bfloat16 for x in tensors) else ""


def _absent(package: str, error: ImportError) -> str:
    return f"{package} is not installed ({error})"
