"""Samplers of masks, compiled by numba: they choose the patches, frames or tokens that the student does not see.

Randomness is counter-based: a mask depends on (seed, epoch, sample id) and its index among the masks of a sample, so
that any number of workers, processes or batch splits gives the same masks. Only spans with `equal_counts` also depend
on the other samples of the batch. Every `..._rows` function returns flat indices `b * T + t` of the masked places,
ascending. The `..._reference` beside it is the algorithm in plain Python.
"""

from __future__ import annotations

from d2v_fast.masking._random import compiled
from d2v_fast.masking.blocks import block_mask_reference, block_mask_rows, block_masks
from d2v_fast.masking.fixed_blocks import (
    block_mask_1d_reference,
    block_mask_1d_rows,
    inverse_block_mask_reference,
    inverse_block_mask_rows,
    num_masked,
)
from d2v_fast.masking.several import SeveralMasks, num_masked_of, several_image_masks, several_sequence_masks
from d2v_fast.masking.spans import channel_mask_rows, span_mask_reference, span_mask_rows
from d2v_fast.masking.tokens import TokenMasks, token_mask_reference, token_mask_rows

__all__ = [
    "SeveralMasks",
    "TokenMasks",
    "block_mask_1d_reference",
    "block_mask_1d_rows",
    "block_mask_reference",
    "block_mask_rows",
    "block_masks",
    "channel_mask_rows",
    "compiled",
    "inverse_block_mask_reference",
    "inverse_block_mask_rows",
    "num_masked",
    "num_masked_of",
    "several_image_masks",
    "several_sequence_masks",
    "span_mask_reference",
    "span_mask_rows",
    "token_mask_reference",
    "token_mask_rows",
]
