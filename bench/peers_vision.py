"""The peer of a whole step: data2vec around Transformers' own model, as the published code trains it.

Beside what `peers` says: all hidden states are kept, targets are normalized and averaged at every position.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecVisionModel

from bench import peers
from d2v_fast.config import RunConfig, VisionConfig
from d2v_fast.data import Batch
from d2v_fast.modalities.vision.huggingface import export_vision
from d2v_fast.objectives.data2vec import Data2Vec


class PeerModel(nn.Module):
    """Transformers' encoder and the linear head, from the weights of ours.

    Args:
        model: ours; its encoder travels through an export.
        config: of the run.
        folder: where the export goes.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path) -> None:
        super().__init__()
        assert isinstance(config.d2v, VisionConfig)
        export_vision(model.student, config.d2v, folder)
        self.encoder = Data2VecVisionModel.from_pretrained(folder)
        self.head = peers.plain_head(model.head)

    def forward(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked patches; `masked` is bool `[B, P]`."""
        tokens = self.encoder(pixels, bool_masked_pos=masked).last_hidden_state
        return self.head(tokens[:, 1:][masked])


class PeerStep(peers.PeerStep):
    """See `peers.PeerStep`.

    Args:
        model, config, folder: as for `PeerModel`.
        lr: learning rate.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path, device: torch.device, lr: float) -> None:
        student = PeerModel(model, config, folder)
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in student.named_parameters():
            (kept if parameter.ndim == 1 or name.endswith("cls_token") else decayed).append(parameter)
        super().__init__(
            student, student, config, device, lr, [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        )

    @torch.no_grad()
    def target(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        with self.autocast():
            states = self.teacher.encoder(pixels, output_hidden_states=True).hidden_states
        layers = [state[:, 1:].float() for state in states[-self._config.d2v.target.top_k :]]
        normed = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        average = sum(normed[1:], normed[0]) / len(normed)
        return F.layer_norm(average, average.shape[-1:])[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked patches and channels."""
        target = self.target(batch.inputs, masked)
        with self.autocast():
            prediction = self.student(batch.inputs, masked)
        return F.smooth_l1_loss(prediction.float(), target, beta=self._config.d2v.loss.beta)
