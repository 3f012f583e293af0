"""Map the speech encoder's tensors to the names of other libraries."""

from __future__ import annotations

from dataclasses import dataclass

from d2v_fast.config import SpeechModelConfig
from d2v_fast.interop.layout import Layout
from d2v_fast.interop.post_norm_layout import BlockNames, block_pairs, pair


@dataclass(frozen=True)
class SpeechNames(BlockNames):
    """Another library's names, without `.weight` and `.bias`; `{}` is the index of a layer or block.

    Attributes:
        convolution, convolution_norm: A convolution of the front end and its norm.
        front_norm, projection, mask_token: The front end's final norm, projection and mask token.
        position: A positional convolution.
        norm: The norm before the blocks.
    """

    convolution: str
    convolution_norm: str
    front_norm: str
    projection: str
    mask_token: str
    position: str
    norm: str


def speech_layout(config: SpeechModelConfig, names: SpeechNames) -> Layout:
    """Return the layout that maps another library's tensors to this encoder's.

    The other libraries store convolutions as `[O, C, k]`, this encoder as `[O, k, C]`. Its query, key and value are one
    tensor.
    """
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
    """Return the prefix of this encoder's positional convolutions, which depends on the teacher's use of them."""
    return "positions." if config.position_in_teacher == "shared" else "context.positions."
