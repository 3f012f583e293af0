"""Text checkpoints of fairseq's data2vec (version 1), in both directions, without importing fairseq.

`model` in a checkpoint holds the student under `encoder.sentence_encoder`, its head of two layers under
`encoder.regression_head`, and the teacher's fp32 average under `encoder._ema`, with names relative to
`sentence_encoder`. The average usually includes copies of the student's embeddings; whatever it holds replaces the
student's tensor in the teacher. The released checkpoint has an `encoder.lm_head` instead of the regression head, which
the public code no longer builds and this project ignores.

Row `i` of the token table is the token of id `i` in both libraries, so no rows are reordered. fairseq takes ids from
its dictionary: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the lines of its `dict.txt`, and `<mask>` last. RoBERTa's
`dict.txt` (50,260 lines) and Hugging Face's `tokenizer.json` of RoBERTa agree, and the released checkpoint was trained
with them. With any other dictionary, the tokenizer must number its tokens in the order of the lines. For a tokenizer
trained here, write a `dict.txt` with its tokens from id 4 to the last but one, in order. A tokenizer whose padding
token is not 1, such as BERT's, cannot have a fairseq dictionary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.config import ConfigError, TextConfig, TextModelConfig
from d2v_fast.config.errors import check
from d2v_fast.config.file import section
from d2v_fast.errors import OptionError
from d2v_fast.files.reading import printable
from d2v_fast.interop.fairseq_files import (
    TEXT_PREFIX,
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
from d2v_fast.interop.layout import Misfit, log_unused
from d2v_fast.modalities.text.config import POSITION_OFFSET, DocumentsConfig
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.huggingface import build_text
from d2v_fast.modalities.text.layout import TextNames, text_layout
from d2v_fast.models.student import Student
from d2v_fast.models.weights import require_finite

NAMES = TextNames(
    token=f"{TEXT_PREFIX}embed_tokens.weight",
    position=f"{TEXT_PREFIX}embed_positions.weight",
    norm=f"{TEXT_PREFIX}layernorm_embedding",
    block=f"{TEXT_PREFIX}layers.{{}}",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    fc1="fc1",
    fc2="fc2",
    mlp_norm="final_layer_norm",
)
AVERAGE = "encoder._ema"
HEAD = "encoder.regression_head."
# a buffer of fairseq's Transformer that encodes where its norms are
VERSION, VERSION_VALUE = "version", 3.0
# heads of the released checkpoint and of fine-tuned models
IGNORED = ("encoder.lm_head.", "classification_heads.")
# fairseq has no option for it
NORM_EPS = 1e-5

# ids of <s>, <pad>, </s> and <unk> in every fairseq dictionary
SPECIAL_IDS = (0, 1, 2, 3)

PUBLISHED = TextModelConfig()
# fairseq's and our names of the dropout rates
_RATES = (
    ("dropout", "dropout"),
    ("attention_dropout", "attention_dropout"),
    ("activation_dropout", "activation_dropout"),
    ("layerdrop", "layer_drop"),
)


class FairseqText(NamedTuple):
    """The content of a checkpoint: fp32 tensors on the CPU, models in training mode.

    Attributes:
        student: The student, or the encoder of a fine-tuned model.
        teacher: A whole encoder with the tensors of the average. It shares the memory of the student's tensors that
            the average lacks. None if the checkpoint has no average.
        head: `0.weight`, `0.bias`, `2.weight` and `2.bias` of the regression head; None if there is none.
        config: The model's configuration.
        assumed: One text per configuration value that neither the checkpoint nor the caller gave.
        pending_decay: Decay of the EMA update that the average still lacks; None if it lacks none or that is unknown.
    """

    student: TextModel
    teacher: TextModel | None
    head: dict[str, Tensor] | None
    config: TextModelConfig
    assumed: tuple[str, ...] = ()
    pending_decay: float | None = None


def load_fairseq_text(
    path: str | os.PathLike[str],
    *,
    weights: str = "student",
    config: TextModelConfig | None = None,
    heads: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[TextModel, dict[str, Tensor] | None, TextModelConfig]:
    """Load the student or the teacher of a checkpoint.

    Args:
        path: A `.pt` file of pre-training, or of fine-tuning for classification, of which only the encoder is read.
        weights: "student", or "teacher" for the average.
        config: The model's configuration. None takes sizes from the tensors and rates from the checkpoint's `cfg` or
            `args`, or the published rates if it has neither.
        heads: Number of attention heads, which no tensor shows. None takes it from `cfg`, or assumes heads of width 64.
        given: Values of the model's configuration by key, which override the checkpoint's.
    Returns:
        The model, fp32 on the CPU, in training mode; the regression head's tensors, or None; and the model's
        configuration.
    Raises:
        ValueError: The file is not such a checkpoint, is damaged, would execute code, has no average, or is of another
            architecture. `Misfit` names every missing, unknown and misshapen tensor.
    """
    check_weights(weights)
    found = text_of(read_checkpoint(Path(path)), Path(path), config=config, settings=Settings.of(given, heads))
    return chosen(found.student, found.teacher, weights, path, AVERAGE), found.head, found.config


def read_fairseq_text(
    path: str | os.PathLike[str], *, config: TextModelConfig | None = None, heads: int | None = None
) -> FairseqText:
    """Load student, teacher and head of a checkpoint, with the arguments and errors of `load_fairseq_text`."""
    path = Path(path)
    return text_of(read_checkpoint(path), path, config=config, settings=Settings.of(None, heads))


def text_of(
    content: Mapping[str, Any],
    path: Path,
    *,
    config: TextModelConfig | None = None,
    settings: Settings = NO_SETTINGS,
) -> FairseqText:
    """Build student, teacher and head from what `read_checkpoint` returned; errors as of `load_fairseq_text`."""
    model, average, head = _divide(content["model"], path)
    cfg = told_by(content)
    assumed: list[str] = []
    if config is None:
        config, assumed = _config_of(model, cfg, settings, str(path))
    layout = text_layout(config, NAMES)
    what = f"`{path}` is no data2vec text model of {config.depth} blocks of width {config.width}"
    named_head = {HEAD + name: value for name, value in (head or {}).items()}
    require_finite([*model.items(), *(average or {}).items(), *named_head.items()], f"`{path}`")
    if head is not None:
        _check_head(head, config.width, what)
    student = build_text(config, layout, model, what, _is_ignored)
    teacher = None
    if average is not None:
        blocks = {n for names in layout.names.values() for n in names if n.startswith(f"{TEXT_PREFIX}layers.")}
        require_average(average, model, blocks, TEXT_PREFIX, AVERAGE, what)
        teacher = build_text(config, layout, {**model, **average}, f"the teacher of {what}", _is_ignored)
    pending = None if teacher is None else pending_decay(content, cfg)
    return FairseqText(student, teacher, head, config, tuple(assumed), pending)


def save_fairseq_text(
    model: Student | Mapping[str, Tensor],
    head: nn.Module | Mapping[str, Tensor] | None,
    teacher: Student | Mapping[str, Tensor] | None,
    config: TextConfig,
    path: str | os.PathLike[str],
    *,
    num_updates: int = 0,
) -> None:
    """Write a checkpoint with fairseq's names and shapes: fp32 tensors and plain values, no code.

    Args:
        model: The student, or its state by name.
        head: The regression head, or its tensors by name; None omits it.
        teacher: The whole teacher, or its state by name; None omits the average.
        config: The run's configuration.
        path: The `.pt` file, replaced atomically.
        num_updates: Optimizer steps of the student.
    Raises:
        ValueError: `norm_eps` or the padding id differs from fairseq's fixed value.
    """
    sizes = config.model
    if sizes.padding_row != SPECIAL_IDS[1]:
        raise ValueError(
            f"`d2v.model.padding_id` must be {SPECIAL_IDS[1]} for fairseq, as in all its dictionaries, but is "
            f"{sizes.padding_row} instead. Export with `--format transformers`."
        )
    if sizes.norm_eps != NORM_EPS:
        raise ValueError(f"`d2v.model.norm_eps` must be {NORM_EPS} for fairseq, but is {sizes.norm_eps} instead.")
    layout = text_layout(sizes, NAMES)
    weights: dict[str, Any] = dict(layout.all_theirs(state_of(model)))
    weights[TEXT_PREFIX + VERSION] = torch.tensor([VERSION_VALUE])
    if head is not None:
        weights |= as_fp32(state_of(head), HEAD)
    if teacher is not None:
        average = average_of(layout, state_of(teacher), TEXT_PREFIX)
        weights[AVERAGE] = average | {VERSION: torch.tensor([VERSION_VALUE])}
    write_checkpoint(path, weights, _foreign_config(config, num_updates), num_updates)


def _divide(
    model: Mapping[Any, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Return encoder and average by fairseq's full names, and the head by names relative to it."""
    refuse_others(model, "a text model", path)
    nested = model.get(AVERAGE)
    average: dict[str, Tensor] | None = None
    if isinstance(nested, Mapping):
        average = {TEXT_PREFIX + str(name): value for name, value in nested.items() if name != VERSION}
    own = {str(name): value for name, value in model.items() if name != AVERAGE}
    require_tensors([own, average], f"`{path}` is no data2vec text model")
    log_unused([name for name in own if name.startswith(IGNORED)], f"`{path}`")
    named = [name for name in own if name.startswith(HEAD)]
    head = {name.removeprefix(HEAD): own.pop(name).to(torch.float32) for name in named}
    return own, average, head or None


