"""The entry `cfg` of fairseq's 2.0 checkpoints, written from a run's configuration.

fairseq builds its model from it, and refuses a key that its own configuration lacks. A file has the sections of all
three modalities, of which those that were not trained hold fairseq's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v_fast.interop.fairseq_multi import Kind

# rows of masked copies per process for which the published weight of the class token's loss is meant
PUBLISHED_ROWS = 256
# sections that are there, and that neither loading nor fine-tuning reads
_EMPTY = (
    *("common_eval", "distributed_training", "dataset", "checkpoint", "bmuf", "generation", "eval_lm", "interactive"),
    "ema",
)
_NOTHING = ("_name", "optimizer", "scoring", "bpe", "tokenizer")

_DECODER = {
    "decoder_dim": 384,
    "decoder_groups": 16,
    "decoder_kernel": 5,
    "decoder_layers": 5,
    "input_dropout": 0.1,
    "add_positions_masked": False,
    "add_positions_all": False,
    "decoder_residual": True,
    "projection_layers": 1,
    "projection_ratio": 2.0,
}
_MODALITY = {
    "prenet_depth": 4,
    "prenet_layerdrop": 0.0,
    "prenet_dropout": 0.0,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "num_extra_tokens": 0,
    "init_extra_token_zero": True,
    "mask_noise_std": 0.01,
    "mask_prob_min": None,
    "mask_prob": 0.7,
    "inverse_mask": False,
    "mask_prob_adjust": 0.0,
    "keep_masked_pct": 0.0,
    "mask_length": 5,
    "add_masks": False,
    "remove_masks": False,
    "mask_dropout": 0.0,
    "encoder_zero_mask": True,
    "mask_channel_prob": 0.0,
    "mask_channel_length": 64,
    "ema_local_encoder": False,
    "local_grad_mult": 1.0,
    "use_alibi_encoder": False,
    "alibi_scale": 1.0,
    "learned_alibi": False,
    "alibi_max_pos": None,
    "learned_alibi_scale": False,
    "learned_alibi_scale_per_head": False,
    "learned_alibi_scale_per_layer": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "audio": {
        "extractor_mode": "layer_norm",
        "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "conv_pos_width": 95,
        "conv_pos_groups": 16,
        "conv_pos_depth": 5,
        "conv_pos_pre_ln": False,
    },
    "image": {
        "input_size": 224,
        "in_chans": 3,
        "patch_size": 16,
        "embed_dim": 768,
        "alibi_dims": 2,
        "alibi_distance": "manhattan",
        "fixed_positions": True,
        "transformer_decoder": False,
        "enc_dec_transformer": False,
    },
    "text": {
        "max_source_positions": 512,
        "learned_pos": True,
        "dropout": 0.1,
        "no_scale_embedding": True,
        "layernorm_embedding": True,
        "no_token_positional_embeddings": False,
    },
}


def multi_cfg(config: Any, kind: Kind, own: Mapping[str, Any], task: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Return `cfg` without `criterion` and `lr_scheduler`.

    Args:
        config: The run's, of data2vec 2.0.
        kind: Its modality.
        own: Keys of the modality's section that only this modality sets.
        task: The section `task`.
        updates: Optimizer steps of the student, for runs whose length is in epochs.
    """
    steps = config.schedule.steps or updates
    return {
        **dict.fromkeys(_NOTHING),
        **{name: {} for name in _EMPTY},
        "common": {"tpu": False, "seed": config.run.seed, "log_format": "json"},
        "optimization": {"max_update": steps},
        "model": _model(config, kind, own, steps),
        "task": dict(task),
    }


def _model(config: Any, kind: Kind, own: Mapping[str, Any], steps: int) -> dict[str, Any]:
    model, target, loss, teacher, guard = config.model, config.target, config.loss, config.teacher, config.guard
    return {
        "_name": "data2vec_multi",
        "loss_beta": loss.beta,
        "loss_scale": None if (loss.channel_reduction, loss.scale) == ("rsqrt", 1.0) else 1 / loss.divisor(model.width),
        "depth": model.depth,
        "start_drop_path_rate": 0.0,
        "end_drop_path_rate": 0.0,
        "num_heads": model.heads,
        "norm_eps": model.norm_eps,
        "norm_affine": True,
        "encoder_dropout": model.dropout,
        "post_mlp_drop": model.dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.activation_dropout,
        "dropout_input": 0.0,
        "layerdrop": model.layer_drop,
        "embed_dim": model.width,
        "mlp_ratio": model.mlp_ratio,
        "layer_norm_first": False,
        "average_top_k_layers": target.top_k,
        "end_of_block_targets": False,
        "clone_batch": config.mask.num_masks,
        "layer_norm_target_layer": target.layer_norm == "layer",
        "batch_norm_target_layer": target.layer_norm == "batch",
        "instance_norm_target_layer": target.layer_norm == "instance",
        "instance_norm_targets": target.final_norm == "instance",
        "layer_norm_targets": target.final_norm == "layer",
        "ema_decay": teacher.decay_start,
        "ema_same_dtype": True,
        "log_norms": True,
        "ema_end_decay": teacher.decay_end,
        "ema_anneal_end_step": teacher.decay_steps,
        "ema_encoder_only": kind.averages_blocks_only,
        "max_update": steps,
        "modalities": {"_name": None, **_modalities(config, kind, own)},
        "shared_decoder": None,
        "min_target_var": guard.min_target_std,
        "min_pred_var": guard.min_prediction_std,
        "supported_modality": kind.name,
        "mae_init": False,
        "seed": config.run.seed,
        "skip_ema": False,
        "cls_loss": _cls_loss(loss),
        "recon_loss": 0.0,
        "d2v_loss": 1.0,
        "decoder_group": False,
    }


def _modalities(config: Any, kind: Kind, own: Mapping[str, Any]) -> dict[str, Any]:
    model, mask = config.model, config.mask
    found: dict[str, Any] = {}
    for name, defaults in _OWN.items():
        shared = {"num_alibi_heads": model.heads, "model_depth": model.depth}
        found[name] = {"type": name.upper(), **_MODALITY, **shared, "decoder": dict(_DECODER), **defaults}
    decoder = model.decoder
    found[kind.section] |= {
        "prenet_depth": model.context_depth,
        "prenet_layerdrop": model.context_layer_drop,
        "prenet_dropout": model.context_dropout,
        "mask_noise_std": decoder.noise_std,
        "mask_prob": mask.prob,
        "decoder": {
            **_DECODER,
            "decoder_dim": decoder.width,
            "decoder_groups": decoder.groups,
            "decoder_kernel": decoder.kernel,
            "decoder_layers": decoder.depth,
            "input_dropout": decoder.dropout,
            "decoder_residual": decoder.residual,
            "projection_layers": decoder.projection,
            "projection_ratio": decoder.projection_ratio,
        },
        **kind.encoder,
        **own,
    }
    return found


def _cls_loss(loss: Any) -> float:
    """Return the weight of the class token's loss as fairseq counts it: once for each row of a process."""
    weight: float = getattr(loss, "cls_weight", 0.0)
    return weight if weight == 0 or loss.cls_scale == "per_batch" else weight / PUBLISHED_ROWS
