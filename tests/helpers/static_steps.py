"""Small models of every modality with a batch in which samples skip parts of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from d2v_fast.config import D2VConfig
from d2v_fast.data import Batch
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers import masked_models, speech_models, text_models, vision_models

KINDS = ("vision", "speech", "text")
# with the second version of data2vec, whose rows need no padding
ALL_KINDS = (*KINDS, "vision2", "speech2", "text2")
NUM_SAMPLES = 6
_KEYS = np.arange(NUM_SAMPLES, dtype=np.uint64) * np.uint64(2**60 + 12345)


def make_trial(kind: str, **sections: Any) -> tuple[Data2Vec, nn.Module, Batch]:
    """Return a random model in training mode, a teacher with other weights, and a batch on the host."""
    config = make_config(kind).model_copy(update=sections)
    pair: tuple[Data2Vec, nn.Module]
    if kind.endswith("2"):
        pair = masked_models.random_masked_pair(config)
    elif kind == "vision":
        pair = vision_models.random_pair(config)
    else:
        pair = (speech_models if kind == "speech" else text_models).make_pair(config)
    return pair[0].train(), pair[1], make_batch(kind, config)


def make_config(kind: str) -> D2VConfig:
    """Return the configuration of `make_trial`, in which samples skip many parts and nothing else is random."""
    if kind == "vision":
        config = vision_models.CONFIG
        return config.model_copy(update={"model": config.model.model_copy(update={"drop_path": 0.5})})
    if kind.endswith("2"):
        return masked_models.masked_config(kind[:-1], model={"layer_drop": 0.4})
    return (speech_models if kind == "speech" else text_models).make_config(layer_drop=0.4)


def make_batch(kind: str, config: D2VConfig, seed: int = 0) -> Batch:
    """Return a random batch: images; recordings of different lengths; or blocks of tokens of different lengths."""
    if kind.endswith("2"):
        return masked_models.random_masked_batch(config, [16] * 4, first=4 * seed)
    generator = torch.Generator().manual_seed(seed)
    ids, keys = torch.arange(NUM_SAMPLES), _KEYS + np.uint64(seed)
    if kind == "vision":
        model = config.model
        shape = (NUM_SAMPLES, model.channels, model.image_size, model.image_size)
        masked = torch.rand(NUM_SAMPLES, model.num_patches, generator=generator) < 0.4
        rows = masked.flatten().nonzero()[:, 0][:37]
        return Batch(torch.randn(shape, generator=generator), rows, ids, drop_keys=keys)
    if kind == "speech":
        inputs = torch.randn(NUM_SAMPLES, 420, generator=generator)
        num_places = config.model.num_frames(420)
    else:
        inputs = torch.randint(5, 50, (NUM_SAMPLES, 16), generator=generator)
        num_places = 16
    lengths = torch.tensor([num_places - number % 4 for number in range(NUM_SAMPLES)])
    masked = torch.rand(NUM_SAMPLES, num_places, generator=generator) < 0.5
    masked &= torch.arange(num_places) < lengths[:, None]
    rows = masked.flatten().nonzero()[:, 0][:37]
    masked_inputs = None
    if kind == "text":
        masked_inputs = inputs.flatten().index_fill(0, rows, 4).view_as(inputs)
    return Batch(inputs, rows, ids, lengths=lengths, masked_inputs=masked_inputs, drop_keys=keys)
