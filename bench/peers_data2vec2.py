"""The peer of a whole step of data2vec 2.0: the published way in plain torch, see `published2`.

It gets our weights under their published names through an export. Optimizer and clipping are torch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import published2
from d2v_fast.config import D2VConfig, RunConfig
from d2v_fast.data import Batch
from d2v_fast.interop.formats import Published
from d2v_fast.modalities import modality_of

# the published lengths: the longest crop of speech, a block of text
SECONDS, TOKENS = 20, 512
UNITS = {"vision": ("images", 1), "speech": ("seconds of sound", SECONDS), "text": ("tokens", TOKENS)}


def amount(config: D2VConfig) -> tuple[str, int]:
    """Return the unit in which data are counted, and how many of it a sample has."""
    return UNITS[config.modality]


def random_batch(config: D2VConfig, batch_size: int) -> tuple[Batch, Tensor]:
    """Return noise with as many visible places as in a run, drawn at random, and the masks, bool `[B * M, P]`."""
    shapes = modality_of(config).largest_batch(config, batch_size)
    assert shapes.visible is not None
    (R, V), P = shapes.visible.shape, (len(shapes.rows) + shapes.visible.numel()) // len(shapes.visible)
    masked = torch.ones(R, P, dtype=torch.bool)
    masked.scatter_(1, torch.rand(R, P).argsort(1)[:, :V], False)
    places = torch.arange(R * P).view(R, P)
    if shapes.inputs.is_floating_point():
        inputs = torch.randn(shapes.inputs.shape)
    else:
        inputs = torch.randint(4, 1000, shapes.inputs.shape)
    batch = Batch(
        inputs=inputs,
        rows=places[masked],
        sample_ids=torch.arange(batch_size),
        drop_keys=np.arange(R, dtype=np.uint64),
        visible=places[~masked].view(R, V),
        noise_keys=torch.arange(R),
    )
    return batch, masked


class PeerStep:
    """Student, teacher and AdamW on `device`, in bf16 autocast on a GPU.

    Args:
        model: ours; its encoder and decoder travel through an export.
        config: of the run.
        folder: where the export goes.
        lr: learning rate.

    Attributes:
        name, attention: whose step it is, and how it computes attention.
    """

    name, attention = "published", "products"

    def __init__(self, model: Any, config: RunConfig, folder: Path, device: torch.device, lr: float) -> None:
        self._config, self._device, self._folder = config, device, folder
        self.form = format_of(config.d2v)
        content = self._written(model.student, model.head, model.student)
        average = {name: value.to(device) for name, value in content["model"].pop("_ema").items()}
        named = {name: value.to(device) for name, value in content["model"].items()}
        frozen = "fixed_positional_encoder.positions"
        self.parameters = {name: value.requires_grad_(not name.endswith(frozen)) for name, value in named.items()}
        self.model = content["cfg"]["model"]
        self.student = published2.Network(self.parameters, self.model)
        self.teacher = published2.Network(average, self.model, self.student)
        params = config.deepspeed.optimizer.params
        self._trained = [value for value in named.values() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=lr, betas=params.betas, eps=params.eps, weight_decay=params.weight_decay
        )

    def loss(self, batch: Batch, masked: Tensor, noise: Tensor | None = None) -> Tensor:
        """Compute the loss per masked place; `masked` is bool `[B * M, P]`."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            return published2.forward(self.student, self.teacher, batch.inputs, masked, noise).mean()

    def __call__(self, batch: Batch, masked: Tensor) -> None:
        """Run a whole step."""
        self.loss(batch, masked).backward()
        if self._config.deepspeed.gradient_clipping:
            nn.utils.clip_grad_norm_(self._trained, self._config.deepspeed.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        published2.average(self.teacher, self.student, self._config.pretraining.teacher.decay_end)

    def useful_flop(self, batch: Batch, masked: Tensor) -> dict[str, float]:
        """Return `published2.useful_flop` of a batch."""
        return published2.useful_flop(self.model, len(batch.inputs), masked.shape[1], int((~masked[0]).sum()))

    def named_gradients(self, model: Any) -> dict[str, Tensor]:
        """Return the gradients of our model under their published names."""
        student, head = (
            {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
            | {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            for module in (model.student, model.head)
        )
        return {
            name: value
            for name, value in self._written(student, head, None)["model"].items()
            if name in self.parameters and self.parameters[name].requires_grad
        }

    def _written(self, student: Any, head: Any, teacher: Any) -> dict[str, Any]:
        path = self._folder / "model.pt"
        self.form.write(student, head, teacher, self._config.d2v, path)
        content: dict[str, Any] = torch.load(path, weights_only=True)
        return content


def format_of(config: D2VConfig) -> Published:
    """Return the published format of a configuration's models."""
    published = modality_of(config).published
    assert published is not None
    return published()


def assert_same_step(ours: Any, peer: PeerStep, batch: Batch, masked: Tensor) -> None:
    """Check that the loss and all gradients of encoder and decoder agree, with the same noise in both decoders."""
    tolerance = 1e-3 if ours.engine.compute_dtype == torch.float32 else 0.1
    std, width = ours.model.head.noise_std, ours.model.student.width
    noise = torch.randn(*masked.shape, width, device=masked.device)
    drawn, ours.model.draw_noise = ours.model.draw_noise, lambda keys, rows, places, D: noise.flatten(0, 1)[rows]
    loss, peer_loss = ours.loss(batch), peer.loss(batch, masked, noise * std)
    ours.model.draw_noise = drawn
    torch.testing.assert_close(loss, peer_loss, rtol=tolerance / 10, atol=0)
    loss.backward()
    peer_loss.backward()
    for name, actual in peer.named_gradients(ours.model).items():
        expected = peer.parameters[name].grad
        assert expected is not None
        error = (actual.to(expected.device) - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error of the gradient {error:.1e}"
        peer.parameters[name].grad = None
    ours.model.zero_grad()
