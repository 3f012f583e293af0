"""Every way in which the operations write into a tensor in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from d2v_fast.ops import ema_update_
from d2v_fast.ops.norm_gelu import layer_norm_gelu_, layer_norm_gelu_backward_

operations = torch.ops.d2v


def affine(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(3, device=x.device), torch.zeros(3, device=x.device)


def backward_arguments(x: Tensor) -> tuple[Tensor, ...]:
    return torch.randn_like(x), *affine(x), torch.zeros(4, device=x.device), torch.ones(4, device=x.device)


# by operation: how it overwrites the argument, which is fp32 [4, 3]
WRITERS: dict[str, dict[str, Callable[[Tensor], object]]] = {
    "ema_update_": {
        "teacher": lambda x: ema_update_([x], [torch.randn_like(x)], 0.5),
        "teacher, decay on the device": lambda x: ema_update_(
            [x], [torch.randn_like(x)], torch.tensor(0.5, device=x.device)
        ),
        "second teacher": lambda x: ema_update_([x.clone(), x], [torch.randn_like(x)] * 2, 0.5),
        "working": lambda x: ema_update_([x.clone()], [torch.randn_like(x)], 0.5, working=[x]),
        "strided": lambda x: ema_update_([x.t()], [torch.randn_like(x).t()], 0.5),
        "operation": lambda x: operations.ema_update_([x], [torch.randn_like(x)], 0.5, None, []),
    },
    "scale_gradient_": {
        "operation": lambda x: operations.scale_gradient_(x, torch.tensor(2.0, device=x.device), 1.0, True)
    },
    "layer_norm_gelu_": {
        "x": lambda x: layer_norm_gelu_(x, *affine(x)),
        "operation": lambda x: operations.layer_norm_gelu_(x, *affine(x), 1e-5),
    },
    "layer_norm_gelu_backward_": {
        "grad": lambda x: layer_norm_gelu_backward_(x, *backward_arguments(x)),
        "operation": lambda x: operations.layer_norm_gelu_backward_(x, *backward_arguments(x)),
    },
}
