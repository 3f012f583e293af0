"""The names that other libraries have for the speech encoder's tensors: one encoder, so one order of them."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import SpeechModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.post_norm_layout import BlockNames, block_pairs, pair


@dataclass(frozen=True)
class SpeechNames(BlockNames):
    """Their names without `.weight` and `.bias`, `{}` for the index of a layer or block.

    Attributes:
        convolution, convolution_norm: of the front end's layers.
        front_norm, projection, mask_token: of the front end.
        position: a positional convolution.
        norm: in front of the blocks.
    """

    convolution: str
    convolution_norm: str
    front_norm: str
    projection: str
    mask_token: str
    position: str
    norm: str


def speech_layout(config: SpeechModelConfig, names: SpeechNames) -> Layout:
    """Where their tensors go. Their convolutions are `[O, C, k]` and ours `[O, k, C]`; our query, key and value are
    one map; ours has the positions where the teacher takes them from."""
    pairs: dict[str, tuple[str, ...]] = {}
    swapped = set()
    for index in range(len(config.conv_kernels)):
        own, norm = "front_end.convolutions", names.convolution_norm.format(index)
        convolution = f"{names.convolution.format(index)}.weight"
        pairs[f"{own}.weights.{index}"] = (convolution,)
        swapped.add(convolution)
        pairs[f"{own}.norm_weights.{index}"] = (f"{norm}.weight",)
        pairs[f"{own}.norm_biases.{index}"] = (f"{norm}.bias",)
    pairs |= pair("front_end.norm", names.front_norm)
    pairs |= pair("front_end.projection", names.projection)
    pairs["front_end.mask_token"] = (names.mask_token,)
    for index in range(config.position_depth):
        pairs |= pair(f"{positions_prefix(config)}convolutions.{index}", names.position.format(index))
    pairs |= pair("context.norm", names.norm)
    pairs |= block_pairs(names, config.depth)
    return Layout(pairs, swapped=frozenset(swapped))


def positions_prefix(config: SpeechModelConfig) -> str:
    """What our names of the positional convolutions begin with."""
    return "positions." if config.position_in_teacher == "shared" else "context.positions."
