"""Read and write speech checkpoints of fairseq's data2vec (version 1), without importing fairseq.

The entry `model` of a checkpoint holds the student, its regression head `final_proj`, and the teacher's fp32 average
under `_ema`, with names relative to `encoder`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.config import ConfigError, SpeechConfig, SpeechModelConfig
from d2v_fast.config.errors import check, show
from d2v_fast.config.file import section
from d2v_fast.interop.fairseq_files import (
    as_fp32,
    average_of,
    check_weights,
    chosen,
    read_checkpoint,
    refuse_others,
    require_average,
    require_shapes,
    require_tensors,
    state_of,
    write_checkpoint,
)
from d2v_fast.interop.fairseq_recipe import NO_SETTINGS, POST_NORM, Gathered, Settings, pending_decay, told_by
from d2v_fast.interop.folders import mlp_ratio, require_values
from d2v_fast.interop.formats import Published
from d2v_fast.interop.layout import log_unused
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.speech.huggingface import build_speech
from d2v_fast.modalities.speech.layout import SpeechNames, speech_layout
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

NAMES = SpeechNames(
    convolution="feature_extractor.conv_layers.{}.0",
    convolution_norm="feature_extractor.conv_layers.{}.2.1",
    front_norm="layer_norm",
    projection="post_extract_proj",
    mask_token="mask_emb",
    position="encoder.pos_conv.{}.0",
    norm="encoder.layer_norm",
    block="encoder.layers.{}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    fc1="fc1",
    fc2="fc2",
    mlp_norm="final_layer_norm",
)
AVERAGE = "_ema"
# the averaged part of the model, unless all of it is averaged
AVERAGED = "encoder."
# prefix of the encoder in a model fine-tuned with CTC, which has no head and no average
FINE_TUNED = "w2v_encoder.w2v_model."
# the head is a list of one layer in the published checkpoints
HEADS = ("final_proj.", "final_proj.0.")

PUBLISHED = SpeechModelConfig()
# fairseq's names of the rates, and this library's
_RATES = {
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "input_dropout",
    "encoder_layerdrop": "layer_drop",
}
# a smaller ratio of the distances in `_positions` means a copy that is one update old
_COPIED = 0.3
# equal layers of convolutions, such as `[(512, 3, 2)] * 4`
_TERM = re.compile(r"\[([\d\s,()]*)\](?:\s*\*\s*(\d{1,2}))?")
_LAYER = re.compile(r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")


class FairseqSpeech(NamedTuple):
    """Contents of a checkpoint, fp32 on the CPU, with models in training mode.

    Attributes:
        student: The student, or the encoder of a fine-tuned model.
        teacher: A whole model with the averaged weights, which shares all other tensors with the student. `None` if the
            checkpoint has no average.
        head: `weight` and `bias` of the regression head, or `None`.
        config: Configuration of the model.
        assumed: Descriptions of the settings that neither the checkpoint nor the caller specifies.
        pending_decay: Decay of the last update, if the average lacks it; `None` if it does not or if that is unknown.
    """

    student: SpeechModel
    teacher: SpeechModel | None
    head: dict[str, Tensor] | None
    config: SpeechModelConfig
    assumed: tuple[str, ...] = ()
    pending_decay: float | None = None


def load_fairseq_speech(
    path: str | os.PathLike[str],
    *,
    weights: str = "student",
    config: SpeechModelConfig | None = None,
    heads: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[SpeechModel, dict[str, Tensor] | None, SpeechModelConfig]:
    """Load the student or teacher of a checkpoint.

    Args:
        path: A `.pt` file of pre-training, or of fine-tuning with CTC, of which only the encoder is read.
        weights: "student", or "teacher" for the student with the averaged weights in place of its own.
        config: Configuration of the model. `None` takes sizes from the tensors, and rates and strides from the
            checkpoint's `cfg` or `args` or else from the published recipe.
        heads: Number of attention heads, which the tensors do not determine. `None` takes it from `cfg`, or else
            assumes heads of width 64.
        given: Values of the model's configuration by key, which override the checkpoint.

    Returns:
        The model, fp32 on the CPU, in training mode; the regression head's `weight` and `bias`, or `None`; and the
        model's configuration.

    Raises:
        ValueError: The file is not such a checkpoint, is damaged, would execute code, has no average, or has another
            architecture. `Misfit` names every missing, unknown and misshapen tensor.
    """
    check_weights(weights)
    found = speech_of(read_checkpoint(Path(path)), Path(path), config=config, settings=Settings.of(given, heads))
    return chosen(found.student, found.teacher, weights, path, AVERAGE), found.head, found.config


def read_fairseq_speech(
    path: str | os.PathLike[str], *, config: SpeechModelConfig | None = None, heads: int | None = None
) -> FairseqSpeech:
    """Read all contents of a checkpoint. For arguments and errors, see `load_fairseq_speech`."""
    path = Path(path)
    return speech_of(read_checkpoint(path), path, config=config, settings=Settings.of(None, heads))


def speech_of(
    content: Mapping[str, Any],
    path: Path,
    *,
    config: SpeechModelConfig | None = None,
    settings: Settings = NO_SETTINGS,
) -> FairseqSpeech:
    """Convert the result of `read_checkpoint`. For arguments and errors, see `load_fairseq_speech`."""
    model, average, head = _divide(content["model"], path)
    cfg = told_by(content)
    assumed: list[str] = []
    if config is None:
        config, assumed = _config_of(model, average, cfg, settings, str(path))
    layout = speech_layout(config, NAMES)
    what = f"`{path}` is no data2vec speech model of {config.depth} blocks of width {config.width}"
    named_head = {HEADS[0] + name: value for name, value in (head or {}).items()}
    require_finite([*model.items(), *(average or {}).items(), *named_head.items()], f"`{path}`")
    if head is not None:
        require_shapes(head, {"weight": [config.width, config.width], "bias": [config.width]}, HEADS[0], what)
    student = build_speech(config, layout, model, what)
    teacher = None
    if average is not None:
        expected = {n for names in layout.names.values() for n in names if n.startswith(AVERAGED)}
        positions = {n for n in expected if n.startswith(f"{AVERAGED}pos_conv.")}
        require_average(average, model, expected - positions, AVERAGED, AVERAGE, what)
        teacher = build_speech(config, layout, {**model, **average}, f"the teacher of {what}")
    pending = None if teacher is None else pending_decay(content, cfg)
    return FairseqSpeech(student, teacher, head, config, tuple(assumed), pending)


def save_fairseq_speech(
    model: Student | Mapping[str, Tensor],
    head: nn.Module | Mapping[str, Tensor] | None,
    teacher: Student | Mapping[str, Tensor] | None,
    config: SpeechConfig,
    path: str | os.PathLike[str],
    *,
    num_updates: int = 0,
) -> None:
    """Write a checkpoint with fairseq's names and shapes, which holds only fp32 tensors and plain values.

    Args:
        model: The student, or its state by name.
        head: The regression head, or its `weight` and `bias`. `None` omits it.
        teacher: The whole teacher, or its state by name. `None` omits the average.
        config: Configuration of the run.
        path: The `.pt` file, replaced atomically.
        num_updates: Number of optimizer steps of the student.

    Raises:
        ValueError: fairseq requires at least two positional convolutions, with a kernel of at least 3.
    """
    sizes = config.model
    if sizes.position_depth == 1:
        raise ValueError("`d2v.model.position_depth` must be >= 2 for fairseq, but is 1 instead.")
    if sizes.position_kernel < 3:
        raise ValueError(
            f"`d2v.model.position_kernel` must be >= 3 for fairseq, but is {sizes.position_kernel} instead."
        )
    layout = speech_layout(sizes, NAMES)
    weights: dict[str, Any] = dict(layout.all_theirs(state_of(model)))
    if head is not None:
        weights |= as_fp32(state_of(head), HEADS[0])
    if teacher is not None:
        weights[AVERAGE] = average_of(layout, state_of(teacher), AVERAGED)
    write_checkpoint(path, weights, _foreign_config(config, num_updates), num_updates)


def _divide(
    model: Mapping[Any, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Divide a checkpoint into encoder, average and head; the first two by fairseq's names in a pre-trained model."""
    refuse_others(model, "a speech model", path)
    if any(str(name).startswith(FINE_TUNED) for name in model):
        # the only other tensors are the output layer's
        log_unused([str(name) for name in model if not str(name).startswith(FINE_TUNED)], f"`{path}`")
        model = {str(n).removeprefix(FINE_TUNED): v for n, v in model.items() if str(n).startswith(FINE_TUNED)}
    nested = model.get(AVERAGE)
    average: dict[str, Tensor] | None = None
    if isinstance(nested, Mapping):
        of_all = any(str(name).startswith(AVERAGED) for name in nested)
        average = {("" if of_all else AVERAGED) + str(name): value for name, value in nested.items()}
    own = {str(name): value for name, value in model.items() if name != AVERAGE}
    require_tensors([own, average], f"`{path}` is no data2vec speech model")
    head = None
    # try the longer prefix first, because the shorter one matches it too
    for prefix in sorted(HEADS, key=len, reverse=True):
        if f"{prefix}weight" in own and f"{prefix}bias" in own:
            head = {name: own.pop(prefix + name).to(torch.float32) for name in ("weight", "bias")}
            break
    if average is not None:
        for prefix in HEADS:
            # an average of the whole model includes the head, which nothing uses
            average = {n: v for n, v in average.items() if n not in (f"{prefix}weight", f"{prefix}bias")}
    return own, average, head


