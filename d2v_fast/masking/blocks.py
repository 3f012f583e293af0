"""Block masks for images: data2vec (arXiv 2202.03555, section 4.1) with the algorithm of BEiT (2106.08254).

Rectangles are placed on the patch grid until the requested number of patches is covered. The last rectangle
rarely fits exactly, so an image gets at most that many masked patches, sometimes a few fewer.
`block_mask_reference` is the algorithm in plain Python; `block_mask_rows` draws from the same distribution in
compiled code.
"""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt

from d2v_fast.masking._random import below, checked_ids, compiled, unit
from d2v_fast.masking.streams import GOLDEN, MASK, stream_keys

__all__ = ["block_mask_reference", "block_mask_rows", "block_masks"]

NUM_TRIES = 10


def block_mask_rows(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    grid_size: int,
    num_patches: int,
    min_patches: int,
    max_patches: int | None,
    min_aspect: float,
) -> npt.NDArray[np.int64]:
    """Draw one block mask per sample and list the masked patches.

    Args:
        seed: Seed of the run.
        epoch: Epoch. A mask depends on seed, epoch and sample id only.
        sample_ids: int64 `[B]`.
        grid_size: patches along a side; an image has `P = grid_size**2`.
        num_patches: the most patches to mask in an image, in [1, P - 1].
        min_patches: Smallest area of one rectangle, before rounding.
        max_patches: Largest area of one rectangle. `None` means `num_patches`.
        min_aspect: rectangles have a height to width ratio in [min_aspect, 1 / min_aspect], log-uniform.
    Returns:
        int64 `[N]`: flat indices `b * P + p` of the masked patches, ascending. Every image has at least one
        masked and one visible patch.

    Examples:
        >>> ids = np.array([7, 8])
        >>> block_mask_rows(0, 0, ids, 3, num_patches=4, min_patches=2, max_patches=None, min_aspect=0.5)
        array([ 3,  4,  6,  7, 12, 13, 15, 16])
    """
    ids = _check(sample_ids, grid_size, num_patches, min_patches, max_patches, min_aspect)
    # one element more than can be masked: the kernel writes before it knows whether the patch counts
    rows = np.empty(len(ids) * num_patches + 1, dtype=np.int64)
    keys = stream_keys(seed, MASK, epoch, ids)
    largest = num_patches if max_patches is None else max_patches
    total = _fill_rows(rows, keys, grid_size, num_patches, min_patches, largest, -math.log(min_aspect))
    return rows[:total]


def block_masks(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    grid_size: int,
    num_patches: int,
    min_patches: int,
    max_patches: int | None,
    min_aspect: float,
) -> npt.NDArray[np.bool_]:
    """Draw the masks of `block_mask_rows` as bool `[B, grid_size, grid_size]`, True for masked patches.

    Examples:
        >>> block_masks(0, 0, np.array([7]), 3, 4, 2, None, 0.5).astype(int)
        array([[[0, 0, 0],
                [1, 1, 0],
                [1, 1, 0]]])
    """
    rows = block_mask_rows(seed, epoch, sample_ids, grid_size, num_patches, min_patches, max_patches, min_aspect)
    masks = np.zeros(len(sample_ids) * grid_size**2, dtype=np.bool_)
    masks[rows] = True
    return masks.reshape(len(sample_ids), grid_size, grid_size)


