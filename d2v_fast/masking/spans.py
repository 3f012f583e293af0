"""Span masks for speech: wav2vec 2.0 (arXiv 2006.11477, section 3.1), as data2vec uses them (2202.03555, section 4.2).

Frames are drawn as starts. Each start masks itself and the frames after it, and spans may overlap: the published 0.065
starts per frame and spans of 10 mask 49 % of the frames. The public code also reduces every sample to the count of the
smallest (`equal_counts`), which leaves 43 to 46 % (8 to 24 samples of 10 to 16 s; less for shorter ones) and holes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from d2v_fast.masking._random import below, checked_ids, choose, compiled, unit
from d2v_fast.masking.streams import CHANNELS, GOLDEN, MASK, stream_keys

__all__ = ["channel_mask_rows", "span_mask_reference", "span_mask_rows"]


def span_mask_rows(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    num_positions: int,
    prob: float,
    length: int,
    *,
    min_masks: int = 1,
    equal_counts: bool = True,
    lengths: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Draw one span mask per sample and list the masked frames.

    Args:
        seed: Seed of the run.
        epoch: Epoch. A mask depends on seed, epoch and sample id, and with `equal_counts` on the other samples.
        sample_ids: int64 `[B]`.
        num_positions: frames per sample, T.
        prob: share of the frames that the spans would mask without overlap, in (0, 1]; published: 0.65. A sample of
            S frames gets `prob * S / length` spans, rounded up or down at random so that the mean is exact.
        length: frames per span; published: 10.
        min_masks: the fewest spans per sample; with 0, a sample may have no masked frame.
        equal_counts: unmask frames at random until all samples have as many masked frames as the smallest, as the
            public code does. The masks then also depend on which samples the batch contains, but not on their order.
        lengths: int64 `[B]`, frames of each sample before its padding, which is never masked. `None` means T.

    Returns:
        int64 `[N]`: flat indices `b * T + t` of the masked frames, ascending. A sample of two or more frames has at
        least one masked and one visible frame; a shorter one has no masked frame.

    Raises:
        ValueError: an argument is out of range, or a sample has fewer than two frames with `equal_counts`.

    Examples:
        >>> span_mask_rows(0, 0, np.array([7, 8]), num_positions=8, prob=0.5, length=2)
        array([ 1,  2,  3,  4,  9, 10, 12, 13])
    """
    ids = checked_ids(sample_ids)
    sizes = _check(ids, num_positions, prob, length, min_masks, equal_counts, lengths)
    rows = np.empty(len(ids) * num_positions, dtype=np.int64)
    states = stream_keys(seed, MASK, epoch, ids)
    total = _fill_rows(rows, states, sizes, num_positions, prob, length, min_masks, equal_counts)
    return rows[:total]


def channel_mask_rows(
    seed: int, epoch: int, sample_ids: npt.NDArray[np.int64], num_channels: int, prob: float, length: int
) -> npt.NDArray[np.int64]:
    """Draw spans of masked channels for fine-tuning (wav2vec 2.0, arXiv 2006.11477, appendix B), one mask per sample.

    Args:
        seed, epoch, sample_ids: as for `span_mask_rows`; the streams are others.
        num_channels: channels of a frame, D.
        prob: share of the channels that the spans would mask without overlap, in (0, 1]. A sample gets
            `prob * D / length` spans, rounded up or down at random, so that a narrow model may get none.
        length: channels per span; published: 64.

    Returns:
        int64 `[N]`: flat indices `b * D + d` of the masked channels, ascending. Every sample keeps a channel.

    Examples:
        >>> channel_mask_rows(0, 1, np.array([2, 3]), num_channels=20, prob=0.2, length=4)
        array([14, 15, 16, 17, 20, 21, 22, 23])
    """
    ids = checked_ids(sample_ids)
    sizes = _check(ids, num_channels, prob, length, 0, False, None)
    rows = np.empty(len(ids) * num_channels, dtype=np.int64)
    total = _fill_rows(rows, stream_keys(seed, CHANNELS, epoch, ids), sizes, num_channels, prob, length, 0, False)
    return rows[:total]


def span_mask_reference(
    generator: random.Random,
    num_positions: int,
    prob: float,
    length: int,
    min_masks: int,
    equal_counts: bool,
    lengths: Sequence[int],
) -> list[list[bool]]:
    """Draw one span mask per length, `[B][num_positions]`, True for masked frames, in plain Python."""
    batch: list[set[int]] = []
    for size in lengths:
        masked: set[int] = set()
        if size >= 2:
            num_spans = max(min_masks, math.floor(prob * size / length + generator.random()))
            # a span that starts in time to fit leaves the last frame visible; a short row has too few such starts
            num_starts = size - length if size - length > num_spans else num_spans + 1
            for start in generator.sample(range(num_starts), num_spans):
                masked.update(range(start, min(start + length, size)))
            if len(masked) == size:
                # not published: the public code stops here
                masked.remove(generator.randrange(size))
        batch.append(masked)
    if equal_counts:
        fewest = min(len(masked) for masked in batch)
        batch = [set(generator.sample(sorted(masked), fewest)) for masked in batch]
    return [[position in masked for position in range(num_positions)] for masked in batch]


