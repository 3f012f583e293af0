"""Small models of speech."""

from __future__ import annotations

import copy
from typing import Any

import torch

from d2v_fast.config import SpeechConfig, SpeechModelConfig, TargetConfig
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers import speech_reference as reference

SIZES: dict[str, Any] = {
    "conv_width": 8,
    "conv_kernels": (10, 3, 2),
    "conv_strides": (5, 2, 2),
    "position_depth": 2,
    "position_kernel": 5,
    "position_groups": 4,
    "width": 24,
    "depth": 3,
    "heads": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "layer_drop": 0.0,
}


def make_config(**model: Any) -> SpeechConfig:
    target = TargetConfig(top_k=2, layer_norm="instance", final_norm="none")
    return SpeechConfig(model=SpeechModelConfig(**{**SIZES, **model}), target=target)


def make_pair(config: SpeechConfig) -> tuple[Data2Vec, torch.nn.Module]:
    """Return a random model and a teacher with other weights."""
    model = build_model(config)
    teacher = copy.deepcopy(model.student.averaged).eval().requires_grad_(False)
    reference.randomize_(model)
    reference.randomize_(teacher)
    return model, teacher
