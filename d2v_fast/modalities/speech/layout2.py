"""Names of the tensors of data2vec 2.0's speech encoder in fairseq, and in the Transformers folders written here."""

from __future__ import annotations

from d2v_fast.config import MaskedSpeechModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.multi_layout import context_pairs
from d2v_fast.interop.post_norm_layout import pair

FRONT = "modality_encoders.AUDIO."
ALIBI_SCALE = f"{FRONT}alibi_scale"


def masked_speech_layout(config: MaskedSpeechModelConfig) -> Layout:
    """Return the map from our tensors to theirs, whose convolutions are `[O, C, k]` and ours `[O, k, C]`."""
    pairs: dict[str, tuple[str, ...]] = {}
    swapped = set()
    for index in range(len(config.conv_kernels)):
        own, theirs = "front_end.convolutions", f"{FRONT}local_encoder.conv_layers.{index}"
        pairs[f"{own}.weights.{index}"] = (f"{theirs}.0.weight",)
        swapped.add(f"{theirs}.0.weight")
        pairs[f"{own}.norm_weights.{index}"] = (f"{theirs}.2.1.weight",)
        pairs[f"{own}.norm_biases.{index}"] = (f"{theirs}.2.1.bias",)
    pairs |= pair("front_end.norm", f"{FRONT}project_features.1")
    pairs |= pair("front_end.projection", f"{FRONT}project_features.2")
    for index in range(config.position_depth):
        # theirs begin with a layer that swaps dimensions
        pairs |= pair(f"context.positions.convolutions.{index}", f"{FRONT}relative_positional_encoder.{index + 1}.0")
    pairs["context.alibi.scale"] = (ALIBI_SCALE,)
    pairs |= context_pairs(config, FRONT, has_norm=True)
    return Layout(pairs, {ALIBI_SCALE: (1, 1, config.heads, 1, 1)}, frozenset(swapped))
