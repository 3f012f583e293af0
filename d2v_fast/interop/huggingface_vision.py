"""Vision encoders as Hugging Face Transformers folders, in both directions, without importing Transformers.

`export_vision` writes what `Data2VecVisionModel.from_pretrained` reads; `import_vision` reads it back. The two
libraries compute the same features: `hidden_states[-1]` there is `last_hidden` here, `last_hidden_state` there is
`last_hidden` after `norm`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import VisionConfig, VisionModelConfig
from d2v_fast.interop.folders import (
    MAX_WEIGHTS_BYTES,
    as_json,
    mlp_ratio,
    model_card,
    read_model_config,
    read_weights,
    require_values,
    whole_number,
    write_text,
    write_weights,
)
from d2v_fast.interop.layout import Layout
from d2v_fast.modalities import Student
from d2v_fast.modalities.vision import VisionModel

# norms of the published models use 1e-6; configurations made by Transformers' own converter say 1e-12 instead
PUBLISHED_NORM_EPS = 1e-6
CONVERTER_NORM_EPS = 1e-12

# what a folder may hold beside the encoder: parts of a classifier, and tables of indices in old folders
IGNORED_PREFIXES = ("classifier.", "pooler.")
IGNORED_SUFFIX = "relative_position_index"
BASE_PREFIX = "data2vec_vision."

RESAMPLE_BICUBIC = 3


def export_vision(
    model: Student | Mapping[str, Tensor],
    config: VisionConfig,
    folder: str | os.PathLike[str],
    *,
    info: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_WEIGHTS_BYTES,
) -> None:
    """Write `config.json`, the weights (fp32), `preprocessor_config.json` and a model card.

    Args:
        model: student or teacher, on any device and in any dtype, or its state by name: a mapping that reads each
            tensor when it is asked for keeps no more than one file of them in memory.
        config: of the run: sizes from `config.model`, image preparation from `config.data`.
        max_file_bytes: weights beyond it are divided into several files with an index, as Transformers does.
        folder: made if missing; files of an earlier export in it are replaced.
        info: what the model card says of these weights, such as `{"weights": "teacher", "step": 750}`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = model if isinstance(model, Mapping) else model.state_dict()
    write_weights(target, layout(config.model), state, max_file_bytes)
    write_text(target / "README.md", _model_card(config, info or {}))
    write_text(target / "preprocessor_config.json", as_json(_preprocessor_config(config)))
    # last: a folder without it is no model, so a first export that is cut short cannot be mistaken for one
    write_text(target / "config.json", as_json(_foreign_config(config.model)))


def import_vision(
    folder: str | os.PathLike[str], *, norm_eps: float | None = None
) -> tuple[VisionModel, VisionModelConfig]:
    """Read a folder that holds a `Data2VecVisionModel`, or a model around one.

    Args:
        folder: with `config.json` and `model.safetensors`, or several files of weights and their index.
        norm_eps: of all norms, instead of the folder's `layer_norm_eps`.
    Returns:
        The model, fp32 on the CPU, in training mode, and its configuration.
    Raises:
        ValueError: for an architecture that this encoder is not, and for missing, unknown or misshapen tensors.
    """
    source = Path(folder)
    config = _own_config(read_model_config(source), norm_eps, str(source / "config.json"))
    foreign, path = read_weights(source)
    model = VisionModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = layout(config).ours(
        {name.removeprefix(BASE_PREFIX): value for name, value in foreign.items()},
        shapes,
        f"`{path}` does not fit its `config.json`",
        lambda name: name.startswith(IGNORED_PREFIXES) or name.endswith(IGNORED_SUFFIX),
    )
    model.load_state_dict(state)
    return model, config


