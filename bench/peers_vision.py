"""The peer of a whole step: data2vec around Transformers' own model, as the published code trains it.

Plain parts only: all of the teacher's hidden states are kept, the target is normalised and averaged at every position
and the masked ones are picked at the end by a boolean mask, the average follows tensor by tensor over the whole state
dict, and AdamW is torch's default.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecVisionModel

from d2v_fast.config import RunConfig
from d2v_fast.data import Batch
from d2v_fast.data2vec import Data2Vec
from d2v_fast.interop.huggingface_vision import export_vision


class PeerModel(nn.Module):
    """Transformers' encoder and the linear head, from the weights of ours.

    Args:
        model: ours; its encoder travels through an export.
        config: of the run.
        folder: where the export goes.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path) -> None:
        super().__init__()
        export_vision(model.student, config.d2v, folder)
        self.encoder = Data2VecVisionModel.from_pretrained(folder)
        self.head = copy.deepcopy(model.head).cpu()

    def forward(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked patches; `masked` is bool `[B, P]`."""
        tokens = self.encoder(pixels, bool_masked_pos=masked).last_hidden_state
        return self.head(tokens[:, 1:][masked])


class PeerStep:
    """Student, teacher and AdamW on `device`, in bf16 autocast on a GPU.

    Args:
        model, config, folder: as for `PeerModel`.
        lr: learning rate.

    Attributes:
        attention: Transformers' name for the implementation of attention that it picked.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path, device: torch.device, lr: float) -> None:
        self.student = PeerModel(model, config, folder).to(device).train()
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.attention = self.student.encoder.config._attn_implementation
        self._config, self._device = config, device
        params = config.deepspeed.optimizer.params
        decayed, kept = [], []
        for name, parameter in self.student.named_parameters():
            (kept if parameter.ndim == 1 or name.endswith("cls_token") else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=params.betas, eps=params.eps)

    @torch.no_grad()
    def target(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        with self._autocast():
            states = self.teacher.encoder(pixels, output_hidden_states=True).hidden_states
        layers = [state[:, 1:].float() for state in states[-self._config.d2v.target.top_k :]]
        normed = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        average = sum(normed) / len(normed)
        return F.layer_norm(average, average.shape[-1:])[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked patches and channels."""
        target = self.target(batch.inputs, masked)
        with self._autocast():
            prediction = self.student(batch.inputs, masked)
        return F.smooth_l1_loss(prediction.float(), target, beta=self._config.d2v.loss.beta)

    def __call__(self, batch: Batch, masked: Tensor) -> None:
        """A whole step."""
        self.loss(batch, masked).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self._config.deepspeed.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        decay, student = self._config.d2v.teacher.decay_end, self.student.state_dict()
        for name, averaged in self.teacher.state_dict().items():
            averaged.mul_(decay).add_(student[name] * (1 - decay))

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")
