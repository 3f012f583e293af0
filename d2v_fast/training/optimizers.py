"""The optimizers that a run can choose, and their state in a form that does not depend on which one it is."""

from __future__ import annotations

import importlib
import math
import struct
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from d2v_fast.config.deepspeed_sections import OptimizerConfig
from d2v_fast.distributed.world import RunError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_optimizer_available(config: OptimizerConfig) -> None:
    """RunError where the optimizer is not installed or cannot run here, with the reason."""
    _optimizer_class(config)


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, as `optimizer.type` names it, over groups that hold their `weight_decay`.

    Raises:
        RunError: it is not installed, or cannot be built here.
    """
    params = config.params
    common = {"lr": params.lr, "betas": params.betas, "eps": params.eps}
    kind = config.type
    options: dict[str, dict[str, Any]] = {
        # fused: one pass over the memory, and the only form that takes the flag of a step that is not finite
        "AdamW": {"fused": True},
        "FusedAdam": {"adam_w_mode": True},
        "CPUAdam": {"adamw_mode": True},
        "ApexFusedAdam": {"adam_w_mode": True},
    }
    make = _optimizer_class(config)
    try:
        optimizer: torch.optim.Optimizer = make(groups, **common, **options[kind])
    except (RuntimeError, OSError, ImportError) as error:
        raise RunError(
            f'`optimizer.type` "{kind}" cannot be built here: {_reason(error)}. "AdamW" needs nothing.'
        ) from error
    return optimizer


def _reason(error: BaseException) -> str:
    """What went wrong first, in one line: DeepSpeed wraps the error of the compiler in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def _optimizer_class(config: OptimizerConfig) -> Any:
    kind = config.type
    if kind == "AdamW":
        return torch.optim.AdamW
    if kind == "ApexFusedAdam" and not torch.cuda.is_available():
        raise RunError('`optimizer.type` "ApexFusedAdam" needs a CUDA device, and there is none. Use "AdamW".')
    module, name, package = {
        "FusedAdam": ("deepspeed.ops.adam", "FusedAdam", "deepspeed"),
        "CPUAdam": ("deepspeed.ops.adam", "DeepSpeedCPUAdam", "deepspeed"),
        # the exact symbol, which only NVIDIA's has
        "ApexFusedAdam": ("apex.optimizers", "FusedAdam", "NVIDIA's apex (that of PyPI is another project)"),
    }[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        # a package that is broken, or another one of that name, raises what it likes
        raise RunError(
            f'`optimizer.type` "{kind}" needs {package}, which cannot be imported: {_reason(error)}. Use "AdamW".'
        ) from error


def optimizer_step(optimizer: Any, stepped: Iterable[Tensor]) -> int:
    """How many steps the optimizer has applied; 0 before the first one.

    Raises:
        RunError: its tensors disagree, as when some were trained from another point on than others.
    """
    counts = {_count(optimizer, value) for value in stepped}
    if len(counts) > 1:
        raise RunError(f"the optimizer has made {sorted(counts)} steps with different parameters: it cannot be saved.")
    return counts.pop() if counts else 0


def restore_optimizer(optimizer: Any, stepped: Iterable[Tensor], step: int) -> None:
    """Give the optimizer the state that it has after `step` applied steps, moments left for the caller to fill."""
    stepped = list(stepped)
    for value in stepped:
        if step == 0:
            optimizer.state.pop(value, None)
            continue
        state = optimizer.state.setdefault(value, {})
        for moment in MOMENTS:
            state.setdefault(moment, torch.zeros_like(value.detach()))
        on_device = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=value.device) if on_device else step
    for group in optimizer.param_groups:
        # NVIDIA's counts per group
        if "step" in group or type(optimizer).__module__.startswith("apex."):
            group["step"] = step
    if stepped and not stepped[0].is_cuda:
        _replay_bias_correction(optimizer, step)


def _replay_bias_correction(optimizer: Any, step: int) -> None:
    """DeepSpeed's optimizers for the CPU keep `beta ** step` as a product that is rounded at every step, in an object
    of C++ that nothing saves. Counting from 1 again, on one element, gives the same bits. Where every product of so
    many steps rounds 1 minus it to 1, the last step alone does."""
    group = optimizer.param_groups[0]
    first = step if step > steps_until_unbiased(group["betas"]) else 1
    hyper = (0.0, *group["betas"], group["eps"])
    value, grad, exp_avg, exp_avg_sq = (torch.ones(1) for _ in range(4))
    for count in range(first, step + 1):
        if hasattr(optimizer, "ds_opt_adam"):
            optimizer.ds_opt_adam.adam_update(
                optimizer.opt_id, count, *hyper, 0.0, True, value, grad, exp_avg, exp_avg_sq
            )
        elif hasattr(optimizer, "multi_tensor_adam"):
            lists = [[grad], [value], [exp_avg], [exp_avg_sq]]
            unused = torch.zeros(1, dtype=torch.int)
            optimizer.multi_tensor_adam(1, unused, lists, *hyper, count, 1, 1, 0.0)


def steps_until_unbiased(betas: Iterable[float]) -> int:
    """Return after how many steps Adam's bias corrections are exactly 1 in fp32, however `beta ** step` was rounded.

    Args:
        betas: decays of the moments, each in [0, 1).
    """
    # in fp32 1 - x is 1 for x up to 2**-25; every product may have been rounded up by a factor of 1 + 2**-24
    bits_per_step = [-math.log2(rounded) - 2**-24 / math.log(2) for beta in betas if (rounded := _fp32(beta)) > 0]
    return max((math.ceil(25 / bits) if bits > 0 else sys.maxsize for bits in bits_per_step), default=0)


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _count(optimizer: Any, value: Tensor) -> int:
    state = optimizer.state.get(value)
    if not state:
        return 0
    if "step" in state:
        return int(state["step"])
    return int(optimizer.param_groups[0]["step"])
