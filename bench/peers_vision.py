"""The peer of a whole step: data2vec around Transformers' model, trained as in the published code.

In addition to `peers`: all hidden states are kept, targets are normalized and averaged at every position.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecVisionModel

from bench import peers
from d2v_fast.config import RunConfig, VisionConfig
from d2v_fast.data import Batch
from d2v_fast.masking import block_mask_rows
from d2v_fast.modalities.vision.huggingface import export_vision, layout
from d2v_fast.objectives.data2vec import Data2Vec

__all__ = ["PeerStep", "amount", "layout", "random_batch", "useful_flop"]


def amount(config: VisionConfig) -> tuple[str, int]:
    """Return the unit in which data are counted, and how many of it a sample has."""
    return "images", 1


def random_batch(config: VisionConfig, batch_size: int) -> Batch:
    """Noise under published masks."""
    model, mask, ids = config.model, config.mask, np.arange(batch_size)
    options = (model.grid_size, mask.num_patches, mask.min_patches, mask.max_patches, mask.min_aspect)
    rows = torch.from_numpy(block_mask_rows(0, 0, ids, *options))
    pixels = torch.randn(batch_size, model.channels, model.image_size, model.image_size)
    return Batch(pixels, rows, torch.from_numpy(ids))


def useful_flop(config: VisionConfig, batch_size: int, num_rows: int) -> float:
    """See `peers.blocks_flop`; embedding and blocks that stochastic depth drops are counted in expectation."""
    model, N = config.model, num_rows / batch_size
    D, P = model.width, model.num_patches
    T = 1 + P
    attention, mlp, head = peers.blocks_flop(D, T, model.mlp_ratio, N)
    embedding = 2 * P * model.channels * model.patch_size**2 * D
    teacher = embedding + model.depth * attention + ((model.depth - 1) * T + N) * mlp
    kept = [1 - model.drop_path * index / max(1, model.depth - 1) for index in range(model.depth)]
    student = sum(kept) * attention + (sum(kept[:-1]) * T + kept[-1] * N) * mlp + head
    return batch_size * (teacher + 3 * student + 2 * embedding)


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
        layers = [state[:, 1:].float() for state in states[-self._config.pretraining.target.top_k :]]
        normed = [F.layer_norm(layer, layer.shape[-1:]) for layer in layers]
        average = sum(normed[1:], normed[0]) / len(normed)
        return F.layer_norm(average, average.shape[-1:])[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked patches and channels."""
        target = self.target(batch.inputs, masked)
        with self.autocast():
            prediction = self.student(batch.inputs, masked)
        return F.smooth_l1_loss(prediction.float(), target, beta=self._config.pretraining.loss.beta)