def _check_head(head: Mapping[str, Tensor], width: int, what: str) -> None:
    """Raise Misfit unless the head has the two published layers."""
    shapes = {
        "0.weight": [2 * width, width],
        "0.bias": [2 * width],
        "2.weight": [width, 2 * width],
        "2.bias": [width],
    }
    problems = [f"`{HEAD}{name}` is missing" for name in shapes if name not in head]
    problems += [f"`{HEAD}{printable(name)}` has no place in a head of 2 layers" for name in head if name not in shapes]
    if problems:
        raise Misfit(what, problems)
    require_shapes(head, shapes, HEAD, what)


def _is_ignored(name: str) -> bool:
    return name.startswith(IGNORED) or name == TEXT_PREFIX + VERSION


def _config_of(
    model: Mapping[str, Tensor], cfg: Mapping[str, Any], settings: Settings, path: str
) -> tuple[TextModelConfig, list[str]]:
    """Return the model's configuration, and a text for each assumed value.

    Sizes come from the tensors, other values from `cfg` or `settings`. A missing tensor gets its published size, so
    that the later error names the tensor rather than a wrong size.
    """

    def size(name: str, dim: int, default: int) -> int:
        value = model.get(name)
        return value.shape[dim] if value is not None and value.dim() > dim and value.shape[dim] > 0 else default

    recipe, names_norms = _recipe(cfg, path)
    gathered = Gathered(recipe, settings, path)
    width = size(NAMES.token, 1, size(f"{NAMES.norm}.weight", 0, PUBLISHED.width))
    layers = {found[1] for name in model if (found := re.match(re.escape(TEXT_PREFIX) + r"layers\.(\d+)\.", name))}
    gathered.heads(width)
    gathered.published({own: getattr(PUBLISHED, own) for _, own in _RATES}, "as published")
    sizes = {
        "vocab_size": size(NAMES.token, 0, PUBLISHED.token_rows),
        "padding_id": SPECIAL_IDS[1],
        "max_positions": size(NAMES.position, 0, PUBLISHED.position_rows) - POSITION_OFFSET,
        "width": width,
        "depth": len(layers) or PUBLISHED.depth,
        "mlp_ratio": mlp_ratio(width, size(f"{NAMES.block.format(0)}.fc1.weight", 0, 4 * width)),
        "norm_eps": NORM_EPS,
    }
    if not names_norms:
        gathered.assumed.append(POST_NORM)
    config, problems = check(TextModelConfig, {**sizes, **gathered.values})
    if config is None:
        raise ConfigError(problems, path)
    return config, gathered.assumed


