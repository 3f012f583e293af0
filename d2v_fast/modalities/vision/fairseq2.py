"""Read and write image checkpoints of fairseq's data2vec 2.0, without importing fairseq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from d2v_fast.config import MaskedVisionConfig, MaskedVisionModelConfig
from d2v_fast.interop.fairseq_multi import Kind, Parts, dimension
from d2v_fast.interop.fairseq_multi_model import MultiModel
from d2v_fast.interop.fairseq_recipe import Gathered
from d2v_fast.modalities.vision.encoder2 import MaskedVisionModel
from d2v_fast.modalities.vision.layout2 import FRONT, POSITIONS, fixed_positions, masked_vision_layout

KIND = Kind(
    name="IMAGE",
    wanted="a data2vec 2.0 image model",
    fine_tuned="model.",
    arguments="pretrained_model_args",
    encoder={
        "num_extra_tokens": 1,
        "use_alibi_encoder": False,
        "fixed_positions": True,
        "transformer_decoder": False,
        "enc_dec_transformer": False,
    },
    step={"inverse_mask": True, "ema_local_encoder": True},
    model_step={"ema_encoder_only": False},
    # of an attention bias that these models do not have; the last one is of old files
    known=frozenset(
        {"input_size", "in_chans", "patch_size", "embed_dim", "alibi_dims", "alibi_distance", "mae_masking"}
    ),
)


def _values(parts: Parts, own: Mapping[str, Any], task: Mapping[str, Any], gathered: Gathered) -> dict[str, Any]:
    """Return the sizes of the images, which the tensors show."""
    weight = f"{FRONT}local_encoder.proj.weight"
    size = dimension(parts.encoder, weight, 3, 16)
    num_patches = dimension(parts.encoder, f"{FRONT}fixed_positional_encoder.positions", 1)
    return {
        "channels": dimension(parts.encoder, weight, 1),
        "patch_size": size,
        "image_size": round(num_patches**0.5) * size,
    }


def _own(config: MaskedVisionConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of `modalities.image` that only images have, and the section `task`."""
    model, mask = config.model, config.mask
    own = {
        "num_extra_tokens": 1,
        "init_extra_token_zero": False,
        "mask_prob_adjust": mask.prob_adjust,
        "mask_length": mask.length,
        "inverse_mask": True,
        "ema_local_encoder": True,
        "input_size": model.image_size,
        "in_chans": model.channels,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
    }
    task = {"_name": "mae_image_pretraining", "data": "", "input_size": model.image_size, "rebuild_batches": True}
    return own, {**task, "precompute_mask_config": {}}


def _sections(own: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the sections of a run's configuration need besides the shared keys."""
    return {
        "mask": {"length": own.get("mask_length"), "prob_adjust": own.get("mask_prob_adjust")},
        "loss": {"cls_weight": model.get("cls_loss", 0.0), "cls_scale": "per_batch"},
    }


def _fixed(config: MaskedVisionModelConfig) -> dict[str, Tensor]:
    return {POSITIONS: fixed_positions(config)}


MODEL = MultiModel(
    kind=KIND,
    config=MaskedVisionModelConfig,
    encoder=lambda: MaskedVisionModel,
    values=_values,
    layout=masked_vision_layout,
    own=_own,
    sections=_sections,
    fixed=_fixed,
)
FORMAT = MODEL.format()
