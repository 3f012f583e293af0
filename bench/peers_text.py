"""The peer of a whole step on text: data2vec around Transformers' own model, as the published code trains it.

Plain parts only: the FFN outputs of all of the teacher's blocks are kept, targets are normalised and averaged at every
token and the masked ones picked at the end by a boolean mask, the head runs on these, the average follows tensor by
tensor, masks are drawn within the step row by row in numpy, and AdamW is torch's default. The teacher reads the whole
text.
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
from transformers import Data2VecTextModel

from d2v_fast.config import RunConfig, TextConfig
from d2v_fast.data import Batch
from d2v_fast.data2vec import Data2Vec
from d2v_fast.interop.huggingface_text import export_text


def mask_options(config: TextConfig) -> dict[str, Any]:
    """Arguments of `token_mask_rows`, with RoBERTa's special tokens."""
    mask, vocab_size = config.mask, config.model.vocab_size
    return {
        "prob": mask.prob,
        "length": mask.length,
        "vocab_size": vocab_size,
        "mask_id": vocab_size - 1,
        "special_ids": (0, 1, 2, 3, vocab_size - 1),
        "keep_prob": mask.keep_prob,
        "random_prob": mask.random_prob,
    }


def published_masks(generator: np.random.Generator, num_rows: int, size: int, prob: float, length: int) -> np.ndarray:
    """Bool `[num_rows, size]`: starts without replacement, each hides itself and what follows."""
    masked = np.zeros((num_rows, size), dtype=bool)
    for row in masked:
        starts = generator.choice(size, int(prob * size / length + generator.random()), replace=False)
        places = (starts[:, None] + np.arange(length)).flatten()
        row[places[places < size]] = True
    return masked


class PeerModel(nn.Module):
    """Transformers' encoder and the two-layer head, from the weights of ours, which travel through an export."""

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path) -> None:
        super().__init__()
        export_text(model.student, config.d2v, folder)
        self.encoder = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = copy.deepcopy(model.head).cpu()

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked tokens; `masked` is bool `[B, T]`."""
        return self.head(self.encoder(tokens).last_hidden_state[masked])


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
        for layer in self.teacher.layer:
            layer.output.dense.register_forward_hook(self._keep)
        self._config, self._device = config, device
        params = config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )

    @torch.no_grad()
    def target(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        self._outputs.clear()
        with self._autocast():
            self.teacher(self.student.encoder.embeddings(tokens))
        layers = [output.float() for output in self._outputs[-self._config.d2v.target.top_k :]]
        normed = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        return (sum(normed) / len(normed))[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked tokens of Smooth L1, summed over the channels."""
        target = self.target(batch.inputs, masked)
        with self._autocast():
            prediction = self.student(batch.masked_inputs, masked)
        loss = F.smooth_l1_loss(prediction.float(), target, beta=self._config.d2v.loss.beta, reduction="none")
        return loss.sum(-1).mean()

    def __call__(self, batch: Batch, masked: Tensor) -> None:
        """A whole step. The masks are drawn as published, and then those of `batch` are used."""
        mask = self._config.d2v.mask
        published_masks(np.random.default_rng(0), *masked.shape, mask.prob, mask.length)
        self.loss(batch, masked).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), self._config.deepspeed.gradient_clipping)
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
