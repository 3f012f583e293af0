"""Fused operations of data2vec, usable in any method with an EMA teacher. They require torch only.

========================  =========================================================================
``ema_update_``           EMA of a whole model, with an optional working copy in another dtype
``EmaUpdate``             the same for a fixed set of tensors, checked once
``topk_target``           normalize K layers, average them, normalize the average, select rows
``masked_smooth_l1``      Smooth L1 (or squared error) over rows, with per-channel sums of both sides
``data2vec_loss``         both in one pass, without writing the target to memory
``layer_norm_gelu``       layer norm over channels and exact GELU, as after each convolution for speech
``attention_with_bias``   attention with an additive bias on the logits that gets a gradient
``attention_with_alibi``  the same with ALiBi's bias, from positions, with a learned scale per head
========================  =========================================================================
"""

from d2v_fast.ops import _library
from d2v_fast.ops._library import backends, missing_kernels
from d2v_fast.ops.attention import attention_with_alibi, attention_with_bias
from d2v_fast.ops.data2vec_loss import data2vec_loss
from d2v_fast.ops.ema import EmaUpdate, ema_update_
from d2v_fast.ops.masked_loss import MaskedLoss, masked_smooth_l1
from d2v_fast.ops.norm_gelu import layer_norm_gelu
from d2v_fast.ops.topk_target import topk_target

_library.load_cpp()
HAS_CPP: bool = _library.HAS_CPP

__all__ = [
    "ema_update_",
    "EmaUpdate",
    "topk_target",
    "masked_smooth_l1",
    "data2vec_loss",
    "layer_norm_gelu",
    "attention_with_bias",
    "attention_with_alibi",
    "MaskedLoss",
    "backends",
    "missing_kernels",
    "HAS_CPP",
]
