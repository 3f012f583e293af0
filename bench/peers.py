"""Shared code of the peers of a whole step: data2vec around Transformers' models, trained as in the published code.

The parts are plain: the teacher's layers are stored at every position, a boolean mask selects the targets at the end,
the average is updated tensor by tensor over the whole state dict, and AdamW is torch's default.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_fast.config import RunConfig
from d2v_fast.data import Batch
from d2v_fast.models.layers import Linear


def blocks_flop(D: int, T: int, mlp_ratio: float, N: float) -> tuple[float, float, float]:
    """Return the operations of a block's attention for a sample, of its MLP for a token, and of a linear head.

    `useful_flop` of each modality adds up the matrix products that loss and gradients need, in expectation, without
    what no one reads (the last MLP where no place is masked) or multiplies by zero (branches that a sample skips).

    Args:
        D, T, N: width, tokens of a sample, masked places of a sample.
        mlp_ratio: hidden units of the MLP for each of D.
    """
    return 8 * T * D * D + 4 * T * T * D, 4 * D * int(D * mlp_ratio), 2 * N * D * D


def plain_head(head: nn.Module) -> nn.Module:
    """Copy our regression head to the host with torch's own linear maps."""
    if isinstance(head, Linear):
        plain = nn.Linear(head.in_features, head.out_features)
        plain.load_state_dict(head.state_dict())
        return plain
    if isinstance(head, nn.Sequential):
        return nn.Sequential(*map(plain_head, head))
    return copy.deepcopy(head)


class PeerStep:
    """Student, teacher and AdamW on `device`, in bf16 autocast on a GPU.

    Args:
        student: Transformers' model as `encoder`, and the `head`.
        averaged: the part of the student that the teacher averages.
        config: of the run.
        lr: learning rate.
        groups: parameter groups for AdamW. `None` applies weight decay to all parameters.

    Attributes:
        name: whose model it is.
        attention: Transformers' name of the attention implementation that it chose.
    """

    name = "Transformers"

    def __init__(
        self,
        student: Any,
        averaged: nn.Module,
        config: RunConfig,
        device: torch.device,
        lr: float,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        self.student, self._averaged = student.to(device).train(), averaged
        self.teacher: Any = copy.deepcopy(averaged).eval().requires_grad_(False)
        self.attention = student.encoder.config._attn_implementation
        self._config, self._device = config, device
        self._outputs: list[Tensor] = []
        params = config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(
            groups or student.parameters(), lr=lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """Compute the loss of the configuration; `masked` is bool `[B, P]`."""
        raise NotImplementedError

    def draw_masks(self, num_samples: int, num_places: int) -> None:
        """Draw masks as the published code does within the step. The step uses the masks of the batch."""

    def __call__(self, batch: Batch, masked: Tensor) -> None:
        """Run a whole step."""
        self.draw_masks(*masked.shape)
        self.loss(batch, masked).backward()
        if self._config.deepspeed.gradient_clipping:
            nn.utils.clip_grad_norm_(self.student.parameters(), self._config.deepspeed.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        decay, student = self._config.pretraining.teacher.decay_end, self._averaged.state_dict()
        for name, averaged in self.teacher.state_dict().items():
            averaged.mul_(decay).add_(student[name].float(), alpha=1 - decay)

    def keep_outputs(self, modules: Iterable[nn.Module]) -> None:
        """Record the outputs of these modules of the teacher for `layers`."""
        for module in modules:
            module.register_forward_hook(lambda module, inputs, output: self._outputs.append(output))

    def layers(self, embedded: Tensor) -> list[Tensor]:
        """Return the fp32 outputs of the last K modules of `keep_outputs`."""
        self._outputs.clear()
        with self.autocast():
            self.teacher(embedded)
        return [output.float() for output in self._outputs[-self._config.pretraining.target.top_k :]]

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context: bf16 on a GPU."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")