def block_mask_reference(
    generator: random.Random,
    grid_size: int,
    num_patches: int,
    min_patches: int,
    max_patches: int | None,
    min_aspect: float,
) -> list[list[bool]]:
    """Draw one block mask `[grid_size][grid_size]`, True for masked patches, in plain Python."""
    side = grid_size
    masked = [[False] * side for _ in range(side)]
    spread = -math.log(min_aspect)
    count = 0
    placed = True
    while count < num_patches and placed:
        placed = False
        room = num_patches - count if max_patches is None else min(num_patches - count, max_patches)
        for _ in range(NUM_TRIES):
            # near the end `room` is the smaller of the two, and the area still lies between them
            area = generator.uniform(min_patches, room)
            aspect = math.exp(generator.uniform(-spread, spread))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= side or width >= side:
                continue
            top, left = generator.randint(0, side - height), generator.randint(0, side - width)
            cells = [(row, col) for row in range(top, top + height) for col in range(left, left + width)]
            new = sum(not masked[row][col] for row, col in cells)
            if 0 < new <= room:
                for row, col in cells:
                    masked[row][col] = True
                count += new
                placed = True
                break
    if count == 0:
        # not published: on a small grid no rectangle may fit, and an image without a mask teaches nothing
        edge = min(side - 1, math.isqrt(num_patches))
        top, left = generator.randint(0, side - edge), generator.randint(0, side - edge)
        for row in range(top, top + edge):
            masked[row][left : left + edge] = [True] * edge
    return masked


def _check(
    sample_ids: npt.NDArray[np.int64],
    grid_size: int,
    num_patches: int,
    min_patches: int,
    max_patches: int | None,
    min_aspect: float,
) -> npt.NDArray[np.int64]:
    ids = checked_ids(sample_ids)
    most = grid_size**2 - 1
    if not 1 <= num_patches <= most:
        raise ValueError(
            f"`mask.num_patches` must be in [1, {most}], but is {num_patches} instead. "
            f"The grid has {grid_size} x {grid_size} patches, and one of them must stay visible."
        )
    if min_patches < 1:
        raise ValueError(f"`mask.min_patches` must be >= 1, but is {min_patches} instead.")
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"`mask.max_patches` must be >= 1, but is {max_patches} instead.")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"`mask.min_aspect` must be in (0, 1], but is {min_aspect} instead.")
    return ids


@compiled
def _fill_rows(
    rows: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    side: int,
    num_patches: int,
    min_patches: int,
    max_patches: int,
    spread: float,
) -> int:
    """Write the masked rows of all samples into `rows`, and return how many there are."""
    size = side * side
    masked = np.empty(size, dtype=np.uint8)
    total = 0
    for b in range(len(keys)):
        masked[:] = 0
        _draw_blocks(masked, keys[b], side, num_patches, min_patches, max_patches, spread)
        base = b * size
        for p in range(size):
            # no branch: a row that does not count is overwritten by the next
            rows[total] = base + p
            total += masked[p]
    return total


@compiled
def _draw_blocks(
    masked: npt.NDArray[np.uint8],
    state: np.uint64,
    side: int,
    num_patches: int,
    min_patches: int,
    max_patches: int,
    spread: float,
) -> None:
    """Mark the masked cells of one image `[side * side]`, with the stream whose key is `state`."""
    count = 0
    placed = True
    while count < num_patches and placed:
        placed = False
        room = min(num_patches - count, max_patches)
        for _ in range(NUM_TRIES):
            state += GOLDEN
            root_area = math.sqrt(min_patches + (room - min_patches) * unit(state))
            state += GOLDEN
            root_aspect = math.exp(spread * (unit(state) - 0.5))
            height = np.int64(np.rint(root_area * root_aspect))
            width = np.int64(np.rint(root_area / root_aspect))
            if height >= side or width >= side:
                continue
            state += GOLDEN
            top = below(state, side - height + 1)
            state += GOLDEN
            left = below(state, side - width + 1)
            new = height * width
            for row in range(top, top + height):
                for cell in range(row * side + left, row * side + left + width):
                    new -= masked[cell]
            if 0 < new <= room:
                for row in range(top, top + height):
                    for cell in range(row * side + left, row * side + left + width):
                        masked[cell] = 1
                count += new
                placed = True
                break
    if count == 0:
        # no rectangle fits (a small grid): the largest square that does
        edge = min(side - 1, np.int64(math.sqrt(num_patches)))
        state += GOLDEN
        top = below(state, side - edge + 1)
        state += GOLDEN
        left = below(state, side - edge + 1)
        for row in range(top, top + edge):
            for cell in range(row * side + left, row * side + left + edge):
                masked[cell] = 1
