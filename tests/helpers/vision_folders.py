"""Transformers folders of small vision models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2v_fast.config import BlockMaskConfig, TargetConfig, VisionConfig, VisionDataConfig, VisionModelConfig
from d2v_fast.modalities.vision.encoder import VisionModel
from d2v_fast.modalities.vision.huggingface import export_vision
from tests.helpers.vision_reference import randomize_

SIZES: dict[str, dict[str, Any]] = {
    "digits": {"image_size": 8, "patch_size": 2, "channels": 1, "width": 48, "depth": 3, "heads": 4},
    "positions": {"image_size": 8, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "absolute_position": True},
    "odd": {"image_size": 35, "patch_size": 7, "width": 30, "depth": 2, "heads": 5, "mlp_ratio": 2.5, "norm_eps": 1e-5},
    "one_patch": {"image_size": 4, "patch_size": 4, "width": 8, "depth": 1, "heads": 1, "mlp_ratio": 0.99},
}


def build(**sizes: Any) -> tuple[VisionModel, VisionConfig]:
    """Return an encoder in which no parameter has its initial value, and its run configuration."""
    model_config = VisionModelConfig(**sizes)
    channels = model_config.channels
    config = VisionConfig.model_construct(
        model=model_config,
        target=TargetConfig(top_k=1),
        mask=BlockMaskConfig(num_patches=1, min_patches=1),
        data=VisionDataConfig(mean=(0.3,) * channels, std=(0.2, 0.3, 0.4)[:channels]),
    )
    model = VisionModel(model_config).eval()
    randomize_(model)
    return model, config


def edited(tmp_path: Path, **changes: Any) -> Path:
    """Export a model and change keys of its `config.json`."""
    model, config = build(**SIZES["digits"])
    export_vision(model, config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path
