"""The names that other libraries have for the speech encoder's tensors: one encoder, so one order of them."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import SpeechModelConfig
from d2v_fast.interop.layout import Layout


@dataclass(frozen=True)
class SpeechNames:
    """Their names without `.weight` and `.bias`, `{}` for the index of a layer or block.

    Attributes:
        convolution, convolution_norm: of the front end's layers.
        front_norm, projection, mask_token: of the front end.
        position: a positional convolution.
        norm: in front of the blocks.
        block: a block; the names below are within it.
    """

    convolution: str
    convolution_norm: str
    front_norm: str
    projection: str
    mask_token: str
    position: str
    norm: str
    block: str
    query: str
    key: str
    value: str
    output: str
    attention_norm: str
    fc1: str
    fc2: str
    mlp_norm: str


def speech_layout(config: SpeechModelConfig, names: SpeechNames) -> Layout:
    """Where their tensors go. Their convolutions are `[O, C, k]` and ours `[O, k, C]`; our query, key and value are
    one map; ours has the positions where the teacher takes them from."""
    pairs: dict[str, tuple[str, ...]] = {}
    swapped = set()

    def pair(own: str, *theirs: str) -> None:
        for parameter in ("weight", "bias"):
            pairs[f"{own}.{parameter}"] = tuple(f"{name}.{parameter}" for name in theirs)

    for index in range(len(config.conv_kernels)):
        own, norm = "front_end.convolutions", names.convolution_norm.format(index)
        convolution = f"{names.convolution.format(index)}.weight"
        pairs[f"{own}.weights.{index}"] = (convolution,)
        swapped.add(convolution)
        pairs[f"{own}.norm_weights.{index}"] = (f"{norm}.weight",)
        pairs[f"{own}.norm_biases.{index}"] = (f"{norm}.bias",)
    pair("front_end.norm", names.front_norm)
    pair("front_end.projection", names.projection)
    pairs["front_end.mask_token"] = (names.mask_token,)
    for index in range(config.position_depth):
        pair(f"{positions_prefix(config)}convolutions.{index}", names.position.format(index))
    pair("context.norm", names.norm)
    for index in range(config.depth):
        own, theirs = f"context.encoder.blocks.{index}", names.block.format(index)
        pair(f"{own}.attention.qkv", *(f"{theirs}.{name}" for name in (names.query, names.key, names.value)))
        pair(f"{own}.attention.proj", f"{theirs}.{names.output}")
        pair(f"{own}.norm1", f"{theirs}.{names.attention_norm}")
        pair(f"{own}.fc1", f"{theirs}.{names.fc1}")
        pair(f"{own}.fc2", f"{theirs}.{names.fc2}")
        pair(f"{own}.norm2", f"{theirs}.{names.mlp_norm}")
    return Layout(pairs, swapped=frozenset(swapped))


def positions_prefix(config: SpeechModelConfig) -> str:
    """What our names of the positional convolutions begin with."""
    return "positions." if config.position_in_teacher == "shared" else "context.positions."
