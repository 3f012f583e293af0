"""Read and write image checkpoints of the published data2vec vision code, which is based on BEiT, without importing it.

A `.pth` file holds the student's tensors under `model`, the teacher's under `model_ema`, and training state such as the
command line under `args`. The regression head is `lm_head` in both. A fine-tuned model has a norm `fc_norm` after mean
pooling instead of the last norm, a classifier `head`, and usually one table of relative positions per block, where a
pre-trained model has one for all blocks.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2v_fast.config import ConfigError, VisionConfig, VisionModelConfig
from d2v_fast.config.errors import check
from d2v_fast.interop.fairseq_files import as_fp32, replace_file, require_tensors, state_of
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, Gathered, Settings
from d2v_fast.interop.folders import mlp_ratio
from d2v_fast.interop.formats import Published
from d2v_fast.interop.layout import log_unused
from d2v_fast.modalities.vision.encoder import VisionModel
from d2v_fast.modalities.vision.layout import VisionNames, build_vision, gammas, vision_layout
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

NAMES = VisionNames(
    cls_token="cls_token",
    mask_token="mask_token",
    position="pos_embed",
    projection="patch_embed.proj",
    bias="rel_pos_bias.relative_position_bias_table",
    norm="norm",
    block="blocks.{}",
    qkv=("attn.qkv.weight",),
    q_bias="attn.q_bias",
    v_bias="attn.v_bias",
    gamma1="gamma_1",
    gamma2="gamma_2",
    block_bias="attn.relative_position_bias_table",
    modules={
        "norm1": "norm1",
        "attention.proj": "attn.proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
)
AVERAGE = "model_ema"
# keys that may hold the student; a file without any of them is the student itself
_STUDENTS = ("model", "module", "state_dict")
_HEAD = "lm_head."
# the norm after mean pooling, the classifier, and the head of a model that predicts image tokens
_UNUSED = ("fc_norm.", "head.", _HEAD)
# integer tables that follow from the sizes; averaging them as floats may have corrupted them
_INDEX = "relative_position_index"
# this name reveals the prefix that wrappers put before all names
_MARK = f"{NAMES.projection}.weight"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class BeitVision(NamedTuple):
    """Content of a checkpoint: fp32 tensors on the CPU, models in training mode.

    Attributes:
        student: The student, or the encoder of a fine-tuned model.
        teacher: The averaged model; None if the checkpoint has none.
        head: `weight` and `bias` of the regression head; None if the checkpoint has none.
        config: The model's configuration.
        assumed: Assumptions about settings that neither the checkpoint nor the caller gives, one phrase each.
        pending_decay: None, since the average lacks no update.
    """

    student: VisionModel
    teacher: VisionModel | None
    head: dict[str, Tensor] | None
    config: VisionModelConfig
    assumed: tuple[str, ...] = ()
    pending_decay: float | None = None


def is_beit(content: Any) -> bool:
    """Return whether the content of a `.pth` file is an image encoder of the published code, judged by its names."""
    return _student_of(content) is not None


def beit_of(content: Mapping[Any, Any], path: Path, settings: Settings = NO_SETTINGS) -> BeitVision:
    """Build the models of a checkpoint.

    Args:
        content: The file's content, for which `is_beit` is true.
        path: The file's path, for messages.
        settings: Model settings that override the command line in the file. Its number of heads is used only if no
            table of relative positions implies one; without either, a head is 64 wide.
    Raises:
        ValueError: The architecture is another one, or weights are not finite. `Misfit` names every missing, unknown
            and misshapen tensor.
    """
    weights = _student_of(content)
    assert weights is not None
    student, head = _encoder_and_head(weights, path)
    config, assumed = _config_of(student, content.get("args"), settings, str(path))
    average = content.get(AVERAGE)
    teacher = None
    if isinstance(average, Mapping) and average is not weights and _prefix_of(average) is not None:
        own, _ = _encoder_and_head(average, path)
        teacher = _build(config, own, f"the average `{AVERAGE}` in `{path}`")
    return BeitVision(_build(config, student, f"`{path}`"), teacher, head, config, assumed)


def save_beit(
    model: Student | Mapping[str, Tensor],
    head: nn.Module | Mapping[str, Tensor],
    teacher: Student | Mapping[str, Tensor],
    config: VisionConfig,
    path: str | os.PathLike[str],
    *,
    num_updates: int = 0,
) -> None:
    """Write a checkpoint with the published code's names and shapes: fp32 tensors and no code.

    Args:
        model: The student, or its state dict.
        head: The regression head, or its `weight` and `bias`.
        teacher: The whole teacher, or its state dict.
        config: The run's `d2v` section.
        path: The `.pth` file, replaced atomically.
        num_updates: Ignored: the format does not hold it.
    """
    layout = vision_layout(config.model, NAMES)
    average = dict(layout.all_theirs(state_of(teacher)))
    student = dict(layout.all_theirs(state_of(model))) | as_fp32(state_of(head), _HEAD)
    replace_file(path, {"model": student, AVERAGE: average})


def _student_of(content: Any) -> Mapping[Any, Any] | None:
    if not isinstance(content, Mapping):
        return None
    for found in (*(content.get(key) for key in _STUDENTS), content, content.get(AVERAGE)):
        if isinstance(found, Mapping) and _prefix_of(found) is not None:
            return found
    return None


def _prefix_of(weights: Mapping[Any, Any]) -> str | None:
    """Return the prefix of all names; None if these are not the names of an image encoder."""
    marks = [str(name).removesuffix(_MARK) for name in weights if str(name).endswith(_MARK)]
    found = [prefix for prefix in marks if f"{prefix}{NAMES.block.format(0)}.{NAMES.qkv[0]}" in weights]
    return found[0] if len(found) == 1 else None


def _encoder_and_head(weights: Mapping[Any, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the encoder's tensors by their published names, and the regression head's if there is one."""
    prefix = _prefix_of(weights) or ""
    named = {str(name): value for name, value in weights.items() if not str(name).endswith(_INDEX)}
    own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    require_tensors([own], f"`{path}` is no data2vec image model")
    log_unused([name for name in named if not name.startswith(prefix)], f"`{path}`")
    width = own[_MARK].shape[0]
    head = {name: own[_HEAD + name] for name in ("weight", "bias") if _HEAD + name in own}
    if {name: list(value.shape) for name, value in head.items()} != {"weight": [width, width], "bias": [width]}:
        return own, None
    require_finite(((_HEAD + name, value) for name, value in head.items()), f"`{path}`")
    return {n: v for n, v in own.items() if not n.startswith(_HEAD)}, {n: v.float() for n, v in head.items()}


