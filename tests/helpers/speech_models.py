"""Small models of speech."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from d2v_fast.config import SpeechConfig, SpeechModelConfig, TargetConfig
from d2v_fast.data import Batch
from d2v_fast.masking import span_mask_rows
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


def make_batch(config: SpeechConfig, num_samples: list[int], seed: int = 0) -> Batch:
    """Return a batch of noise, padded to the longest utterance, with span masks."""
    generator = torch.Generator().manual_seed(seed)
    frames = np.array([config.model.num_frames(n) for n in num_samples], dtype=np.int64)
    waveforms = torch.zeros(len(frames), max(num_samples))
    for waveform, n in zip(waveforms, num_samples, strict=True):
        waveform[:n] = torch.randn(n, generator=generator)
    ids = np.arange(len(frames))
    rows = span_mask_rows(seed, 0, ids, int(frames.max()), 0.5, 3, equal_counts=False, lengths=frames)
    padded = bool((frames < frames.max()).any())
    unpadded = torch.from_numpy(np.flatnonzero(np.arange(frames.max()) < frames[:, None]))
    return Batch(
        waveforms,
        torch.from_numpy(rows),
        torch.from_numpy(ids),
        lengths=torch.from_numpy(frames) if padded else None,
        unpadded=unpadded if padded else None,
    )
