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
    """Draw masks for images; see `inverse_block_mask_rows` for the arguments.

    Examples:
        >>> masks = several_image_masks(0, 0, np.array([7]), 2, prob=0.5, length=1, prob_adjust=0.0, num_masks=2)
        >>> masks.rows, masks.visible.tolist()
        (array([1, 3, 4, 6]), [[0, 2], [5, 7]])
    """
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

    Examples:
        >>> ids, lengths = np.array([7, 8]), np.array([4, 2])
        >>> masks = several_sequence_masks(0, 0, ids, lengths, 0.5, 2, 0.1, num_masks=1, inverse=False)
        >>> masks.rows, masks.visible.tolist()
        (array([0, 1, 4]), [[2, 3], [5, 8]])
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
    """Return how many places one mask of each sequence hides, in all, without drawing masks.

    Examples:
        >>> num_masked_of(np.array([8, 5, 8]), 0.5, inverse=False)
        10
    """
    sizes, counts = np.unique(lengths, return_counts=True)
    hidden = (num_masked(int(size), prob, inverse=inverse) for size in sizes)
    return sum(int(count) * each for count, each in zip(counts, hidden, strict=True))


def _unmasked(rows: npt.NDArray[np.int64], num_rows: int, num_places: int) -> npt.NDArray[np.int64]:
    is_visible = np.ones(num_rows * num_places, dtype=bool)
    is_visible[rows] = False
    return np.flatnonzero(is_visible).reshape(num_rows, -1)
