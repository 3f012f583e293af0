"""Samplers of masks, compiled by numba: which patches, frames or tokens are hidden from the student.

Randomness is counter-based: a mask depends on (seed, epoch, sample id), on its index where a sample has several, and on
nothing else, so any number of workers, processes or batch splits gives the same masks. The one exception is asked for:
spans with equal counts depend on the other rows of the batch, too. Every `..._rows` function lists the masked places as
flat indices `b * T + t`, ascending; the `..._reference` beside it is the algorithm in plain Python.
"""

from __future__ import annotations

from d2v_fast.masking._random import compiled
from d2v_fast.masking.blocks import block_mask_reference, block_mask_rows, block_masks
from d2v_fast.masking.fixed_blocks import (
    block_mask_1d_reference,
    block_mask_1d_rows,
    inverse_block_mask_reference,
    inverse_block_mask_rows,
)
from d2v_fast.masking.spans import span_mask_reference, span_mask_rows
from d2v_fast.masking.tokens import TokenMasks, token_mask_reference, token_mask_rows

__all__ = [
    "TokenMasks",
    "block_mask_1d_reference",
    "block_mask_1d_rows",
    "block_mask_reference",
    "block_mask_rows",
    "block_masks",
    "compiled",
    "inverse_block_mask_reference",
    "inverse_block_mask_rows",
    "span_mask_reference",
    "span_mask_rows",
    "token_mask_reference",
    "token_mask_rows",
]
