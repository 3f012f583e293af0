"""Masks of blocks of one size: data2vec 2.0 (arXiv 2212.07525, section 3), for images, speech and text.

Blocks are placed at random and may overlap; then single places are added or removed at random until the mask has
exactly the requested number. So all samples have equally many visible places, and the encoder can run on these alone.
`inverse` places the blocks that stay visible. A sample gets several masks, which share the teacher's targets.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from d2v_fast.masking._random import below, checked_ids, compiled
from d2v_fast.masking.streams import GOLDEN, MASK, clone_keys, stream_keys

__all__ = [
    "block_mask_1d_reference",
    "block_mask_1d_rows",
    "inverse_block_mask_reference",
    "inverse_block_mask_rows",
    "num_masked",
]


def inverse_block_mask_rows(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    grid_size: int,
    prob: float,
    length: int,
    prob_adjust: float,
    *,
    num_masks: int = 1,
) -> npt.NDArray[np.int64]:
    """Draw masks for images that leave square blocks visible, and list the masked patches.

    Args:
        seed: Seed of the run.
        epoch: Epoch. A mask depends on seed, epoch, sample id and the index of the mask only.
        sample_ids: int64 `[B]`.
        grid_size: patches along a side; an image has `P = grid_size**2`.
        prob: share of masked patches; each mask leaves exactly `int(P * (1 - prob))` patches visible, but at least one
            and not all. Published: 0.8 for ViT-B, 0.75 for larger models.
        length: patches along a side of a block; published: 3. A block that extends beyond the grid is cut.
        prob_adjust: added to the visible share to compensate for overlap:
            `floor(P * (1 - prob + prob_adjust) / length**2)` blocks are placed. Published: 0.07, and 0.1 for larger
            models.
        num_masks: masks per sample, M. Mask m does not depend on M.

    Returns:
        int64 `[B * M * num_masked]`: flat indices `(b * M + m) * P + p` of the masked patches, ascending.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> inverse_block_mask_rows(0, 0, np.array([7, 8]), grid_size=3, prob=0.5, length=2, prob_adjust=0.1)
        array([ 1,  4,  6,  7,  8,  9, 12, 15, 16, 17])
    """
    ids = checked_ids(sample_ids)
    if grid_size < 2:
        raise ValueError(f"`grid_size` must be >= 2, but is {grid_size} instead.")
    shape, block = (grid_size, grid_size), (length, length)
    return _rows(seed, epoch, ids, shape, block, prob, prob_adjust, num_masks, inverse=True)


def block_mask_1d_rows(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    num_positions: int,
    prob: float,
    length: int,
    prob_adjust: float,
    *,
    num_masks: int = 1,
    inverse: bool = False,
) -> npt.NDArray[np.int64]:
    """Draw masks for sequences that hide blocks, or leave them visible, and list the masked positions.

    All sequences have the same length: crop before drawing. `length=1, inverse=True` is the published mask for text,
    in which every set of positions is equally likely.

    Args:
        seed: Seed of the run.
        epoch: Epoch. A mask depends on seed, epoch, sample id and the index of the mask only.
        sample_ids: int64 `[B]`.
        num_positions: frames or tokens of a sequence, T.
        prob: share of masked positions; each mask hides exactly `int(T * prob)` of them, and with `inverse` leaves
            exactly `int(T * (1 - prob))` visible; but at least one and not all. Published: 0.5 for speech (large model:
            0.55), 0.48 for text.
        length: positions of a block; published: 5 for speech, 1 for text. A block that extends beyond the end is cut.
        prob_adjust: added to the share of the blocks to compensate for overlap: without `inverse`,
            `floor(T * (prob + prob_adjust) / length)` blocks are placed. Published: 0.05 and 0.1.
        num_masks: masks per sample, M. Mask m does not depend on M.
        inverse: place the blocks that stay visible instead of the masked ones.

    Returns:
        int64 `[B * M * num_masked]`: flat indices `(b * M + m) * T + t` of the masked positions, ascending.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> block_mask_1d_rows(0, 0, np.array([7, 8]), num_positions=8, prob=0.5, length=2, prob_adjust=0.1)
        array([ 1,  2,  3,  5, 10, 11, 13, 14])
    """
    ids = checked_ids(sample_ids)
    if num_positions < 2:
        raise ValueError(f"`num_positions` must be >= 2, but is {num_positions} instead.")
    return _rows(seed, epoch, ids, (1, num_positions), (1, length), prob, prob_adjust, num_masks, inverse)


def inverse_block_mask_reference(
    generator: random.Random, grid_size: int, prob: float, length: int, prob_adjust: float
) -> list[list[bool]]:
    """Draw one mask of `inverse_block_mask_rows`, `[grid_size][grid_size]`, True for masked, in plain Python."""
    return _reference(generator, (grid_size, grid_size), (length, length), prob, prob_adjust, True)


def block_mask_1d_reference(
    generator: random.Random, num_positions: int, prob: float, length: int, prob_adjust: float, inverse: bool
) -> list[bool]:
    """One mask of `block_mask_1d_rows` `[num_positions]`, True where masked, in plain Python."""
    return _reference(generator, (1, num_positions), (1, length), prob, prob_adjust, inverse)[0]


def _reference(
    generator: random.Random,
    shape: tuple[int, int],
    block: tuple[int, int],
    prob: float,
    prob_adjust: float,
    inverse: bool,
) -> list[list[bool]]:
    """The algorithm for both, `[height][width]`."""
    height, width = shape
    cells = [(row, col) for row in range(height) for col in range(width)]
    num_blocks, num_marked = _plan(shape, block, prob, prob_adjust, inverse)
    marked: set[tuple[int, int]] = set()
    for row, col in generator.choices(cells, k=num_blocks):
        top, left = row - block[0] // 2, col - block[1] // 2
        marked.update((r, c) for r, c in cells if 0 <= r - top < block[0] and 0 <= c - left < block[1])
    if len(marked) > num_marked:
        marked = set(generator.sample(sorted(marked), num_marked))
    else:
        free = [cell for cell in cells if cell not in marked]
        marked.update(generator.sample(free, num_marked - len(marked)))
    return [[((row, col) in marked) != inverse for col in range(width)] for row in range(height)]


def _plan(
    shape: tuple[int, int], block: tuple[int, int], prob: float, prob_adjust: float, inverse: bool
) -> tuple[int, int]:
    """How many blocks are laid, and how many cells are marked in the end."""
    size, share = shape[0] * shape[1], 1 - prob if inverse else prob
    # as published, in floats: 25 * (1 - 0.8) is a little less than 5, so that 4 of 25 are visible
    num_marked = min(max(1, int(size * share)), size - 1)
    return int(size * (share + prob_adjust) / (block[0] * block[1])), num_marked


def num_masked(num_places: int, prob: float, *, inverse: bool) -> int:
    """Return how many of a sample's places each mask of `inverse_block_mask_rows` or `block_mask_1d_rows` hides.

    Examples:
        >>> num_masked(25, 0.8, inverse=True)
        21
    """
    _, marked = _plan((1, num_places), (1, 1), prob, 0.0, inverse)
    return num_places - marked if inverse else marked


def _rows(
    seed: int,
    epoch: int,
    ids: npt.NDArray[np.int64],
    shape: tuple[int, int],
    block: tuple[int, int],
    prob: float,
    prob_adjust: float,
    num_masks: int,
    inverse: bool,
) -> npt.NDArray[np.int64]:
    size = shape[0] * shape[1]
    if not 0 < prob < 1:
        raise ValueError(f"`mask.prob` must be in (0, 1), but is {prob} instead.")
    if not 1 <= block[1] <= shape[1]:
        raise ValueError(f"`mask.length` must be in [1, {shape[1]}], but is {block[1]} instead.")
    if not 0 <= prob_adjust <= 1:
        raise ValueError(f"`mask.prob_adjust` must be in [0, 1], but is {prob_adjust} instead.")
    if num_masks < 1:
        raise ValueError(f"`mask.num_masks` must be >= 1, but is {num_masks} instead.")
    num_blocks, num_marked = _plan(shape, block, prob, prob_adjust, inverse)
    keys = clone_keys(stream_keys(seed, MASK, epoch, ids), num_masks).reshape(-1)
    num_listed = size - num_marked if inverse else num_marked
    # one element more than is masked: the kernel writes before it knows whether the cell counts
    rows = np.empty(len(keys) * num_listed + 1, dtype=np.int64)
    _fill_rows(rows, keys, *shape, *block, num_blocks, num_marked, np.uint8(inverse))
    return rows[:-1]


@compiled
def _fill_rows(
    rows: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    height: int,
    width: int,
    block_height: int,
    block_width: int,
    num_blocks: int,
    num_marked: int,
    inverse: np.uint8,
) -> None:
    """Write the masked rows of all masks, one stream each, into `rows`."""
    size = height * width
    marked = np.empty(size, dtype=np.uint8)
    total = 0
    for b in range(len(keys)):
        marked[:] = 0
        state = keys[b]
        count = 0
        for _ in range(num_blocks):
            # the center; two draws cost less than one and a division
            state += GOLDEN
            top = below(state, height) - block_height // 2
            state += GOLDEN
            left = below(state, width) - block_width // 2
            for row in range(max(top, 0), min(top + block_height, height)):
                for cell in range(row * width + max(left, 0), row * width + min(left + block_width, width)):
                    count += 1 - marked[cell]
                    marked[cell] = 1
        # one of the marked, or of the others, and all equally likely: draw until it is one of them
        while count > num_marked:
            state += GOLDEN
            cell = below(state, size)
            count -= marked[cell]
            marked[cell] = 0
        while count < num_marked:
            state += GOLDEN
            cell = below(state, size)
            count += 1 - marked[cell]
            marked[cell] = 1
        base = b * size
        for p in range(size):
            # no branch: a row that does not count is overwritten by the next
            rows[total] = base + p
            total += marked[p] ^ inverse
