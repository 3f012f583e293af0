"""The peer of a whole step on text: data2vec around Transformers' model, trained as in the published code.

In addition to `peers`: targets normalized and averaged at every token, the head runs on the masked ones, masks drawn
within the step row by row in numpy. The teacher reads the whole text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecTextModel

from bench import peers
from d2v_fast.config import RunConfig, TextConfig
from d2v_fast.data import Batch
from d2v_fast.masking import token_mask_rows
from d2v_fast.modalities.text.huggingface import export_text, layout
from d2v_fast.objectives.data2vec import Data2Vec

__all__ = ["PeerStep", "amount", "layout", "random_batch", "useful_flop"]


def amount(config: TextConfig) -> tuple[str, int]:
    """Return the unit in which data are counted, and how many of it a sample has."""
    return "tokens", config.data.block_size


def random_batch(config: TextConfig, batch_size: int) -> Batch:
    """Noise under published masks."""
    T, ids = config.data.block_size, np.arange(batch_size)
    tokens = torch.randint(4, config.model.token_rows - 1, (batch_size, T))
    masks = token_mask_rows(0, 0, ids, tokens.numpy(), np.full(batch_size, T), **mask_options(config))
    masked = torch.from_numpy(masks.tokens)
    return Batch(tokens, torch.from_numpy(masks.rows), torch.from_numpy(ids), masked_inputs=masked)


def useful_flop(config: TextConfig, batch_size: int, num_rows: int) -> float:
    """See `peers.blocks_flop`."""
    model, N, T = config.model, num_rows / batch_size, config.data.block_size
    attention, mlp, _ = peers.blocks_flop(model.width, T, model.mlp_ratio, N)
    # layer norm reads the teacher's last MLP at the masked tokens only
    each = model.depth * attention + ((model.depth - 1) * T + N) * mlp
    return batch_size * (4 * each + 3 * 8 * N * model.width**2)


def mask_options(config: TextConfig) -> dict[str, Any]:
    """Arguments of `token_mask_rows`, with RoBERTa's special tokens."""
    mask, vocab_size = config.mask, config.model.token_rows
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
        assert isinstance(config.d2v, TextConfig)
        export_text(model.student, config.d2v, folder)
        self.encoder = Data2VecTextModel.from_pretrained(folder, add_pooling_layer=False)
        self.head = peers.plain_head(model.head)

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked tokens; `masked` is bool `[B, T]`."""
        return self.head(self.encoder(tokens).last_hidden_state[masked])


class PeerStep(peers.PeerStep):
    """See `peers.PeerStep`.

    Args:
        model, config, folder: as for `PeerModel`.
        lr: learning rate.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path, device: torch.device, lr: float) -> None:
        student = PeerModel(model, config, folder)
        super().__init__(student, student.encoder.encoder, config, device, lr)
        self.keep_outputs(layer.output.dense for layer in self.teacher.layer)

    @torch.no_grad()
    def target(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        with self.autocast():
            embedded = self.student.encoder.embeddings(tokens)
        normed = [F.layer_norm(layer, layer.shape[-1:]) for layer in self.layers(embedded)]
        return (sum(normed[1:], normed[0]) / len(normed))[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked tokens of Smooth L1, summed over the channels."""
        target = self.target(batch.inputs, masked)
        with self.autocast():
            prediction = self.student(batch.masked_inputs, masked)
        loss = F.smooth_l1_loss(prediction.float(), target, beta=self._config.pretraining.loss.beta, reduction="none")
        return loss.sum(-1).mean()

    def draw_masks(self, num_samples: int, num_places: int) -> None:
        """See `peers.PeerStep`."""
        assert isinstance(self._config.d2v, TextConfig)
        mask = self._config.d2v.mask
        published_masks(np.random.default_rng(0), num_samples, num_places, mask.prob, mask.length)
