"""fairseq's checkpoints of data2vec 2.0, whose model is called `data2vec_multi`: what all modalities share.

The entry `model` of a checkpoint holds the student with its decoder, and the teacher's fp32 average as `_ema`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from d2v_fast.config.errors import show
from d2v_fast.config.file import section
from d2v_fast.interop.fairseq_files import require_tensors
from d2v_fast.interop.fairseq_recipe import Gathered, Settings
from d2v_fast.interop.folders import mlp_ratio
from d2v_fast.interop.layout import log_unused

AVERAGE = "_ema"
BLOCKS = "blocks."
_ENCODERS = "modality_encoders."

# keys of `cfg.model` and of a modality's section -> the only value with which the encoder is the one built here
_ENCODER = {"_name": "data2vec_multi", "norm_affine": True, "layer_norm_first": False, "shared_decoder": None}
_MODALITY_ENCODER = {
    "learned_alibi": False,
    "alibi_max_pos": None,
    "learned_alibi_scale_per_layer": False,
}
# and the only value with which a step is the one computed here
_STEP = {
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "dropout_input": 0.0,
    "end_of_block_targets": False,
    "skip_ema": False,
    "recon_loss": 0.0,
    "d2v_loss": 1.0,
}
_MODALITY_STEP = {
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "mask_prob_min": None,
    "keep_masked_pct": 0.0,
    "add_masks": False,
    "remove_masks": False,
    "mask_dropout": 0.0,
    "encoder_zero_mask": True,
    "mask_channel_prob": 0.0,
    "local_grad_mult": 1.0,
}
_DECODER_STEP = {"add_positions_masked": False, "add_positions_all": False}
# read elsewhere, or without effect on a step: initialization, logging, stopping, groups of the optimizer
_MODEL_KEYS = {
    *("loss_beta", "loss_scale", "depth", "num_heads", "norm_eps", "encoder_dropout", "post_mlp_drop", "layerdrop"),
    *("attention_dropout", "activation_dropout", "embed_dim", "mlp_ratio", "average_top_k_layers", "clone_batch"),
    *("layer_norm_target_layer", "batch_norm_target_layer", "instance_norm_target_layer", "instance_norm_targets"),
    *("layer_norm_targets", "ema_decay", "ema_same_dtype", "log_norms", "ema_end_decay", "ema_anneal_end_step"),
    *("ema_encoder_only", "max_update", "modalities", "min_target_var", "min_pred_var", "supported_modality"),
    *("mae_init", "seed", "cls_loss", "decoder_group"),
}
_MODALITY_KEYS = {
    *("type", "prenet_depth", "prenet_layerdrop", "prenet_dropout", "num_extra_tokens", "init_extra_token_zero"),
    *("mask_noise_std", "mask_prob", "inverse_mask", "mask_prob_adjust", "mask_length", "mask_channel_length"),
    *("ema_local_encoder", "use_alibi_encoder", "alibi_scale", "learned_alibi_scale", "learned_alibi_scale_per_head"),
    *("num_alibi_heads", "model_depth", "decoder"),
}
_DECODER_KEYS = {
    *("decoder_dim", "decoder_groups", "decoder_kernel", "decoder_layers", "input_dropout", "decoder_residual"),
    *("projection_layers", "projection_ratio"),
}
# names that old files hold and that the reference drops
_DROPPED = re.compile(r"modality_encoders\.(?:AUDIO|IMAGE)\.(?:encoder_mask|alibi_bias)$|target_proj\.|mask_emb$")


@dataclass(frozen=True)
class Kind:
    """One modality in the reference.

    Attributes:
        name: As in the names of tensors.
        wanted: What a file must hold, in words.
        fine_tuned: Prefix of the encoder's names in a fine-tuned model.
        arguments: Key in `cfg.model` of a fine-tuned model below which it keeps the pre-training configuration.
        encoder: Keys of the modality's section -> the only value with which the encoder is the one built here.
        step: The same for a training step.
        model_step: The same for `cfg.model`.
        known: Other keys of the modality's section that are read, or without effect.
        averages_blocks_only: Whether the average holds the main blocks only, by names that begin with their number.
    """

    name: str
    wanted: str
    fine_tuned: str
    arguments: str
    encoder: Mapping[str, Any]
    step: Mapping[str, Any]
    model_step: Mapping[str, Any]
    known: frozenset[str] = frozenset()
    averages_blocks_only: bool = False

    @property
    def section(self) -> str:
        """Key of the modality's section in `cfg.model.modalities`."""
        return self.name.lower()

    @property
    def prefix(self) -> str:
        """Prefix of the names of everything before the main blocks."""
        return f"{_ENCODERS}{self.name}."


