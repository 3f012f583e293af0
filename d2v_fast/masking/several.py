"""Several masks per sample, with the lists that an encoder of visible places needs: data2vec 2.0 (arXiv 2212.07525)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.masking.fixed_blocks import block_mask_1d_rows, inverse_block_mask_rows, num_masked


class SeveralMasks(NamedTuple):
    """M masks for each of B samples. Row `b * M + m` is mask m of sample b; T are the places of the longest sample.

    Attributes:
        rows: int64 `[N]`, flat indices `(b * M + m) * T + t` of the masked places, ascending.
        visible: int64 `[B * M, V]`, flat indices of the visible places, ascending, and `B * M * T` for padding.
        visible_lengths: int64 `[B * M]`, number of visible places. None: V everywhere.
    """

    rows: npt.NDArray[np.int64]
    visible: npt.NDArray[np.int64]
    visible_lengths: npt.NDArray[np.int64] | None = None


def several_image_masks(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    grid_size: int,
    prob: float,
    length: int,
    prob_adjust: float,
    *,
    num_masks: int,
) -> SeveralMasks:
    """Draw masks for images; see `inverse_block_mask_rows` for the arguments."""
    rows = inverse_block_mask_rows(seed, epoch, sample_ids, grid_size, prob, length, prob_adjust, num_masks=num_masks)
    return SeveralMasks(rows, _unmasked(rows, len(sample_ids) * num_masks, grid_size**2))


def several_sequence_masks(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    prob: float,
    length: int,
    prob_adjust: float,
    *,
    num_masks: int,
    inverse: bool,
) -> SeveralMasks:
    """Draw masks for sequences of different lengths; see `block_mask_1d_rows` for the other arguments.

    Args:
        seed, epoch, sample_ids, prob, length, prob_adjust, num_masks, inverse: as there. A block is at most as long as
            its sequence.
        lengths: int64 `[B]`, places of each sequence. Masks of a sample depend on its own length only.
    """
    num_rows, longest = len(sample_ids) * num_masks, int(lengths.max())
    masked = np.zeros((len(sample_ids), num_masks, longest), dtype=bool)
    sizes = np.unique(lengths)
    for size in map(int, sizes):
        of_size = np.flatnonzero(lengths == size)
        ids, blocks = sample_ids[of_size], min(length, size)
        drawn = block_mask_1d_rows(
            seed, epoch, ids, size, prob, blocks, prob_adjust, num_masks=num_masks, inverse=inverse
        )
        if len(sizes) == 1:
            return SeveralMasks(drawn, _unmasked(drawn, num_rows, size))
        flags = np.zeros(len(ids) * num_masks * size, dtype=bool)
        flags[drawn] = True
        masked[of_size, :, :size] = flags.reshape(len(ids), num_masks, size)
    visible = (~masked & (np.arange(longest) < lengths[:, None, None])).reshape(num_rows, longest)
    counts = visible.sum(1)
    listed = np.full((num_rows, int(counts.max())), num_rows * longest, dtype=np.int64)
    listed[np.arange(listed.shape[1]) < counts[:, None]] = np.flatnonzero(visible)
    return SeveralMasks(np.flatnonzero(masked), listed, counts)


def num_masked_of(lengths: npt.NDArray[np.int64], prob: float, *, inverse: bool) -> int:
    """Return how many places one mask of each sequence hides, in all, without drawing masks."""
    sizes, counts = np.unique(lengths, return_counts=True)
    hidden = (num_masked(int(size), prob, inverse=inverse) for size in sizes)
    return sum(int(count) * each for count, each in zip(counts, hidden, strict=True))


def _unmasked(rows: npt.NDArray[np.int64], num_rows: int, num_places: int) -> npt.NDArray[np.int64]:
    is_visible = np.ones(num_rows * num_places, dtype=bool)
    is_visible[rows] = False
    return np.flatnonzero(is_visible).reshape(num_rows, -1)
