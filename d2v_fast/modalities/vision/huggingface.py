"""Write and read vision encoders as Hugging Face Transformers folders, without importing Transformers.

`export_vision` writes a folder that `Data2VecVisionModel.from_pretrained` loads; `import_vision` reads one. Both
libraries compute the same features: their `hidden_states[-1]` is our `last_hidden`, and their `last_hidden_state` is
our `last_hidden` after `norm`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import ConfigError, VisionConfig, VisionDataConfig, VisionModelConfig
from d2v_fast.config.errors import check
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import model_folder
from d2v_fast.interop.folders import (
    MAX_WEIGHTS_BYTES,
    as_json,
    mlp_ratio,
    model_card,
    read_model_config,
    read_weights,
    require_values,
    whole_number,
    write_weights,
)
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.layout import Layout
from d2v_fast.modalities.vision.config import ImageModelSection
from d2v_fast.modalities.vision.encoder import VisionModel
from d2v_fast.modalities.vision.layout import VisionNames, build_vision, gammas, vision_layout
from d2v_fast.models.student import Student

KIND = "data2vec-vision"

# the published models use 1e-6 in all norms; Transformers' own converter writes 1e-12 instead
PUBLISHED_NORM_EPS = 1e-6
CONVERTER_NORM_EPS = 1e-12

# tensors that a folder may hold beside the encoder: heads and decoders, and index tables in old folders
UNUSED_PREFIXES = ("classifier.", "pooler.", "decode_head.", "auxiliary_head.", "fpn1.", "fpn2.", "fpn3.", "fpn4.")
IGNORED_SUFFIX = "relative_position_index"
BASE_PREFIX = "data2vec_vision."

RESAMPLE_BICUBIC = 3

_log = logging.getLogger(__name__)

NAMES = VisionNames(
    cls_token="embeddings.cls_token",
    mask_token="embeddings.mask_token",
    position="embeddings.position_embeddings",
    projection="embeddings.patch_embeddings.projection",
    bias="encoder.relative_position_bias.relative_position_bias_table",
    norm="layernorm",
    block="encoder.layer.{}",
    qkv=tuple(f"attention.attention.{name}.weight" for name in ("query", "key", "value")),
    q_bias="attention.attention.query.bias",
    v_bias="attention.attention.value.bias",
    gamma1="lambda_1",
    gamma2="lambda_2",
    block_bias="attention.attention.relative_position_bias.relative_position_bias_table",
    modules={
        "norm1": "layernorm_before",
        "attention.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
)


def export_vision(
    model: Student | Mapping[str, Tensor],
    config: VisionConfig | VisionModelConfig,
    folder: str | os.PathLike[str],
    *,
    info: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_WEIGHTS_BYTES,
) -> None:
    """Write `config.json`, the weights (fp32), `preprocessor_config.json` and a model card.

    Args:
        model: Student or teacher, on any device and in any dtype, or its state dict. A mapping that loads tensors
            lazily keeps memory below the size of one weights file.
        config: The run's configuration (sizes from `config.model`, image preparation from `config.data`), or the
            model's if the run's is unknown: then images are prepared as for the published models.
        folder: Created if missing. Files of an earlier export are replaced; see `model_folder`.
        info: Facts for the model card, such as `{"weights": "teacher", "step": 750}`.
        max_file_bytes: Larger weights are split into several files with an index, as Transformers does.
    """
    state = model if isinstance(model, Mapping) else model.state_dict()
    sizes = config.model if isinstance(config, VisionConfig) else config
    with model_folder(folder) as target:
        write_weights(target, layout(sizes), state, max_file_bytes)
        write_text(target / "README.md", _model_card(config, sizes, info or {}))
        data = config.data if isinstance(config, VisionConfig) else VisionDataConfig()
        scans = isinstance(config, VisionConfig) and data.kind == "digits"
        write_text(target / "preprocessor_config.json", as_json(preprocessor_config(sizes, data, scans)))
        write_text(target / "config.json", as_json(foreign_config(sizes)))


def import_vision(
    folder: str | os.PathLike[str], *, norm_eps: float | None = None
) -> tuple[VisionModel, VisionModelConfig]:
    """Read a folder that holds a `Data2VecVisionModel`, or a model built on one.

    Args:
        folder: A folder with `config.json` and `model.safetensors`, or several weights files and their index.
        norm_eps: Epsilon of all norms, overriding the folder's `layer_norm_eps`.
    Returns:
        The model, fp32 on the CPU, in training mode, and its configuration.
    Raises:
        ValueError: The architecture is not supported, or tensors are missing, unknown or misshapen.
    """
    source = Path(folder)
    raw = read_model_config(source)
    config = _own_config(raw, norm_eps, str(source / "config.json"))
    foreign, path = read_weights(source)
    theirs = {name.removeprefix(BASE_PREFIX): value for name, value in foreign.items()}
    theirs = {name: value for name, value in theirs.items() if not name.endswith(IGNORED_SUFFIX)}
    may_lack = gammas(config) if raw.get("layer_scale_init_value", 0.1) == 0 else set()
    if raw.get("use_mean_pooling", True):
        # a norm after mean pooling replaces the last norm
        may_lack |= {"norm.weight", "norm.bias"}
    if not raw.get("use_shared_relative_position_bias", False):
        # ignore a table that the folder's own model does not use
        may_lack.add("position_bias.table")
        theirs.pop(NAMES.bias, None)
    model = build_vision(
        config,
        layout(config),
        theirs,
        f"`{path}`",
        "does not fit its `config.json`",
        may_lack=frozenset(may_lack),
        unused=UNUSED_PREFIXES,
    )
    return model, config


def layout(config: VisionModelConfig) -> Layout:
    """Return the mapping between our tensors and Transformers'."""
    return vision_layout(config, NAMES)