class Parts(NamedTuple):
    """The tensors of a checkpoint by the reference's names in a pre-trained model.

    Attributes:
        encoder: Of the student, without decoder.
        decoder: Of the decoder; empty if the checkpoint holds none.
        average: Of the teacher; None if the checkpoint holds none.
    """

    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    average: dict[str, Tensor] | None


def is_multi(content: Any, kind: Kind) -> bool:
    """Return whether what a pickle holds is a 2.0 model of this modality, pre-trained or fine-tuned."""
    starts = kind.prefix, kind.fine_tuned + kind.prefix
    return any(str(name).startswith(starts) for name in section(content, "model"))


def divide(model: Mapping[Any, Any], kind: Kind, path: Path) -> Parts:
    """Divide the entry `model` of a checkpoint.

    Raises:
        Misfit: A value is no tensor.
        ValueError: It holds encoders of several modalities.
    """
    named = {str(name): value for name, value in model.items()}
    nested = named.pop(AVERAGE, None)
    if any(name.startswith(kind.fine_tuned + kind.prefix) for name in named):
        log_unused([name for name in named if not name.startswith(kind.fine_tuned)], f"`{path}`")
        named = {n.removeprefix(kind.fine_tuned): value for n, value in named.items() if n.startswith(kind.fine_tuned)}
    others = {name.split(".")[1] for name in named if name.startswith(_ENCODERS)} - {kind.name}
    if others:
        raise ValueError(f"`{path}` must hold {kind.wanted} alone, but also holds {', '.join(sorted(others))}.")
    average = None
    if isinstance(nested, Mapping):
        front = BLOCKS if kind.averages_blocks_only else ""
        average = {
            name if name.startswith(front) else front + name: value
            for name, value in ((str(name), value) for name, value in nested.items())
            if not _DROPPED.match(name)
        }
    named = {name: value for name, value in named.items() if not _DROPPED.match(name)}
    require_tensors([named, average], f"`{path}` is not {kind.wanted}")
    for part in filter(None, (named, average)):
        scale = part.get(f"{kind.prefix}alibi_scale")
        if scale is not None and scale.dim() == 4:
            # of files that are older than one scale per layer
            part[f"{kind.prefix}alibi_scale"] = scale[None]
    decoder = f"{kind.prefix}decoder."
    return Parts(
        {name: value for name, value in named.items() if not name.startswith(decoder)},
        {name: value for name, value in named.items() if name.startswith(decoder)},
        average,
    )


