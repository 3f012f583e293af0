"""Checkpoints of fairseq's data2vec for speech, with the names and shapes that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNELS = (10, 3, 3, 3, 3, 2, 2)


LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


def shapes(conv: int, width: int, hidden: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a student without its head, as in the published checkpoints."""
    found: dict[str, tuple[int, ...]] = {"mask_emb": (width,)}
    for i, kernel in enumerate(KERNELS):
        found[f"feature_extractor.conv_layers.{i}.0.weight"] = (conv, 1 if i == 0 else conv, kernel)
        found[f"feature_extractor.conv_layers.{i}.2.1.weight"] = (conv,)
        found[f"feature_extractor.conv_layers.{i}.2.1.bias"] = (conv,)
    found |= {"post_extract_proj.weight": (width, conv), "post_extract_proj.bias": (width,)}
    found |= {"layer_norm.weight": (conv,), "layer_norm.bias": (conv,)}
    for j in range(5):
        found[f"encoder.pos_conv.{j}.0.weight"] = (width, width // 16, 19)
        found[f"encoder.pos_conv.{j}.0.bias"] = (width,)
    for i in range(depth):
        layer = f"encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found[f"{layer}.self_attn.{projection}.weight"] = (width, width)
            found[f"{layer}.self_attn.{projection}.bias"] = (width,)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            found |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
        found |= {f"{layer}.fc1.weight": (hidden, width), f"{layer}.fc1.bias": (hidden,)}
        found |= {f"{layer}.fc2.weight": (width, hidden), f"{layer}.fc2.bias": (width,)}
    found |= {"encoder.layer_norm.weight": (width,), "encoder.layer_norm.bias": (width,)}
    return found


def tensors(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in sizes.items()}


def pretrained(head: str = "final_proj", width: int = 32) -> dict[str, Any]:
    """Return a checkpoint with a student, a head, and an average that is twice the student."""
    model: dict[str, Any] = tensors(shapes(8, width, 48, 2))
    average = {n.removeprefix("encoder."): 2 * value for n, value in model.items() if n.startswith("encoder.")}
    model |= {f"{head}.weight": torch.randn(width, width), f"{head}.bias": torch.randn(width), "_ema": average}
    options = {
        "encoder_attention_heads": 4,
        "dropout": 0.2,
        "attention_dropout": 0.0,
        "activation_dropout": 0.05,
        "dropout_input": 0.3,
        "encoder_layerdrop": 0.1,
        "conv_feature_layers": LAYERS,
        "ema_layers_only": False,
        "layer_norm_first": False,
        "extractor_mode": "layer_norm",
    }
    return {
        "args": None,
        "cfg": {"model": options, "task": {"sample_rate": 8_000}},
        "model": model,
        "extra_state": {"a": [1]},
    }


def saved(content: dict[str, Any], folder: Path) -> Path:
    torch.save(content, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"
