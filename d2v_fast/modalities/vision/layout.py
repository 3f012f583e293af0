"""The names that other libraries have for the image encoder's tensors, and an encoder with their weights.

What only pre-training uses, or what a fine-tuned model has replaced, may be missing: it is drawn anew, and the log says
so. What the encoder has no use for is left out, and the log says that too.
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
# the seed of what is drawn anew: the same file gives the same encoder
_SEED = 0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VisionNames:
    """Their names, of modules without `.weight` and `.bias`.

    Attributes:
        block: a block, `{}` for its index; the names from `qkv` to `block_bias` are within it.
        qkv: weights of the map to queries, keys and values: one name, or three.
        bias: the shared table of relative positions.
        block_bias: a block's own table.
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
    """Where their tensors go, and the shapes of those that they keep in another shape than this library does."""
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
    """Our names of the scales of the blocks' branches, which are one where a model has none."""
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
    """A model with other names' weights, fp32 on the CPU, in training mode.

    Args:
        source: where they are from, such as "`x.pth`".
        misfit: what an error says of the source, such as "does not fit its `config.json`".
        may_lack: our names of what may be missing: it keeps its initial value. The mask token may always be.
        unused: what the names begin with that may be there, and are not used.
    Raises:
        ValueError: weights that are not finite. `Misfit` names every missing, unknown and misshapen tensor.
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
            "%s holds no mask token: a new one is drawn, which pre-training learns and features do not use",
            printable(source),
        )
    if lacking & set(_NORM):
        _log.warning(
            "%s holds no norm behind the last block: it begins anew with weight 1 and bias 0", printable(source)
        )
    if lacking & gammas(config):
        _log.warning("%s holds no scales of the blocks' branches: they are one, without effect", printable(source))
    if _SHARED_BIAS in lacking:
        _log.warning("%s holds no relative positions: their table begins at zero, without effect", printable(source))
    return model
