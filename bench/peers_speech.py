"""The peer of a whole step on speech: data2vec around Transformers' model, trained as in the published code.

In addition to `peers`: convolutions channels first with transposes around their norms, targets normalized over time
and averaged at every frame, masks drawn within the step.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Data2VecAudioModel

from bench import peers
from bench.bench_masking import published_spans
from d2v_fast.config import RunConfig, SpeechConfig
from d2v_fast.data import Batch
from d2v_fast.masking import span_mask_rows
from d2v_fast.modalities.speech.huggingface import export_speech, layout
from d2v_fast.objectives.data2vec import Data2Vec

__all__ = ["PeerStep", "amount", "layout", "random_batch", "useful_flop"]

SECONDS = 5


def amount(config: SpeechConfig) -> tuple[str, int]:
    """Return the unit in which data are counted, and how many of it a sample has."""
    return "seconds of sound", SECONDS


def num_frames(config: SpeechConfig) -> int:
    """Frames of a sample, a multiple of 8."""
    return config.model.num_frames(SECONDS * config.model.sample_rate) // 8 * 8


def random_batch(config: SpeechConfig, batch_size: int) -> Batch:
    """Noise under published masks."""
    T, ids = num_frames(config), np.arange(batch_size)
    waveforms = torch.randn(batch_size, config.model.num_samples(T))
    rows = span_mask_rows(0, 0, ids, T, config.mask.prob, config.mask.length)
    return Batch(waveforms, torch.from_numpy(rows), torch.from_numpy(ids))


def useful_flop(config: SpeechConfig, batch_size: int, num_rows: int) -> float:
    """See `peers.blocks_flop`."""
    model, N, T = config.model, num_rows / batch_size, num_frames(config)
    D = model.width
    attention, mlp, head = peers.blocks_flop(D, T, model.mlp_ratio, N)
    convolutions, length, C = 0.0, model.num_samples(T), 1
    first = 0.0
    for kernel, stride in zip(model.conv_kernels, model.conv_strides, strict=True):
        length = (length - kernel) // stride + 1
        convolutions += 2 * length * kernel * C * model.conv_width
        first = first or convolutions
        C = model.conv_width
    convolutions += 2 * T * C * D
    positions = model.position_depth * 2 * T * D * (D // model.position_groups) * model.position_kernel
    # instance norm reads the teacher's last block at all frames
    teacher: float = positions + model.depth * (attention + T * mlp)
    student: float = positions + model.depth * attention + ((model.depth - 1) * T + N) * mlp + head
    # the backward pass is two products for each one; none is needed for the waveform
    return batch_size * (teacher + 3 * (student + convolutions) - first)


class PeerModel(nn.Module):
    """Transformers' encoder and the linear head, from the weights of ours, which travel through an export."""

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path) -> None:
        super().__init__()
        assert isinstance(config.d2v, SpeechConfig)
        export_speech(model.student, config.d2v, folder)
        self.encoder = Data2VecAudioModel.from_pretrained(folder)
        self.head = peers.plain_head(model.head)

    def frames(self, waveforms: Tensor) -> Tensor:
        """`[B, T, D]`, before masking."""
        features = self.encoder.feature_extractor(waveforms).transpose(1, 2)
        return self.encoder.feature_projection(features)[0]

    def forward(self, frames: Tensor, masked: Tensor) -> Tensor:
        """Predictions `[N, D]` at the masked frames; `masked` is bool `[B, T]`."""
        hidden = frames.clone()
        hidden[masked] = self.encoder.masked_spec_embed.to(hidden.dtype)
        return self.head(self.encoder.encoder(hidden).last_hidden_state[masked])


class PeerStep(peers.PeerStep):
    """See `peers.PeerStep`.

    Args:
        model, config, folder: as for `PeerModel`.
        lr: learning rate.
    """

    def __init__(self, model: Data2Vec, config: RunConfig, folder: Path, device: torch.device, lr: float) -> None:
        student = PeerModel(model, config, folder)
        super().__init__(student, student.encoder.encoder, config, device, lr)
        self.keep_outputs(layer.feed_forward.output_dense for layer in self.teacher.layers)

    @torch.no_grad()
    def target(self, frames: Tensor, masked: Tensor) -> Tensor:
        """`[N, D]`."""
        normed = [F.instance_norm(layer.transpose(1, 2)).transpose(1, 2) for layer in self.layers(frames)]
        return (sum(normed[1:], normed[0]) / len(normed))[masked]

    def loss(self, batch: Batch, masked: Tensor) -> Tensor:
        """The mean over masked frames of the squared error, summed over the channels and divided by their root."""
        with self.autocast():
            frames = self.student.frames(batch.inputs)
        target = self.target(frames.detach(), masked)
        with self.autocast():
            prediction = self.student(frames, masked)
        error = F.mse_loss(prediction.float(), target, reduction="none").sum(-1)
        return error.mean() / target.shape[-1] ** 0.5

    def draw_masks(self, num_samples: int, num_places: int) -> None:
        """See `peers.PeerStep`."""
        assert isinstance(self._config.d2v, SpeechConfig)
        mask = self._config.d2v.mask
        published_spans(np.random.default_rng(0), num_samples, num_places, mask.prob, mask.length)