def key_map(config: VisionModelConfig) -> dict[str, tuple[str, ...]]:
    """Own key to Transformers' keys; of several, ours is their concatenation along the first dimension."""
    pairs: dict[str, tuple[str, ...]] = {
        "embedding.cls_token": ("embeddings.cls_token",),
        "embedding.mask_token": ("embeddings.mask_token",),
        "embedding.projection.weight": ("embeddings.patch_embeddings.projection.weight",),
        "embedding.projection.bias": ("embeddings.patch_embeddings.projection.bias",),
        "position_bias.table": ("encoder.relative_position_bias.relative_position_bias_table",),
        "norm.weight": ("layernorm.weight",),
        "norm.bias": ("layernorm.bias",),
    }
    if config.absolute_position:
        pairs["embedding.position"] = ("embeddings.position_embeddings",)
    for index in range(config.depth):
        own, foreign = f"encoder.blocks.{index}", f"encoder.layer.{index}"
        attention = f"{foreign}.attention.attention"
        pairs[f"{own}.attention.qkv.weight"] = tuple(
            f"{attention}.{projection}.weight" for projection in ("query", "key", "value")
        )
        pairs[f"{own}.attention.qkv.q_bias"] = (f"{attention}.query.bias",)
        pairs[f"{own}.attention.qkv.v_bias"] = (f"{attention}.value.bias",)
        pairs[f"{own}.gamma1"] = (f"{foreign}.lambda_1",)
        pairs[f"{own}.gamma2"] = (f"{foreign}.lambda_2",)
        modules = {
            "norm1": "layernorm_before",
            "attention.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        }
        for own_module, foreign_module in modules.items():
            for parameter in ("weight", "bias"):
                pairs[f"{own}.{own_module}.{parameter}"] = (f"{foreign}.{foreign_module}.{parameter}",)
    return pairs


def layout(config: VisionModelConfig) -> Layout:
    """Transformers' names, and the shapes of the tensors that it keeps in another shape than this library does."""
    size = config.patch_size
    shapes = {
        "embeddings.cls_token": (1, 1, config.width),
        "embeddings.mask_token": (1, 1, config.width),
        "embeddings.position_embeddings": (1, 1 + config.num_patches, config.width),
        "embeddings.patch_embeddings.projection.weight": (config.width, config.channels, size, size),
    }
    return Layout(key_map(config), shapes)


def _foreign_config(config: VisionModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Data2VecVisionModel"],
        "model_type": "data2vec-vision",
        "dtype": "float32",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "layer_scale_init_value": config.layer_scale,
        "drop_path_rate": config.drop_path,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": 0.02,
        "use_mask_token": True,
        "use_absolute_position_embeddings": config.absolute_position,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        # true would drop the final norm from the base model
        "use_mean_pooling": False,
    }


def _own_config(raw: Mapping[str, Any], norm_eps: float | None, path: str) -> VisionModelConfig:
    """Sizes and rates out of a Transformers configuration, whose defaults apply to what it leaves out."""
    required = {
        "model_type": "data2vec-vision",
        "hidden_act": "gelu",
        "use_mask_token": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
    }
    require_values(raw, required, {"hidden_act": "gelu", "use_relative_position_bias": False}, path)
    if norm_eps is None:
        norm_eps = raw.get("layer_norm_eps", CONVERTER_NORM_EPS)
        if norm_eps == CONVERTER_NORM_EPS:
            warnings.warn(
                f"`layer_norm_eps` in {path} is {CONVERTER_NORM_EPS} and is kept, so that features agree with "
                f"Transformers. The published models were trained with {PUBLISHED_NORM_EPS}: if this is one of "
                f"them, pass `norm_eps={PUBLISHED_NORM_EPS}`.",
                stacklevel=3,
            )
    width = whole_number(raw, "hidden_size", 768, path)
    return VisionModelConfig(
        image_size=_side(raw, "image_size", 224, path),
        patch_size=_side(raw, "patch_size", 16, path),
        channels=raw.get("num_channels", 3),
        width=width,
        depth=raw.get("num_hidden_layers", 12),
        heads=raw.get("num_attention_heads", 12),
        mlp_ratio=mlp_ratio(width, whole_number(raw, "intermediate_size", 3072, path)),
        drop_path=raw.get("drop_path_rate", 0.1),
        attention_dropout=raw.get("attention_probs_dropout_prob", 0.0),
        dropout=raw.get("hidden_dropout_prob", 0.0),
        layer_scale=raw.get("layer_scale_init_value", 0.1),
        norm_eps=norm_eps,
        absolute_position=raw.get("use_absolute_position_embeddings", False),
    )


def _side(raw: Mapping[str, Any], key: str, default: int, path: str) -> int:
    """One side of a square that is given as a number or as two equal ones."""
    value = raw.get(key, default)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f"`{key}` in {path} must be square, but is {value} instead.")
        return int(value[0])
    return int(value)


def _preprocessor_config(config: VisionConfig) -> dict[str, Any]:
    """Image preparation as in this library's own evaluation: the largest square in the middle, at input size."""
    data, model = config.data, config.model
    size = model.image_size
    scans = data.kind == "digits"
    return {
        "image_processor_type": "BeitImageProcessor",
        # grey images stay grey
        "do_convert_rgb": model.channels == 3,
        # digits come at the size of the scan, 8x8, in grey levels from 0 to 16
        "do_resize": not (scans and size == 8),
        "size": {"shortest_edge": size},
        "resample": RESAMPLE_BICUBIC,
        "do_center_crop": not scans,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 16 if scans else 1 / 255,
        "do_normalize": True,
        "image_mean": _per_channel(data.mean, model.channels),
        "image_std": _per_channel(data.std, model.channels),
        "do_reduce_labels": False,
    }


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def _model_card(config: VisionConfig, info: Mapping[str, object]) -> str:
    model = config.model
    return model_card(
        title=f"data2vec vision encoder, {model.depth} blocks of width {model.width}",
        task="image-feature-extraction",
        tags=["data2vec", "self-supervised", "vision"],
        text="""\
Pre-trained without labels by d2v_fast: a student predicts, at masked patches, the averaged upper layers of a
teacher that is a moving average of the student and sees the whole image (data2vec, arXiv 2202.03555).""",
        use=f"""\
Input: {model.channels} x {model.image_size} x {model.image_size} pixels, prepared by the image processor in this
folder; patches of {model.patch_size} x {model.patch_size}.

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
encoder = AutoModel.from_pretrained(".")
features = encoder(**processor(image, return_tensors="pt")).last_hidden_state  # class token first
```

To fine-tune a classifier on the mean of the patch features, as is usual for this family of models (the final norm,
`layernorm`, then gives way to a new one behind the mean, and is reported as unexpected):

```python
from transformers import Data2VecVisionForImageClassification

model = Data2VecVisionForImageClassification.from_pretrained(".", num_labels=10, use_mean_pooling=True)
```""",
        info=info,
        config=config,
    )