def foreign_config(config: VisionModelConfig) -> dict[str, Any]:
    """Return the content of an encoder's `config.json`."""
    return {
        "architectures": ["Data2VecVisionModel"],
        "model_type": KIND,
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
        "use_relative_position_bias": config.position_bias == "per_block",
        "use_shared_relative_position_bias": config.position_bias == "shared",
        # true would remove the last norm from the base model
        "use_mean_pooling": False,
    }


def _own_config(raw: Mapping[str, Any], norm_eps: float | None, path: str) -> VisionModelConfig:
    """Convert a Transformers configuration to ours. Missing keys get Transformers' defaults."""
    required = {
        "model_type": KIND,
        "hidden_act": "gelu",
    }
    require_values(raw, required, {"hidden_act": "gelu"}, path)
    per_block = raw.get("use_relative_position_bias", False) is True
    if per_block:
        # Transformers would add both tables
        key = "use_shared_relative_position_bias"
        require_values(raw, {key: False}, {key: False}, path)
    if norm_eps is None:
        norm_eps = raw.get("layer_norm_eps", CONVERTER_NORM_EPS)
        if norm_eps == CONVERTER_NORM_EPS:
            _log.warning(
                "`layer_norm_eps` in %s is %s and is kept, so that features agree with Transformers. The published "
                "models were trained with %s: if this is one of them, change the file, or pass `norm_eps` from Python",
                path,
                CONVERTER_NORM_EPS,
                PUBLISHED_NORM_EPS,
            )
    width = whole_number(raw, "hidden_size", 768, path)
    config, problems = check(
        VisionModelConfig,
        {
            "image_size": _side(raw, "image_size", 224, path),
            "patch_size": _side(raw, "patch_size", 16, path),
            "channels": raw.get("num_channels", 3),
            "width": width,
            "depth": raw.get("num_hidden_layers", 12),
            "heads": raw.get("num_attention_heads", 12),
            "mlp_ratio": mlp_ratio(width, whole_number(raw, "intermediate_size", 3072, path)),
            "drop_path": raw.get("drop_path_rate", 0.1),
            "attention_dropout": raw.get("attention_probs_dropout_prob", 0.0),
            "dropout": raw.get("hidden_dropout_prob", 0.0),
            # a model without scales computes as with a scale of one
            "layer_scale": raw.get("layer_scale_init_value", 0.1) or 1.0,
            "norm_eps": norm_eps,
            "absolute_position": raw.get("use_absolute_position_embeddings", False),
            "position_bias": "per_block" if per_block else "shared",
        },
    )
    if config is None:
        raise ConfigError(problems, path)
    return config


def _side(raw: Mapping[str, Any], key: str, default: int, path: str) -> int:
    """Return the side of a square that is given as one number or as two equal numbers."""
    value = raw.get(key, default)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f"`{key}` in {path} must be square, but is {value} instead.")
        value = value[0]
    return whole_number({key: value}, key, default, path)


def preprocessor_config(model: ImageModelSection, data: VisionDataConfig, scans: bool) -> dict[str, Any]:
    """Return the preprocessor configuration of our evaluation: the largest centered square at input size."""
    size = model.image_size
    return {
        "image_processor_type": "BeitImageProcessor",
        # gray images stay gray
        "do_convert_rgb": model.channels == 3,
        # digits are scans of 8x8 with gray levels from 0 to 16
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
        # Transformers' own processor ignores this key
        **({} if data.bit_depth is None else {"bit_depth": data.bit_depth}),
    }


def _per_channel(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def _model_card(config: VisionConfig | VisionModelConfig, model: VisionModelConfig, info: Mapping[str, object]) -> str:
    by = "by d2v_fast: a student" if isinstance(config, VisionConfig) else "with data2vec: a student"
    return model_card(
        title=f"data2vec vision encoder, {model.depth} blocks of width {model.width}",
        task="image-feature-extraction",
        tags=["data2vec", "self-supervised", "vision"],
        text=f"""\
Pre-trained without labels {by} predicts, at masked patches, the averaged upper layers of a
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

To fine-tune a classifier on the mean of the patch features, as is usual for this family of models (a new norm after the
mean then replaces the last norm, `layernorm`, which is reported as unexpected):

```python
from transformers import Data2VecVisionForImageClassification

model = Data2VecVisionForImageClassification.from_pretrained(".", num_labels=10, use_mean_pooling=True)
```""",
        info=info,
        config=config,
    )


def _options_of_run(raw: Mapping[str, Any], wanted: VisionModelConfig) -> dict[str, Any]:
    """Return the run's norm epsilon if Transformers' converter overwrote that of the weights."""
    is_lost = raw.get("layer_norm_eps", CONVERTER_NORM_EPS) == CONVERTER_NORM_EPS
    return {"norm_eps": wanted.norm_eps} if is_lost else {}


FORMAT = HuggingFace(KIND, export_vision, import_vision, _options_of_run)