def pretraining(cfg: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the `cfg` of the pre-training, which a fine-tuned model keeps within its own; empty if it is unknown."""
    inner = section(section(cfg, "model"), kind.arguments)
    if not inner:
        return dict(cfg)
    return inner if "model" in inner else {"model": inner, "task": inner}


def check_encoder(model: Mapping[str, Any], kind: Kind, path: str) -> None:
    """Refuse a configuration whose encoder is another one than that of this library.

    Raises:
        ValueError: A value is not supported; the message names the key and both values.
    """
    where = f"the `cfg` of {path}"
    own = section(section(model, "modalities"), kind.section)
    _require(model, _ENCODER, where)
    _require(own, {**_MODALITY_ENCODER, **kind.encoder}, f"`modalities.{kind.section}` in {where}")


def encoder_values(parts: Parts, kind: Kind, gathered: Gathered, published_width: int) -> dict[str, Any]:
    """Return the keys of `d2v.model` that all modalities have: sizes from the tensors, all else from `cfg`.

    Args:
        parts: From `divide`. For a missing tensor another size is used, so that the later error names the tensor.
        kind: The modality.
        gathered: From `begin`; the heads are found here.
        published_width: The width where the first block is missing.
    """
    encoder = parts.encoder
    width = dimension(encoder, "blocks.0.norm1.weight", 0, published_width)
    scale = encoder.get(f"{kind.prefix}alibi_scale")
    if scale is not None and scale.dim() == 5:
        gathered.values["heads"] = scale.shape[2]
    gathered.heads(width)
    return {
        **gathered.values,
        "width": width,
        "context_depth": count(encoder, re.escape(f"{kind.prefix}context_encoder.blocks.") + r"(\d+)\."),
        "depth": max(1, count(encoder, r"blocks\.(\d+)\.")),
        "mlp_ratio": mlp_ratio(width, dimension(encoder, "blocks.0.mlp.fc1.weight", 0, 4 * width)),
        "decoder": {**_decoder_values(parts.decoder, width, kind), **gathered.values.get("decoder", {})},
    }


def begin(model: Mapping[str, Any], kind: Kind, settings: Settings, path: str) -> Gathered:
    """Begin a model's configuration with the values in `cfg` that no tensor shows.

    Raises:
        ValueError: Both dropouts of a block's branches differ, which this encoder's cannot.
    """
    own = section(section(model, "modalities"), kind.section)
    names = {
        "num_heads": "heads",
        "norm_eps": "norm_eps",
        "encoder_dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "activation_dropout": "activation_dropout",
        "layerdrop": "layer_drop",
    }
    if "encoder_dropout" in model:
        same = {"post_mlp_drop": model["encoder_dropout"]}
        _require(model, same, f"the `cfg` of {path} (`encoder_dropout` is the same rate here)")
    told = {mine: model[theirs] for theirs, mine in names.items() if _is_number(model.get(theirs))}
    for theirs, mine in (("prenet_dropout", "context_dropout"), ("prenet_layerdrop", "context_layer_drop")):
        if _is_number(own.get(theirs)):
            told[mine] = own[theirs]
    inside = section(own, "decoder")
    keys = {
        "decoder_dim": "width",
        "decoder_layers": "depth",
        "decoder_kernel": "kernel",
        "decoder_groups": "groups",
        "decoder_residual": "residual",
        "projection_layers": "projection",
        "projection_ratio": "projection_ratio",
        "input_dropout": "dropout",
    }
    decoder = {mine: inside[key] for key, mine in keys.items() if inside.get(key) is not None}
    if _is_number(own.get("mask_noise_std")):
        decoder["noise_std"] = own["mask_noise_std"]
    run, given = settings.run.get("decoder", {}), settings.given.get("decoder", {})
    merged = {**run, **decoder, **given}
    settings = settings._replace(given={key: one for key, one in settings.given.items() if key != "decoder"})
    gathered = Gathered(told, settings, path)
    gathered.values["decoder"] = merged
    return gathered


def _decoder_values(decoder: Mapping[str, Tensor], width: int, kind: Kind) -> dict[str, Any]:
    """Return the decoder's sizes as its tensors show them; nothing without tensors."""
    front = f"{kind.prefix}decoder."
    first = decoder.get(f"{front}blocks.0.0.weight")
    if first is None or first.dim() < 3:
        return {}
    channels = first.shape[0]
    values: dict[str, Any] = {
        "width": channels,
        "depth": count(decoder, re.escape(f"{front}blocks.") + r"(\d+)\."),
        "kernel": first.shape[-1],
        "groups": max(1, width // max(1, first.shape[1])),
        "projection": 2 if f"{front}proj.0.weight" in decoder else 1,
    }
    if values["projection"] == 2:
        values["projection_ratio"] = mlp_ratio(channels, dimension(decoder, f"{front}proj.0.weight", 0))
    return values


def step_sections(model: Mapping[str, Any], kind: Kind, path: str) -> dict[str, Any]:
    """Return the sections `target`, `loss` and `teacher` of `"d2v"`, and the keys of `mask` that all modalities have.

    Args:
        model: `cfg.model` of a pre-training.
        kind: The modality.
        path: Where the configuration is from, for messages.
    Raises:
        ValueError: A value is unknown or not supported; the message names the key.
    """
    where = f"the `cfg` of {path}"
    own = section(section(model, "modalities"), kind.section)
    inside = f"`modalities.{kind.section}` in {where}"
    if not own:
        raise ValueError(f"{where} must hold a section `modalities.{kind.section}`, but does not.")
    decoder = section(own, "decoder")
    _require(model, {**_STEP, **kind.model_step}, where)
    _require(own, {**_MODALITY_STEP, **kind.step}, inside)
    _require(decoder, _DECODER_STEP, f"`decoder` of {inside}")
    _refuse_unknown(model, {*_ENCODER, *_STEP, *kind.model_step, *_MODEL_KEYS}, where)
    known = {*_MODALITY_ENCODER, *_MODALITY_STEP, *_MODALITY_KEYS, *kind.encoder, *kind.step, *kind.known}
    _refuse_unknown(own, known, inside)
    _refuse_unknown(decoder, {*_DECODER_STEP, *_DECODER_KEYS}, f"`decoder` of {inside}")
    return {
        "target": {
            "top_k": model.get("average_top_k_layers"),
            "layer_norm": _norm(model, ("layer", "instance", "batch"), "{}_norm_target_layer", where),
            "final_norm": _norm(model, ("layer", "instance"), "{}_norm_targets", where),
        },
        "loss": {"beta": model.get("loss_beta", 0.0), **_reduction(model, where)},
        "teacher": {
            "decay_start": model.get("ema_decay"),
            "decay_end": model.get("ema_end_decay"),
            "decay_steps": model.get("ema_anneal_end_step"),
        },
        "mask": {"num_masks": model.get("clone_batch"), "prob": own.get("mask_prob")},
    }


def _norm(model: Mapping[str, Any], names: Iterable[str], key: str, where: str) -> str:
    chosen = [name for name in names if model.get(key.format(name))]
    if len(chosen) > 1:
        both = " and ".join(f"`{key.format(name)}`" for name in chosen)
        raise ValueError(f"{where} must set one norm of the target, but sets {both}.")
    return chosen[0] if chosen else "none"


def _reduction(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys of `d2v.loss` for `loss_scale`, null being one over the root of the width."""
    scale, width = model.get("loss_scale"), model.get("embed_dim")
    if scale is None:
        return {"channel_reduction": "rsqrt"}
    if not _is_number(scale) or not 0 < scale < math.inf:
        raise ValueError(f"`loss_scale` in {where} must be null or a number > 0, but is {show(scale)} instead.")
    named = {"sum": 1.0, **({"mean": 1 / width, "rsqrt": width**-0.5} if isinstance(width, int) and width else {})}
    for name, value in named.items():
        if math.isclose(scale, value, rel_tol=1e-9):
            return {"channel_reduction": name}
    return {"channel_reduction": "sum", "scale": scale}


def _require(raw: Mapping[str, Any], required: Mapping[str, Any], where: str) -> None:
    """Refuse values other than the required ones; a key that is missing has a fitting value."""
    for key, value in required.items():
        found = raw.get(key, value)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            raise ValueError(f"`{key}` in {where} must be {show(value)}, but is {show(found)} instead.")


def _refuse_unknown(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse keys that nothing reads here, unless they are off."""
    unknown = [key for key in raw if key not in known and raw[key] not in (None, False, 0, "")]
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` in {where} is not known here, and so must be off, but is {show(raw[unknown[0]])} instead."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def dimension(tensors: Mapping[str, Tensor], name: str, dim: int, default: int = 1) -> int:
    """Return the size of a tensor along a dimension; `default` if there is none."""
    value = tensors.get(name)
    return value.shape[dim] if value is not None and value.dim() > dim and value.shape[dim] > 0 else default


def count(tensors: Iterable[str], pattern: str) -> int:
    """Return how many different numbers the first group of a pattern matches at the beginning of the names."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
