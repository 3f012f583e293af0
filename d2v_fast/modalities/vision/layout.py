"""Map other libraries' tensor names to the image encoder's, and build an encoder with their weights.

Tensors that only pre-training uses, or that fine-tuning has replaced, may be missing: they keep their initial values.
Tensors that the encoder has no use for are ignored. Both are logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from d2v_fast.config import VisionModelConfig
from d2v_fast.files.reading import printable
from d2v_fast.interop.layout import Layout, log_unused
from d2v_fast.interop.post_norm_layout import pair
from d2v_fast.modalities.vision.encoder import VisionModel

MASK_TOKEN = "embedding.mask_token"
_NORM = ("norm.weight", "norm.bias")
_SHARED_BIAS = "position_bias.table"
# seed of missing tensors, so that a file always gives the same encoder
_SEED = 0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionNames:
    """Another library's tensor names; those of modules lack `.weight` and `.bias`.

    Attributes:
        bias: The table of relative positions that all blocks share.
        block: Prefix of a block, with `{}` for its index. It precedes `qkv` to `block_bias` and the values of
            `modules`.
        qkv: Weights of the map to queries, keys and values: one name or three.
        block_bias: A block's own table of relative positions.
        modules: Module names within a block, keyed by ours.
    """

    cls_token: str
    mask_token: str
    position: str
    projection: str
    bias: str
    norm: str
    block: str
    qkv: tuple[str, ...]
    q_bias: str
    v_bias: str
    gamma1: str
    gamma2: str
    block_bias: str
    modules: Mapping[str, str]


def vision_layout(config: VisionModelConfig, names: VisionNames) -> Layout:
    """Return the mapping between our tensors and theirs, with their shapes where these differ from ours."""
    pairs: dict[str, tuple[str, ...]] = {
        "embedding.cls_token": (names.cls_token,),
        MASK_TOKEN: (names.mask_token,),
        **pair("embedding.projection", names.projection),
        **pair("norm", names.norm),
    }
    if config.position_bias == "shared":
        pairs[_SHARED_BIAS] = (names.bias,)
    if config.absolute_position:
        pairs["embedding.position"] = (names.position,)
    for index in range(config.depth):
        own, block = f"encoder.blocks.{index}", names.block.format(index)
        pairs[f"{own}.attention.qkv.weight"] = tuple(f"{block}.{name}" for name in names.qkv)
        pairs[f"{own}.attention.qkv.q_bias"] = (f"{block}.{names.q_bias}",)
        pairs[f"{own}.attention.qkv.v_bias"] = (f"{block}.{names.v_bias}",)
        pairs[f"{own}.gamma1"] = (f"{block}.{names.gamma1}",)
        pairs[f"{own}.gamma2"] = (f"{block}.{names.gamma2}",)
        if config.position_bias == "per_block":
            pairs[f"{own}.position_bias.table"] = (f"{block}.{names.block_bias}",)
        for own_module, their_module in names.modules.items():
            pairs |= pair(f"{own}.{own_module}", f"{block}.{their_module}")
    size = config.patch_size
    shapes = {
        names.cls_token: (1, 1, config.width),
        names.mask_token: (1, 1, config.width),
        names.position: (1, 1 + config.num_patches, config.width),
        f"{names.projection}.weight": (config.width, config.channels, size, size),
    }
    return Layout(pairs, shapes)


def gammas(config: VisionModelConfig) -> set[str]:
    """Return our names of the LayerScale factors, which are 1 for a model without them."""
    return {f"encoder.blocks.{index}.gamma{number}" for index in range(config.depth) for number in (1, 2)}


def build_vision(
    config: VisionModelConfig,
    layout: Layout,
    theirs: Mapping[str, Tensor],
    source: str,
    misfit: str,
    *,
    may_lack: frozenset[str] = frozenset(),
    unused: tuple[str, ...] = (),
) -> VisionModel:
    """Build an encoder with another library's weights, fp32 on the CPU, in training mode.

    Args:
        config: The encoder's configuration.
        layout: From `vision_layout`.
        theirs: Tensors by the other library's names.
        source: Where they come from, such as "`x.pth`", for messages.
        misfit: What an error says about the source, such as "does not fit its `config.json`".
        may_lack: Our names of tensors that may be missing, in addition to the mask token. They keep their initial
            values.
        unused: Prefixes of tensors to ignore.
    Raises:
        ValueError: Weights are not finite. `Misfit` names every missing, unknown and misshapen tensor.
    """
    layout.require_finite(theirs, source)
    lacking = {own for own in may_lack | {MASK_TOKEN} if own in layout.names and layout.names[own][0] not in theirs}
    found = replace(layout, names={own: names for own, names in layout.names.items() if own not in lacking})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = VisionModel(config)
    initial = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in initial.items()}
    state = found.ours(theirs, shapes, f"{source} {misfit}", lambda name: name.startswith(unused))
    model.load_state_dict({**initial, **state})
    log_unused([name for name in theirs if name.startswith(unused)], source)
    if MASK_TOKEN in lacking:
        _log.warning(
            "%s holds no mask token: a new one is drawn; only pre-training uses it",
            printable(source),
        )
    if lacking & set(_NORM):
        _log.warning("%s holds no norm after the last block: it starts with weight 1 and bias 0", printable(source))
    if lacking & gammas(config):
        _log.warning("%s holds no LayerScale factors: they are 1, which has no effect", printable(source))
    if _SHARED_BIAS in lacking:
        _log.warning("%s holds no relative positions: their table is 0, which has no effect", printable(source))
    return model
