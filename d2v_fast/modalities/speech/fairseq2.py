"""Read and write speech checkpoints of fairseq's data2vec 2.0, without importing fairseq."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from d2v_fast.config import MaskedSpeechConfig, MaskedSpeechModelConfig
from d2v_fast.errors import OptionError
from d2v_fast.interop.fairseq_multi import Kind, Parts, count, dimension
from d2v_fast.interop.fairseq_multi_model import MultiModel
from d2v_fast.interop.fairseq_recipe import Gathered
from d2v_fast.modalities.speech.encoder2 import MaskedSpeechModel
from d2v_fast.modalities.speech.fairseq import fill_strides, parse_layers
from d2v_fast.modalities.speech.layout2 import FRONT, masked_speech_layout

PUBLISHED = MaskedSpeechModelConfig()

KIND = Kind(
    name="AUDIO",
    wanted="a data2vec 2.0 speech model",
    fine_tuned="w2v_encoder.w2v_model.",
    arguments="w2v_args",
    encoder={
        "num_extra_tokens": 0,
        "use_alibi_encoder": True,
        "learned_alibi_scale": True,
        "learned_alibi_scale_per_head": True,
        "extractor_mode": "layer_norm",
        "conv_pos_pre_ln": False,
    },
    step={"ema_local_encoder": False},
    model_step={"ema_encoder_only": False, "cls_loss": 0.0},
    known=frozenset({"feature_encoder_spec", "conv_pos_width", "conv_pos_groups", "conv_pos_depth"}),
)


def _values(parts: Parts, own: Mapping[str, Any], task: Mapping[str, Any], gathered: Gathered) -> dict[str, Any]:
    """Return the sizes of the convolutions: the strides from `cfg`, all else from the tensors."""
    encoder, convolution = parts.encoder, f"{FRONT}local_encoder.conv_layers."
    num_layers = count(encoder, re.escape(convolution) + r"(\d+)\.") or len(PUBLISHED.conv_kernels)
    published = dict(enumerate(PUBLISHED.conv_kernels))
    kernels = tuple(
        dimension(encoder, f"{convolution}{index}.0.weight", 2, published.get(index, 1)) for index in range(num_layers)
    )
    spec = own.get("feature_encoder_spec")
    if isinstance(spec, str):
        gathered.values.setdefault("conv_strides", [stride for _, _, stride in parse_layers(spec)])
    fill_strides(gathered, kernels)
    if isinstance(task.get("sample_rate"), int):
        gathered.values.setdefault("sample_rate", task["sample_rate"])
    gathered.published({"sample_rate": PUBLISHED.sample_rate}, "Hz, as published")
    positions = f"{FRONT}relative_positional_encoder."
    first, width = f"{positions}1.0.weight", dimension(encoder, "blocks.0.norm1.weight", 0)
    return {
        "conv_width": dimension(encoder, f"{FRONT}project_features.1.weight", 0),
        "conv_kernels": kernels,
        "position_depth": count(encoder, re.escape(positions) + r"(\d+)\.0\.") or 1,
        "position_kernel": dimension(encoder, first, 2),
        "position_groups": max(1, width // dimension(encoder, first, 1)),
    }


def _own(config: MaskedSpeechConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of `modalities.audio` that only recordings have, and the section `task`."""
    model, mask = config.model, config.mask
    layers = zip(model.conv_kernels, model.conv_strides, strict=True)
    own = {
        "mask_prob_adjust": mask.prob_adjust,
        "mask_length": mask.length,
        "inverse_mask": mask.inverse,
        "feature_encoder_spec": " + ".join(f"[({model.conv_width}, {k}, {s})]" for k, s in layers),
        "conv_pos_width": model.position_kernel * model.position_depth,
        "conv_pos_groups": model.position_groups,
        "conv_pos_depth": model.position_depth,
    }
    task = {"_name": "audio_pretraining", "data": "", "sample_rate": model.sample_rate, "normalize": True}
    # as fairseq fills it in, for masks that its workers draw
    masks = {
        "feature_encoder_spec": own["feature_encoder_spec"],
        "mask_prob": mask.prob,
        "mask_prob_adjust": mask.prob_adjust,
        "mask_length": mask.length,
        "inverse_mask": mask.inverse,
        "mask_dropout": 0.0,
        "clone_batch": mask.num_masks,
        "expand_adjacent": False,
        "non_overlapping": False,
    }
    return own, {**task, "rebuild_batches": True, "precompute_mask_config": masks}


def _sections(own: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the section `mask` of a run's configuration needs besides the shared keys."""
    keys = {"mask_length": "length", "mask_prob_adjust": "prob_adjust", "inverse_mask": "inverse"}
    return {"mask": {mine: own.get(theirs) for theirs, mine in keys.items()}}


def _check(config: MaskedSpeechConfig) -> None:
    """Refuse positional convolutions whose kernels fairseq would make larger."""
    if config.model.position_kernel < 3:
        raise OptionError(
            f"`d2v.model.position_kernel` must be >= 3 for fairseq, but is {config.model.position_kernel} instead."
        )


MODEL = MultiModel(
    kind=KIND,
    config=MaskedSpeechModelConfig,
    encoder=lambda: MaskedSpeechModel,
    values=_values,
    layout=masked_speech_layout,
    own=_own,
    sections=_sections,
    check=_check,
)
FORMAT = MODEL.format()
