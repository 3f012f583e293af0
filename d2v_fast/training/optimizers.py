"""Build the optimizer of a run, and save its state in a form that is the same for all of them."""

from __future__ import annotations

import importlib
import math
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.config.deepspeed_sections import OptimizerConfig
from d2v_fast.distributed.deepspeed_internals import cpu_adam_step
from d2v_fast.distributed.deepspeed_start import adam_class
from d2v_fast.errors import RunError
from d2v_fast.objectives.base import Rate

MOMENTS = ("exp_avg", "exp_avg_sq")
NO_RATES: Mapping[str, Rate] = {}


def check_optimizer_available(config: OptimizerConfig) -> None:
    """Check that the optimizer is installed and can run here.

    Raises:
        RunError: It is not, or cannot; the message has the reason.
    """
    _optimizer_class(config)


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Return the Adam with decoupled weight decay that `optimizer.type` names.

    Args:
        config: Section `optimizer`.
        groups: Parameter groups, each with its `weight_decay`.
    Raises:
        RunError: The optimizer is not installed, or cannot be built here.
    """
    params = config.params
    common = {"lr": params.lr, "betas": params.betas, "eps": params.eps}
    kind = config.type
    options: dict[str, dict[str, bool]] = {
        # fused: one pass over the memory, and the only form that accepts the flag of a step that is not finite
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
            f'`optimizer.type` "{kind}" cannot be built here: {_reason(error)}. Use "AdamW", which is not compiled.'
        ) from error
    return optimizer


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_1d: bool, rates: Mapping[str, Rate] = NO_RATES
) -> list[dict[str, Any]]:
    """Return the parameter groups: for each learning rate, matrices and 1-D parameters (biases, norms, LayerScale).

    Args:
        model: Its trainable parameters are grouped.
        weight_decay: Weight decay of the matrices.
        decay_1d: Whether 1-D parameters have the same weight decay; otherwise they have none.
        rates: See `make_engine`. The groups have them as `rate`.
    """
    found: dict[tuple[Rate, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault((rates.get(name, Rate()), parameter.ndim <= 1), []).append(parameter)
    # matrices first
    ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1]))
    return [
        {"params": params, "weight_decay": weight_decay if decay_1d or not is_1d else 0.0, "rate": rate}
        for (rate, is_1d), params in ordered
    ]


def set_lr(optimizer: Any, lr: float, frozen: bool) -> None:
    """Set the learning rate of a step in every group, 0 in those that freeze if the encoder is frozen in it."""
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group, lr, frozen)


def rate_of(group: Mapping[str, Any], lr: float, frozen: bool) -> float:
    """Return the learning rate of a group; see `set_lr`."""
    rate: Rate = group["rate"]
    return 0.0 if frozen and rate.freezes else lr * rate.scale


def _reason(error: BaseException) -> str:
    """Return the first cause in one line: DeepSpeed wraps the compiler's error in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def _optimizer_class(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    kind = config.type
    if kind == "AdamW":
        return torch.optim.AdamW
    if kind == "ApexFusedAdam" and not torch.cuda.is_available():
        raise RunError('`optimizer.type` "ApexFusedAdam" needs a CUDA device, and there is none. Use "AdamW".')
    package = "NVIDIA's apex (that of PyPI is another project)" if kind == "ApexFusedAdam" else "deepspeed"
    try:
        if kind == "ApexFusedAdam":
            # the exact symbol, which only NVIDIA's apex has
            fused: Callable[..., torch.optim.Optimizer] = importlib.import_module("apex.optimizers").FusedAdam
            return fused
        return adam_class({"FusedAdam": "FusedAdam", "CPUAdam": "DeepSpeedCPUAdam"}[kind])
    except Exception as error:
        # a broken package, or another one of that name, may raise anything
        raise RunError(
            f'`optimizer.type` "{kind}" needs {package}, which cannot be imported: {_reason(error)}. Use "AdamW".'
        ) from error


def optimizer_step(optimizer: torch.optim.Optimizer, stepped: Iterable[Tensor]) -> int:
    """Return how many steps the optimizer has applied; 0 before the first one.

    Raises:
        RunError: The counts of its tensors differ, for example because some were trained from a later step on.
    """
    counts = {_count(optimizer, value) for value in stepped}
    if len(counts) > 1:
        raise RunError(f"the optimizer has made {sorted(counts)} steps with different parameters: it cannot be saved.")
    return counts.pop() if counts else 0


def restore_optimizer(optimizer: torch.optim.Optimizer, stepped: Iterable[Tensor], step: int) -> None:
    """Give the optimizer the state that it has after `step` applied steps. The caller fills the moments."""
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
        # NVIDIA's FusedAdam counts steps per group
        if "step" in group or type(optimizer).__module__.startswith("apex."):
            group["step"] = step
    if stepped and not stepped[0].is_cuda:
        _replay_bias_correction(optimizer, step)


def _replay_bias_correction(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Bring the bias corrections of DeepSpeed's CPU optimizers to `step`, bit for bit.

    Their C++ object keeps `beta ** step` in fp32 as a product that is rounded at every step. It cannot be set: the
    object either multiplies once more or takes a power, which rounds differently. So the steps are made again, on one
    element. Once 1 minus any such product rounds to 1, the last step is enough.
    """
    advance = cpu_adam_step(optimizer)
    if advance is None:
        return
    first = step if step > steps_until_unbiased(optimizer.param_groups[0]["betas"]) else 1
    for count in range(first, step + 1):
        advance(count)


def steps_until_unbiased(betas: Iterable[float]) -> int:
    """Return the step from which Adam's bias corrections are exactly 1 in fp32, however `beta ** step` was rounded.

    Args:
        betas: decays of the moments, each in [0, 1).
    """
    # in fp32 1 - x is 1 for x up to 2**-25; every product may have been rounded up by a factor of 1 + 2**-24
    bits_per_step = [-math.log2(rounded) - 2**-24 / math.log(2) for beta in betas if (rounded := _fp32(beta)) > 0]
    return max((math.ceil(25 / bits) if bits > 0 else sys.maxsize for bits in bits_per_step), default=0)


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _count(optimizer: torch.optim.Optimizer, value: Tensor) -> int:
    state = optimizer.state.get(value)
    if not state:
        return 0
    if "step" in state:
        return int(state["step"])
    return int(optimizer.param_groups[0]["step"])
