"""The fused operations of data2vec, usable in any EMA-teacher method; needs torch only.

========================  =========================================================================
``ema_update_``           EMA of a whole model, with an optional working copy in another dtype
``topk_target``           normalise K layers, average them, normalise the average, keep some rows
``masked_smooth_l1``      Smooth L1 (or squared error) over rows, with the moments of both sides
``data2vec_loss``         the two above in one pass, the target is never written to memory
========================  =========================================================================
"""

from d2v_fast.ops import _library
from d2v_fast.ops._library import backends
from d2v_fast.ops.ema import ema_update_

_library.load_cpp()
HAS_CPP: bool = _library.HAS_CPP

__all__ = ["ema_update_", "backends", "HAS_CPP"]
