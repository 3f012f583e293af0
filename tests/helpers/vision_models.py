"""Small models of vision, random images and their masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2v_fast.config import BlockMaskConfig, LossConfig, TargetConfig, VisionConfig, VisionModelConfig
from d2v_fast.modalities.vision.encoder import VisionModel
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers import vision_reference as reference

CONFIG = VisionConfig(
    model=VisionModelConfig(
        image_size=12, patch_size=3, width=24, depth=4, heads=3, drop_path=0.0, attention_dropout=0.0
    ),
    mask=BlockMaskConfig(num_patches=8, min_patches=2),
    target=TargetConfig(top_k=3),
    loss=LossConfig(beta=0.7),
)


@dataclass
class Images:
    """A masked batch with its mask as bool `[B, P]`."""

    inputs: Tensor
    rows: Tensor
    masked: Tensor
    lengths: None = None
    unpadded: None = None
    masked_inputs: None = None
    drop_keys: None = None
    num_rows: None = None
    offsets: None = None

    def __getitem__(self, samples: slice) -> Images:
        return images(self.inputs[samples], self.masked[samples])


def images(pixels: Tensor, masked: Tensor) -> Images:
    return Images(pixels, masked.flatten().nonzero()[:, 0], masked)


def random_images(batch_size: int = 5, config: VisionConfig = CONFIG) -> Images:
    """Return random images with a different number of masked patches in each."""
    model = config.model
    masked = torch.rand(batch_size, model.num_patches) < torch.linspace(0.2, 0.8, batch_size)[:, None]
    return images(torch.randn(batch_size, model.channels, model.image_size, model.image_size), masked)


def random_pair(config: VisionConfig = CONFIG) -> tuple[Data2Vec, VisionModel]:
    """Return a random model and a teacher with other weights."""
    model = Data2Vec(config)
    teacher = VisionModel(config.model).eval().requires_grad_(False)
    reference.randomize_(model)
    reference.randomize_(teacher)
    return model, teacher