def _config_of(
    model: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None,
    cfg: Mapping[str, Any],
    settings: Settings,
    path: str,
) -> tuple[SpeechModelConfig, list[str]]:
    """Return the model's configuration and descriptions of the assumed settings.

    Sizes come from the tensors, all else from `cfg` or `settings`. For a missing tensor the published size is used, so
    that the later error names the tensor.
    """

    def size(name: str, dim: int, default: int) -> int:
        value = model.get(name)
        return value.shape[dim] if value is not None and value.dim() > dim and value.shape[dim] > 0 else default

    def count(pattern: str) -> int:
        return len({found[1] for name in model if (found := re.match(pattern, name))})

    recorded, states_norms = _recipe(cfg, path)
    gathered = Gathered(recorded, settings, path)
    width = size("mask_emb", 0, size("encoder.layer_norm.weight", 0, PUBLISHED.width))
    num_layers = count(r"feature_extractor\.conv_layers\.(\d+)\.") or len(PUBLISHED.conv_kernels)
    first = "feature_extractor.conv_layers.{}.0.weight"
    kernels = tuple(
        size(first.format(index), 2, dict(enumerate(PUBLISHED.conv_kernels)).get(index, 1))
        for index in range(num_layers)
    )
    gathered.heads(width)
    fill_strides(gathered, kernels)
    if "position_in_teacher" not in gathered.values:
        where, reason = _positions(model, average)
        if reason:
            gathered.assume("position_in_teacher", where, reason)
        else:
            gathered.values["position_in_teacher"] = where
    gathered.published({"sample_rate": PUBLISHED.sample_rate}, "Hz, as published")
    gathered.published({key: getattr(PUBLISHED, key) for key in _RATES.values()}, "as published")
    sizes = {
        "conv_width": size("layer_norm.weight", 0, PUBLISHED.conv_width),
        "conv_kernels": kernels,
        "position_depth": count(r"encoder\.pos_conv\.(\d+)\.\d") or PUBLISHED.position_depth,
        "position_kernel": size("encoder.pos_conv.0.0.weight", 2, PUBLISHED.position_kernel),
        "position_groups": max(1, width // size("encoder.pos_conv.0.0.weight", 1, max(1, width // 16))),
        "width": width,
        "depth": count(r"encoder\.layers\.(\d+)\.") or PUBLISHED.depth,
        "mlp_ratio": mlp_ratio(width, size("encoder.layers.0.fc1.weight", 0, 4 * width)),
    }
    if not states_norms:
        gathered.assumed.append(POST_NORM)
    config, problems = check(SpeechModelConfig, {**sizes, **gathered.values})
    if config is None:
        raise ConfigError(problems, path)
    return config, gathered.assumed


def _positions(model: Mapping[str, Tensor], average: Mapping[str, Tensor] | None) -> tuple[str, str]:
    """Return whether the teacher averages or shares the positions, and the reason unless that is certain.

    A copy that fairseq has saved is one update old, so it differs slightly from the student's positions. The distance
    of the blocks, which are always averaged, is that of many updates, unless training has just begun.
    """
    pairs = [(value, model[name]) for name, value in (average or {}).items() if name in model]
    names = [name.startswith(f"{AVERAGED}pos_conv.") for name in (average or {}) if name in model]
    pairs = [(one.to(two.dtype), two) for one, two in pairs]
    positions = [pair for pair, is_position in zip(pairs, names, strict=True) if is_position]
    blocks = [pair for pair, is_position in zip(pairs, names, strict=True) if not is_position]
    if any(one.shape != two.shape for one, two in pairs):
        return "averaged", ""
    if all(torch.equal(one, two) for one, two in positions):
        return "shared", ""
    behind = _distance(blocks)
    ratio = _distance(positions) / behind if behind else math.inf
    where = "shared" if ratio < _COPIED else "averaged"
    return where, f"its teacher's positions are {ratio:.2g} times as far from the student's as its blocks are"


def _distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the root mean squared difference over all elements."""
    total = sum(float((one.double() - two.double()).square().sum()) for one, two in pairs)
    return math.sqrt(total / max(1, sum(one.numel() for one, _ in pairs)))


def _recipe(cfg: Mapping[str, Any], path: str) -> tuple[dict[str, Any], bool]:
    """Read the model's settings from `cfg`, and whether it states where the norms are.

    Raises:
        ValueError: `cfg` states another architecture.
    """
    # a fine-tuned model stores the pre-trained one's `cfg` here; old files store it flat
    inner = section(section(cfg, "model"), "w2v_args")
    if inner:
        cfg = inner if "model" in inner else {"model": inner, "task": inner}
    model = section(cfg, "model")
    required = {"layer_norm_first": False, "extractor_mode": "layer_norm", "conv_bias": False, "activation_fn": "gelu"}
    require_values(model, {key: value for key, value in required.items() if key in model}, {}, f"the `cfg` of {path}")
    keys = {"encoder_attention_heads": "heads", **_RATES}
    recipe = {own: model[key] for key, own in keys.items() if isinstance(model.get(key), (int, float))}
    if "sample_rate" in section(cfg, "task"):
        recipe["sample_rate"] = cfg["task"]["sample_rate"]
    layers = model.get("conv_feature_layers")
    if isinstance(layers, str):
        recipe["conv_strides"] = [stride for _, _, stride in parse_layers(layers)]
    if isinstance(model.get("ema_layers_only"), bool):
        recipe["position_in_teacher"] = "shared" if model["ema_layers_only"] else "averaged"
    return recipe, "layer_norm_first" in model


def fill_strides(gathered: Gathered, kernels: tuple[int, ...]) -> None:
    """Find the strides of the convolutions, which no tensor shows.

    Raises:
        ValueError: They are not given anywhere, and the kernels are not the published ones.
    """
    ones = [1] * len(kernels)
    if gathered.from_run("conv_strides", "conv_kernels", kernels, ones):
        return
    if kernels != PUBLISHED.conv_kernels:
        example = json.dumps(ones, separators=(",", ":"))
        raise ValueError(
            f"`d2v.model.conv_strides` must be given for `{gathered.path}`, as in "
            f"`--set d2v.model.conv_strides={example}`: its convolutions have the kernels {list(kernels)}, which are "
            "not the published ones, and it does not record their strides."
        )
    gathered.assume("conv_strides", list(PUBLISHED.conv_strides), "as published for these kernels")


def parse_layers(text: str) -> list[tuple[int, int, int]]:
    """Parse the width, kernel and stride of each convolution.

    Args:
        text: An expression such as `[(512, 10, 5)] + [(512, 3, 2)] * 4`, which fairseq evaluates as Python.

    Raises:
        ValueError: The expression has another form.
    """
    layers: list[tuple[int, int, int]] = []
    terms = [_TERM.fullmatch(term.strip()) for term in text[:1000].split("+")]
    for term in terms:
        if term is None:
            layers = []
            break
        found = [(int(width), int(kernel), int(stride)) for width, kernel, stride in _LAYER.findall(term[1])]
        layers += found * int(term[2] or 1)
    if not layers:
        must = "be of the form [(512, 10, 5)] + [(512, 3, 2)] * 4"
        raise ValueError(f"`conv_feature_layers` must {must}, but is {show(text)} instead.")
    return layers


def _foreign_config(config: SpeechConfig, num_updates: int) -> dict[str, Any]:
    """Return the parts of fairseq's configuration that are needed to build and to fine-tune the model."""
    model, mask, target, teacher = config.model, config.mask, config.target, config.teacher
    layers = zip(model.conv_kernels, model.conv_strides, strict=True)
    steps = config.schedule.steps or num_updates
    return {
        "common": {"tpu": False},
        "model": {
            "_name": "data2vec_audio",
            "extractor_mode": "layer_norm",
            "encoder_layers": model.depth,
            "encoder_embed_dim": model.width,
            "encoder_ffn_embed_dim": int(model.width * model.mlp_ratio),
            "encoder_attention_heads": model.heads,
            "activation_fn": "gelu",
            "layer_norm_first": False,
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "activation_dropout": model.activation_dropout,
            "dropout_input": model.input_dropout,
            "dropout_features": 0.0,
            "encoder_layerdrop": model.layer_drop,
            "conv_feature_layers": " + ".join(f"[({model.conv_width}, {k}, {s})]" for k, s in layers),
            "conv_bias": False,
            "conv_pos": model.position_kernel * model.position_depth,
            "conv_pos_groups": model.position_groups,
            "pos_conv_depth": model.position_depth,
            "feature_grad_mult": 1.0,
            "mask_prob": mask.prob,
            "mask_length": mask.length,
            "require_same_masks": mask.equal_counts,
            "average_top_k_layers": target.top_k,
            "layer_norm_target_layer": target.layer_norm == "layer",
            "instance_norm_target_layer": target.layer_norm == "instance",
            "batch_norm_target_layer": target.layer_norm == "batch",
            "layer_norm_targets": target.final_norm == "layer",
            "instance_norm_targets": target.final_norm == "instance",
            "loss_beta": config.loss.beta,
            "loss_scale": 1 / config.loss.divisor(model.width),
            "ema_decay": teacher.decay_start,
            "ema_end_decay": teacher.decay_end,
            "ema_anneal_end_step": teacher.decay_steps,
            "ema_transformer_only": True,
            "ema_layers_only": model.position_in_teacher == "shared",
            "max_update": steps,
        },
        "task": {"_name": "audio_pretraining", "data": "", "sample_rate": model.sample_rate, "normalize": True},
        "optimization": {"max_update": steps},
    }


def _is_own(content: Any) -> bool:
    names = [str(name) for name in section(content, "model")]
    is_version_2 = any("modality_encoders." in name for name in names)
    return not is_version_2 and any(name.startswith(("feature_extractor.", "w2v_encoder.")) for name in names)


def _read(content: Mapping[str, Any], path: Path, settings: Settings) -> FairseqSpeech:
    return speech_of(content, path, settings=settings)


FORMAT = Published("fairseq", ".pt", "fairseq", AVERAGE, is_own=_is_own, read=_read, write=save_fairseq_speech)