def _recipe(cfg: Mapping[str, Any], path: str) -> tuple[dict[str, Any], bool]:
    """Return the model values that `cfg` gives (none if it is empty), and whether it says where the norms are.

    Raises:
        ValueError: `cfg` describes another architecture.
    """
    # old files have one flat section, in which the encoder's keys start with `encoder_`
    flat = section(cfg, "model")
    transformer = {**flat, **section(flat, "transformer")}
    named = {key.removeprefix("encoder_"): value for key, value in flat.items() if key.startswith("encoder_")}
    encoder = {**named, **section(transformer, "encoder")}
    where = f"the `cfg` of {path}"
    for part, required in (
        (transformer, {"activation_fn": "gelu", "layernorm_embedding": True, "no_scale_embedding": True}),
        (encoder, {"normalize_before": False, "learned_pos": True}),
    ):
        require_values(part, {key: value for key, value in required.items() if key in part}, {}, where)
    both = {**transformer, **encoder}
    keys = (*_RATES, ("attention_heads", "heads"))
    recipe = {own: both[key] for key, own in keys if isinstance(both.get(key), (int, float))}
    return recipe, "normalize_before" in encoder


def _foreign_config(config: TextConfig, num_updates: int) -> dict[str, Any]:
    """Return the parts of fairseq's configuration that rebuilding and fine-tuning the model read."""
    model, mask, target, teacher = config.model, config.mask, config.target, config.teacher
    steps = config.schedule.steps or num_updates
    return {
        "common": {"tpu": False},
        "model": {
            "_name": "data2vec_text",
            "max_positions": model.max_positions,
            "head_layers": 2,
            "load_checkpoint_heads": False,
            "transformer": {
                "dropout": model.dropout,
                "attention_dropout": model.attention_dropout,
                "activation_dropout": model.activation_dropout,
                "activation_fn": "gelu",
                "layernorm_embedding": True,
                "no_scale_embedding": True,
                "max_source_positions": model.max_positions,
                "encoder": {
                    "embed_dim": model.width,
                    "ffn_embed_dim": int(model.width * model.mlp_ratio),
                    "layers": model.depth,
                    "attention_heads": model.heads,
                    "normalize_before": False,
                    "learned_pos": True,
                    "layerdrop": model.layer_drop,
                },
            },
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
            "ema_transformer_layers_only": True,
        },
        "task": {
            "_name": "masked_lm",
            "data": "",
            "tokens_per_sample": model.max_positions,
            "include_target_tokens": True,
            "mask_prob": mask.prob,
            "mask_multiple_length": mask.length,
            "leave_unmasked_prob": mask.keep_prob,
            "random_token_prob": mask.random_prob,
        },
        "optimization": {"max_update": steps},
    }


def _is_own(content: Any) -> bool:
    return any(str(name).startswith(TEXT_PREFIX) for name in section(content, "model"))


def _read(content: Mapping[str, Any], path: Path, settings: Settings) -> FairseqText:
    return text_of(content, path, settings=settings)


def check_ids(config: DocumentsConfig) -> None:
    """Raise OptionError if the run's tokenizer is readable and its special ids differ from fairseq's."""
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    if config.data.tokenizer is None:
        return
    try:
        found = load_tokenizer(config.data.tokenizer).specials[:4]
    except ValueError:
        # the export holds no tokenizer, so a missing one is fine; `save_fairseq_text` checks the padding id
        return
    if any(own not in (None, theirs) for own, theirs in zip(found, SPECIAL_IDS, strict=True)):
        raise OptionError(
            "`--format` must be transformers for this tokenizer: fairseq numbers begin, padding, end and unknown token "
            f"{SPECIAL_IDS} in every dictionary, but in '{config.data.tokenizer}' their ids are {tuple(found)}."
        )


FORMAT = Published(
    "fairseq", ".pt", "fairseq", AVERAGE, is_own=_is_own, read=_read, write=save_fairseq_text, check=check_ids
)
