"""Which keys of a model section decide the tensors of the model, and which of a head section its meaning."""

from __future__ import annotations

# keys of `d2v.model` that may differ from those that the weights were trained with: they do not change its tensors
FREE_MODEL_KEYS = frozenset(
    {
        "activation_dropout",
        "attention",
        "attention_dropout",
        "context_dropout",
        "context_layer_drop",
        "decoder.dropout",
        "decoder.noise_std",
        "drop_path",
        "dropout",
        "front_end_checkpointing",
        "gradient_checkpointing",
        "input_dropout",
        "layer_drop",
        "layer_scale",
        "position_in_teacher",
        "token_std",
    }
)

# keys of `d2v.head` that may differ from those that a head was trained with
FREE_HEAD_KEYS = frozenset({"dropout", "label_smoothing"})
