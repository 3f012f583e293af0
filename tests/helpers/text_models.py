"""Small models of text."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from d2v_fast.config import LossConfig, TargetConfig, TextConfig
from d2v_fast.data import Batch
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec

# the mask token
MASK = 49
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "padding_id": 1,
    "max_positions": 16,
    "width": 24,
    "depth": 3,
    "heads": 3,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def make_config(**model: Any) -> TextConfig:
    return TextConfig.model_validate(
        {
            "model": {**SIZES, **model},
            "target": TargetConfig(top_k=2, layer_norm="layer", final_norm="none"),
            "loss": LossConfig(beta=0.5, channel_reduction="sum"),
            "data": {"block_size": 16},
        }
    )


def make_pair(config: TextConfig) -> tuple[Data2Vec, torch.nn.Module]:
    model = build_model(config)
    teacher = copy.deepcopy(model.student.averaged).eval().requires_grad_(False)
    for module in (model, teacher):
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and "norm" in name and "weight" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif "embedding" in name or parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.5)
            else:
                torch.nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[1]))
    with torch.no_grad():
        model.student.embedding.token.weight[1] = 0
    return model, teacher


def make_batch(lengths: list[int], documents: list[list[int]] | None = None) -> Batch:
    """Return a batch of random tokens, about a third masked; `documents` has the document lengths of each row."""
    width = max(lengths)
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.where(valid, torch.randint(4, MASK, (len(lengths), width)), 1)
    hidden = (torch.rand(tokens.shape) < 0.3) & valid
    hidden[:, 0] = True
    padded = not valid.all()
    sizes = [size for row in documents for size in row] if documents is not None else None
    return Batch(
        tokens,
        hidden.flatten().nonzero()[:, 0],
        torch.arange(len(lengths)),
        lengths=torch.tensor(lengths) if padded else None,
        unpadded=valid.flatten().nonzero()[:, 0] if padded else None,
        masked_inputs=torch.where(hidden, MASK, tokens),
        offsets=None if sizes is None else torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32),
    )