def _check(
    ids: npt.NDArray[np.int64],
    num_positions: int,
    prob: float,
    length: int,
    min_masks: int,
    equal_counts: bool,
    lengths: npt.NDArray[np.int64] | None,
) -> npt.NDArray[np.int64]:
    """The frames of each row, int64 `[B]`."""
    if num_positions < 2:
        raise ValueError(
            f"`num_positions` must be >= 2, but is {num_positions} instead. "
            "A row needs a frame to mask and one to stay visible."
        )
    if not 0 < prob <= 1:
        raise ValueError(f"`mask.prob` must be in (0, 1], but is {prob} instead.")
    if not 1 <= length < 2**31:
        raise ValueError(f"`mask.length` must be in [1, 2**31), but is {length} instead.")
    if min_masks < 0:
        raise ValueError(f"`mask.min_masks` must be >= 0, but is {min_masks} instead.")
    if lengths is None:
        return np.full(len(ids), num_positions, dtype=np.int64)
    sizes = np.ascontiguousarray(lengths)
    if sizes.shape != ids.shape or sizes.dtype != np.int64:
        raise ValueError(f"`lengths` must be int64 [{len(ids)}], but is {sizes.dtype} {list(sizes.shape)} instead.")
    wrong = sizes[(sizes < 0) | (sizes > num_positions)]
    if wrong.size:
        raise ValueError(f"`lengths` must be in [0, {num_positions}], but one is {wrong[0]} instead.")
    if equal_counts and sizes.size and sizes.min() < 2:
        raise ValueError(
            f"`lengths` must be >= 2 with `mask.equal_counts`, but one is {sizes.min()} instead. Nothing can be "
            "masked in such a row, and hence in no other: leave it out of the batch, or set `mask.equal_counts` false."
        )
    return sizes


@compiled
def _fill_rows(
    rows: npt.NDArray[np.int64],
    states: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    num_positions: int,
    prob: float,
    length: int,
    min_masks: int,
    equal_counts: bool,
) -> int:
    """Write the masked rows of all samples into `rows`, and return how many there are; moves `states` on."""
    # a short row may have more possible starts than frames
    flags = np.zeros(max(num_positions, min_masks) + 2, dtype=np.uint8)
    counts = np.empty(len(sizes), dtype=np.int64)
    total = 0
    for b in range(len(sizes)):
        first = total
        if sizes[b] >= 2:
            states[b], total = _draw_spans(
                rows, first, flags, states[b], b * num_positions, sizes[b], prob, length, min_masks
            )
        counts[b] = total - first
    if not equal_counts or len(sizes) == 0:
        return total
    fewest = counts.min()
    read = total = 0
    for b in range(len(sizes)):
        choose(flags, states[b], counts[b], counts[b] - fewest)
        for i in range(counts[b]):
            # no branch: a row that is dropped is overwritten by the next; reading is never behind writing
            rows[total] = rows[read + i]
            total += 1 - flags[i]
            flags[i] = 0
        read += counts[b]
    return total


@compiled
def _draw_spans(
    rows: npt.NDArray[np.int64],
    first: int,
    flags: npt.NDArray[np.uint8],
    state: np.uint64,
    base: int,
    size: int,
    prob: float,
    length: int,
    min_masks: int,
) -> tuple[np.uint64, int]:
    """Write `base` plus each masked frame from `rows[first]` on; return the new state and where the rows end.

    `flags` are clear before and after.
    """
    state += GOLDEN
    num_spans = max(min_masks, np.int64(prob * size / length + unit(state)))
    num_starts = size - length if size - length > num_spans else num_spans + 1
    state = choose(flags, state, num_starts, num_spans)
    total = first
    end = 0
    for start in range(num_starts):
        if flags[start]:
            flags[start] = 0
            stop = min(start + length, size)
            for position in range(max(start, end), stop):
                rows[total] = base + position
                total += 1
            end = stop
    if total - first == size:
        # the row is masked whole: one frame, any, becomes visible
        state += GOLDEN
        total -= 1
        for i in range(first + below(state, size), total):
            rows[i] = rows[i + 1]
    return state, total