def _build(config: VisionModelConfig, theirs: Mapping[str, Tensor], source: str) -> VisionModel:
    may_lack = {"position_bias.table"}
    if any(name.startswith("fc_norm.") for name in theirs):
        may_lack |= {"norm.weight", "norm.bias"}
    if not any(name.endswith(f".{NAMES.gamma1}") for name in theirs):
        may_lack |= gammas(config)
    misfit = f"is no data2vec image model of {config.depth} blocks of width {config.width}"
    layout = vision_layout(config, NAMES)
    return build_vision(config, layout, theirs, source, misfit, may_lack=frozenset(may_lack), unused=_UNUSED)


def _config_of(
    weights: Mapping[str, Tensor], args: Any, settings: Settings, path: str
) -> tuple[VisionModelConfig, tuple[str, ...]]:
    """Return the model's configuration and the assumptions in it.

    Sizes follow from the tensors, and rates from the training command line if the file has it.
    """
    published = VisionModelConfig()
    width, channels, patch, _ = _shape(weights, _MARK, (published.width, published.channels, published.patch_size, 0))
    depth = len({found[1] for name in weights if (found := _BLOCK.match(name))})
    own_bias = f"{NAMES.block.format(0)}.{NAMES.block_bias}"
    per_block = own_bias in weights
    rows, bias_heads = _shape(weights, own_bias if per_block else NAMES.bias, (0, 0))
    _, tokens, _ = _shape(weights, NAMES.position, (1, 0, width))
    # the table has (2 G - 1)^2 offsets and 3 rows for the class token; the positions are those of 1 + G^2 tokens
    grid = (round(max(0, rows - 3) ** 0.5) + 1) // 2 if rows else round(max(0, tokens - 1) ** 0.5)
    if not grid:
        raise ValueError(f"`{path}` must hold `{NAMES.bias}` or `{NAMES.position}`: nothing else gives the image size.")
    hidden, _ = _shape(weights, f"{NAMES.block.format(0)}.mlp.fc1.weight", (4 * width, width))
    line = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    rates = {"drop_path": "drop_path", "attn_drop_rate": "attention_dropout", "layer_scale_init_value": "layer_scale"}
    gathered = Gathered(
        {own: line[key] for key, own in rates.items() if isinstance(line.get(key), float)}, settings, path
    )
    if bias_heads:
        gathered.values["heads"] = bias_heads
    if f"{NAMES.block.format(0)}.{NAMES.gamma1}" not in weights:
        # a model without scales computes as with a scale of one
        gathered.values["layer_scale"] = 1.0
    gathered.heads(width)
    gathered.published({own: getattr(published, own) for own in rates.values()}, "as published")
    config, problems = check(
        VisionModelConfig,
        {
            "image_size": grid * patch,
            "patch_size": patch,
            "channels": channels,
            "width": width,
            "depth": depth,
            "mlp_ratio": mlp_ratio(width, hidden),
            "absolute_position": bool(tokens),
            "position_bias": "per_block" if per_block else "shared",
            **gathered.values,
        },
    )
    if config is None:
        raise ConfigError(problems, path)
    return config, tuple(gathered.assumed)


def _shape(weights: Mapping[str, Tensor], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tensor's shape, or the default if it is missing or has another rank; a later error then names it."""
    value = weights.get(name)
    return tuple(value.shape) if value is not None and value.dim() == len(default) else default


# the published code stores its command line as a Namespace, whose construction executes nothing
FORMAT = Published(
    "beit",
    ".pth",
    "the published vision code",
    AVERAGE,
    is_own=is_beit,
    read=beit_of,
    write=save_beit,
    classes=(argparse.Namespace,),
)
