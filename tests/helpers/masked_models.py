"""Small models of data2vec 2.0 of the three modalities, and random batches with several masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from d2v_fast.config import D2VConfig, check_d2v
from d2v_fast.data.batch import Batch
from d2v_fast.data.makers import masked_batch
from d2v_fast.data.order import MicroStep
from d2v_fast.masking import several_image_masks, several_sequence_masks
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec2 import Data2Vec2

_BLOCKS = {
    "width": 16, "depth": 2, "heads": 4, "dropout": 0.0, "attention_dropout": 0.0, "context_dropout": 0.0,
    "layer_drop": 0.0,
}  # fmt: skip
_DECODER = {"width": 8, "depth": 2, "kernel": 3, "groups": 2}
_SECTIONS: dict[str, Any] = {
    "vision": {
        "model": {**_BLOCKS, "context_depth": 1, "image_size": 8, "patch_size": 2, "channels": 1, "decoder": _DECODER},
        "mask": {"num_masks": 3, "prob": 0.6, "length": 2, "prob_adjust": 0.1},
        "data": {"kind": "digits", "mean": [0.3], "std": [0.4]},
    },
    "speech": {
        "model": {
            **_BLOCKS, "heads": 2, "conv_width": 8, "conv_kernels": [6, 3], "conv_strides": [4, 2],
            "position_depth": 2, "position_kernel": 3, "position_groups": 4, "decoder": _DECODER,
        },
        "mask": {"num_masks": 3, "prob": 0.5, "length": 3, "prob_adjust": 0.05},
        "data": {"kind": "speech", "min_seconds": 0.01, "max_seconds": 0.01},
    },
    "text": {
        "model": {
            **_BLOCKS, "vocab_size": 20, "padding_id": 1, "max_positions": 16,
            "decoder": {**_DECODER, "groups": 1, "residual": False, "projection": 2},
        },
        "mask": {"num_masks": 3, "prob": 0.48},
        "data": {"block_size": 16},
    },
}  # fmt: skip


def masked_config(modality: str, **changes: dict[str, Any]) -> D2VConfig:
    """Return a small configuration; `changes` update its sections."""
    target = {"top_k": 2, "layer_norm": "instance", "final_norm": "layer" if modality == "vision" else "none"}
    raw = {"modality": modality, "objective": "data2vec2", "target": target, **_SECTIONS[modality]}
    raw = {**raw, **{name: {**raw.get(name, {}), **section} for name, section in changes.items()}}
    config, problems = check_d2v(raw)
    assert config is not None, problems
    return config


def random_masked_pair(config: D2VConfig) -> tuple[Data2Vec2, nn.Module]:
    """Return a model with random norms and biases too, and a teacher with other weights."""
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, Data2Vec2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        teacher = copy.deepcopy(model.student.averaged).eval().requires_grad_(False)
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model, teacher


def random_masked_batch(config: D2VConfig, lengths: Sequence[int], first: int = 0) -> Batch:
    """Return a batch of samples `first`, `first + 1`, ..., with so many places each; a sample is a function of its id.

    Args:
        config: from `masked_config`.
        lengths: places of each sample; for images they only say how many there are.
        first: id of the first sample.
    """
    ids = np.arange(first, first + len(lengths))
    micro, mask, model = MicroStep(0, ids, ids), config.mask.model_dump(), config.model
    generators = [torch.Generator().manual_seed(int(one)) for one in ids]
    if config.modality == "vision":
        inputs = torch.stack([torch.randn(1, 8, 8, generator=one) for one in generators])
        drawn = several_image_masks(
            0, 0, ids, 4, mask["prob"], mask["length"], mask["prob_adjust"], num_masks=mask["num_masks"]
        )
        return masked_batch(inputs, drawn, micro, 0)
    sizes = np.asarray(lengths, dtype=np.int64)
    block, adjust = mask.get("length", 1), mask.get("prob_adjust", 0.0)
    drawn = several_sequence_masks(
        0, 0, ids, sizes, mask["prob"], block, adjust, num_masks=mask["num_masks"], inverse=mask.get("inverse", True)
    )
    if config.modality == "text":
        samples = [torch.randint(4, 20, (int(n),), generator=g) for n, g in zip(sizes, generators, strict=True)]
        padding = 1
    else:
        samples = [torch.randn(model.num_samples(int(n)), generator=g) for n, g in zip(sizes, generators, strict=True)]
        padding = 0
    inputs = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=padding)
    return masked_batch(inputs, drawn, micro, 0, lengths=sizes)
