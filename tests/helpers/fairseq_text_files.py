"""Checkpoints of fairseq's data2vec for text, with the names and shapes that it writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PREFIX = "encoder.sentence_encoder."


def shapes(vocab: int, rows: int, width: int, hidden: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of fairseq's `TransformerEncoder` in data2vec, including its buffer."""
    found: dict[str, tuple[int, ...]] = {"version": (1,)}
    found |= {"embed_tokens.weight": (vocab, width), "embed_positions.weight": (rows, width)}
    found |= {"layernorm_embedding.weight": (width,), "layernorm_embedding.bias": (width,)}
    for i in range(depth):
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found[f"layers.{i}.self_attn.{projection}.weight"] = (width, width)
            found[f"layers.{i}.self_attn.{projection}.bias"] = (width,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found |= {f"layers.{i}.{norm}.weight": (width,), f"layers.{i}.{norm}.bias": (width,)}
        found |= {f"layers.{i}.fc1.weight": (hidden, width), f"layers.{i}.fc1.bias": (hidden,)}
        found |= {f"layers.{i}.fc2.weight": (width, hidden), f"layers.{i}.fc2.bias": (width,)}
    return found


def regression_head(width: int) -> dict[str, Tensor]:
    return {
        "encoder.regression_head.0.weight": torch.randn(2 * width, width),
        "encoder.regression_head.0.bias": torch.randn(2 * width),
        "encoder.regression_head.2.weight": torch.randn(width, 2 * width),
        "encoder.regression_head.2.bias": torch.randn(width),
    }


def lm_head(vocab: int, width: int) -> dict[str, Tensor]:
    """Return the tensors of the language-model head in the released checkpoint."""
    return {
        "encoder.lm_head.weight": torch.randn(vocab, width),
        "encoder.lm_head.bias": torch.randn(vocab),
        "encoder.lm_head.dense.weight": torch.randn(width, width),
        "encoder.lm_head.dense.bias": torch.randn(width),
        "encoder.lm_head.layer_norm.weight": torch.randn(width),
        "encoder.lm_head.layer_norm.bias": torch.randn(width),
    }


def pretrained(head: str = "regression", width: int = 32) -> dict[str, Any]:
    """Return a checkpoint with a student, a head, and an average whose blocks are twice the student's."""
    encoder = {name: torch.randn(shape) for name, shape in shapes(40, 18, width, 48, 2).items()}
    encoder["version"] = torch.tensor([3.0])
    model: dict[str, Any] = {PREFIX + name: value for name, value in encoder.items()}
    model |= regression_head(width) if head == "regression" else lm_head(40, width)
    model["encoder._ema"] = {name: (2 if "layers." in name else 1) * value for name, value in encoder.items()}
    transformer = {
        "dropout": 0.2,
        "attention_dropout": 0.0,
        "activation_dropout": 0.05,
        "activation_fn": "gelu",
        "layernorm_embedding": True,
        "no_scale_embedding": True,
        "encoder": {"attention_heads": 4, "layerdrop": 0.1, "normalize_before": False, "learned_pos": True},
    }
    return {"args": None, "cfg": {"model": {"transformer": transformer, "head_layers": 2}}, "model": model}
