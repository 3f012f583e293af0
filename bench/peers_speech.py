"""The peer of a whole step on speech: data2vec around Transformers' own model, as the published code trains it.

Plain parts only: convolutions channels first with transposes around their norms, the FFN outputs of all of the
teacher's blocks are kept, targets are normalised over time and averaged at every frame, the masked ones are picked at
the end by a boolean mask, the average follows tensor by tensor, masks are drawn within the step, and AdamW is torch's
default.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecAudioModel

from bench.bench_masking import published_spans
from d2v_fast.config import RunConfig
from d2v_fast.data import Batch
from d2v_fast.data2vec import Data2Vec
from d2v_fast.interop.huggingface_speech import export_speech


class PeerModel(nn.Module):
    """Transformers' encoder and the linear head, from the weights of ours, which travel through an export."""

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path) -> None:
        super().__init__()
        export_speech(model.student, config.d2v, folder)
        self.encoder = Data2VecAudioModel.from_pretrained(folder)
        self.head = copy.deepcopy(model.head).cpu()

    def frames(self, waveforms: Tensor) -> Tensor:
        """`[B, T, D]`, before masking."""
        features = self.encoder.feature_extractor(waveforms).transpose(1, 2)
        return self.encoder.feature_projection(features)[0]

    def forward(self, frames: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked frames; `masked` is bool `[B, T]`."""
        hidden = frames.clone()
        hidden[masked] = self.encoder.masked_spec_embed.to(hidden.dtype)
        return self.head(self.encoder.encoder(hidden).last_hidden_state[masked])


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
        self.teacher = copy.deepcopy(self.student.encoder.encoder).eval().requires_grad_(False)
        self.attention = self.student.encoder.config._attn_implementation
        self._outputs: list[Tensor] = []
        for layer in self.teacher.layers:
            layer.feed_forward.output_dense.register_forward_hook(self._keep)
        self._config, self._device = config, device
        params = config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )

    @torch.no_grad()
    def target(self, frames: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        self._outputs.clear()
        with self._autocast():
            self.teacher(frames)
        layers = [output.float() for output in self._outputs[-self._config.d2v.target.top_k :]]
        normed = [F.instance_norm(layer.transpose(1, 2)).transpose(1, 2) for layer in layers]
        return (sum(normed) / len(normed))[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked frames of the squared error, summed over the channels and divided by their root."""
        with self._autocast():
            frames = self.student.frames(batch.inputs)
        target = self.target(frames.detach(), masked)
        with self._autocast():
            prediction = self.student(frames, masked)
        error = F.mse_loss(prediction.float(), target, reduction="none").sum(-1)
        return error.mean() / target.shape[-1] ** 0.5

    def __call__(self, batch: Batch, masked: Tensor) -> None:
        """A whole step. The masks are drawn as published, and then those of `masked` are used."""
        mask = self._config.d2v.mask
        published_spans(np.random.default_rng(0), *masked.shape, mask.prob, mask.length)
        self.loss(batch, masked).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        decay, student = self._config.d2v.teacher.decay_end, self.student.encoder.encoder.state_dict()
        for name, averaged in self.teacher.state_dict().items():
            averaged.mul_(decay).add_(student[name].float(), alpha=1 - decay)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._outputs.append(output)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda")
