"""Masks for text: single tokens as in BERT (arXiv 1810.04805, section 3.1), or spans; data2vec uses both (2202.03555,
section 4.3).

Starts are drawn without replacement from the whole sequence. Each start masks itself and the tokens after it, and spans
may overlap or be cut at the end: the published 0.0875 starts per token and spans of 4 mask 30.7 % of the tokens.
Special tokens are then unmasked, so that all others are masked as often as in the public code, which masks the begin
and end tokens as well.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2v_fast.masking._random import below, checked_ids, choose, compiled, unit
from d2v_fast.masking.streams import GOLDEN, MASK, stream_keys

__all__ = ["TokenMasks", "token_mask_reference", "token_mask_rows"]


class TokenMasks(NamedTuple):
    """Input of the student, and the tokens in the loss.

    Attributes:
        rows: int64 `[N]`, flat indices `b * T + t` of the tokens in the loss, ascending.
        tokens: int64 `[B, T]`, a copy in which the chosen tokens are masked, replaced or unchanged.
    """

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def token_mask_rows(
    seed: int,
    epoch: int,
    sample_ids: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    *,
    prob: float,
    length: int,
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int],
    keep_prob: float = 0.0,
    random_prob: float = 0.0,
    loss_on_kept: bool = False,
    mask_specials: bool = False,
) -> TokenMasks:
    """Choose tokens of every sample, and mask, replace or keep each of them in the student's input.

    Args:
        seed: Seed of the run.
        epoch: Epoch. A mask depends on seed, epoch, sample id and the tokens only.
        sample_ids: int64 `[B]`.
        tokens: int64 `[B, T]`, in [0, V).
        lengths: int64 `[B]`, tokens of each sample before its padding, which is never chosen.
        prob: share of the tokens that the spans would cover without overlap, in (0, 1]; published: 0.35, and 0.15 for
            single tokens. A sample of S tokens gets `prob * S / length` spans, and at least one, rounded up or down at
            random so that the mean is exact.
        length: tokens per span; published: 4, and 1 for single tokens.
        vocab_size: V. Replacements are drawn uniformly from [0, V) without `special_ids`.
        mask_id: the mask token.
        special_ids: tokens that are never drawn as a replacement, nor chosen unless `mask_specials`.
        keep_prob: probability that a chosen token stays unchanged.
        random_prob: probability that a chosen token is replaced by another; otherwise it becomes the mask token.
        loss_on_kept: include unchanged and replaced tokens in `rows`.
        mask_specials: allow special tokens to be chosen.

    Returns:
        The masks. A sample with two or more tokens that may be chosen has at least one that is chosen and one that is
        not; in a shorter one nothing is chosen.

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> tokens = np.array([[0, 5, 6, 7, 8, 2]])
        >>> options = {"prob": 0.4, "length": 1, "vocab_size": 10, "mask_id": 9, "special_ids": [0, 1, 2, 9]}
        >>> token_mask_rows(0, 0, np.array([7]), tokens, np.array([6]), **options)
        TokenMasks(rows=array([1, 3]), tokens=array([[0, 9, 6, 9, 8, 2]]))
    """
    ids = checked_ids(sample_ids)
    known = np.unique(np.fromiter(special_ids, dtype=np.int64, count=len(special_ids)))
    _check(ids, tokens, lengths, prob, length, keep_prob, random_prob)
    _check_vocabulary(vocab_size, mask_id, known)
    seen = np.array(tokens, dtype=np.int64, order="C")
    rows = np.empty(seen.size + 1, dtype=np.int64)
    states = stream_keys(seed, MASK, epoch, ids)
    sizes = np.ascontiguousarray(lengths)
    total = _fill_rows(
        rows, seen, states, sizes, prob, length, vocab_size, mask_id, known, keep_prob, random_prob, loss_on_kept,
        mask_specials,
    )  # fmt: skip
    return TokenMasks(rows[:total], seen)


def token_mask_reference(
    generator: random.Random,
    tokens: Sequence[int],
    *,
    prob: float,
    length: int,
    vocab_size: int,
    mask_id: int,
    special_ids: Collection[int],
    keep_prob: float,
    random_prob: float,
    loss_on_kept: bool,
    mask_specials: bool,
) -> tuple[list[int], list[int]]:
    """Return the positions in the loss, and the student's tokens, of one sample, in plain Python."""
    size = len(tokens)
    seen = list(tokens)
    allowed = [position for position in range(size) if mask_specials or tokens[position] not in special_ids]
    if len(allowed) < 2:
        return [], seen
    num_spans = min(size, max(1, math.floor(prob * size / length + generator.random())))
    covered: set[int] = set()
    for start in generator.sample(range(size), num_spans):
        covered.update(range(start, start + length))
    chosen = [position for position in allowed if position in covered]
    # neither is published
    if not chosen:
        chosen = [generator.choice(allowed)]
    elif len(chosen) == len(allowed):
        chosen.remove(generator.choice(allowed))
    in_loss = []
    for position in chosen:
        draw = generator.random()
        if draw >= keep_prob + random_prob:
            seen[position] = mask_id
        elif draw >= keep_prob:
            seen[position] = generator.choice([token for token in range(vocab_size) if token not in special_ids])
        if loss_on_kept or draw >= keep_prob + random_prob:
            in_loss.append(position)
    return in_loss, seen


def _check(
    ids: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    prob: float,
    length: int,
    keep_prob: float,
    random_prob: float,
) -> None:
    if tokens.ndim != 2 or len(tokens) != len(ids) or tokens.dtype != np.int64:
        raise ValueError(f"`tokens` must be int64 [{len(ids)}, T], but is {tokens.dtype} {list(tokens.shape)} instead.")
    if lengths.shape != ids.shape or lengths.dtype != np.int64:
        raise ValueError(f"`lengths` must be int64 [{len(ids)}], but is {lengths.dtype} {list(lengths.shape)} instead.")
    wrong = lengths[(lengths < 0) | (lengths > tokens.shape[1])]
    if wrong.size:
        raise ValueError(f"`lengths` must be in [0, {tokens.shape[1]}], but one is {wrong[0]} instead.")
    if not 0 < prob <= 1:
        raise ValueError(f"`mask.prob` must be in (0, 1], but is {prob} instead.")
    if not 1 <= length < 2**31:
        raise ValueError(f"`mask.length` must be in [1, 2**31), but is {length} instead.")
    for name, value in (("keep_prob", keep_prob), ("random_prob", random_prob)):
        if not 0 <= value <= 1:
            raise ValueError(f"`mask.{name}` must be in [0, 1], but is {value} instead.")
    if keep_prob + random_prob > 1:
        raise ValueError(f"`mask.keep_prob` must be <= {1 - random_prob:g}, but is {keep_prob} instead.")


def _check_vocabulary(vocab_size: int, mask_id: int, special_ids: npt.NDArray[np.int64]) -> None:
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"`mask_id` must be in [0, {vocab_size}), but is {mask_id} instead.")
    wrong = special_ids[(special_ids < 0) | (special_ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"`special_ids` must be in [0, {vocab_size}), but one is {wrong[0]} instead.")
    if len(special_ids) >= vocab_size:
        raise ValueError(f"`vocab_size` must be > {len(special_ids)}, the special tokens, but is {vocab_size} instead.")


@compiled
def _fill_rows(
    rows: npt.NDArray[np.int64],
    seen: npt.NDArray[np.int64],
    states: npt.NDArray[np.uint64],
    sizes: npt.NDArray[np.int64],
    prob: float,
    length: int,
    vocab_size: int,
    mask_id: int,
    special_ids: npt.NDArray[np.int64],
    keep_prob: float,
    random_prob: float,
    loss_on_kept: bool,
    mask_specials: bool,
) -> int:
    """Write the rows in the loss into `rows`, change `seen` in place, and return how many rows there are."""
    num_positions = seen.shape[1]
    starts = np.zeros(num_positions, dtype=np.uint8)
    # positions that may be chosen, and those that are; one more, written before it is known whether it counts
    allowed = np.empty(num_positions + 1, dtype=np.int64)
    chosen = np.empty(num_positions + 1, dtype=np.int64)
    # most tokens lie beyond the common place of the special ones, at one end or both
    low, high = np.int64(0), np.int64(vocab_size)
    while low < len(special_ids) and special_ids[low] == low:
        low += 1
    num_high = 0
    while num_high < len(special_ids) - low and special_ids[len(special_ids) - 1 - num_high] == high - 1:
        high -= 1
        num_high += 1
    scattered = special_ids[low : len(special_ids) - num_high]
    num_words = vocab_size - len(special_ids)
    total = 0
    for b in range(len(sizes)):
        size = sizes[b]
        state = states[b]
        state += GOLDEN
        num_spans = min(size, max(1, np.int64(prob * size / length + unit(state))))
        state = choose(starts, state, size, num_spans)
        num_allowed = num_chosen = 0
        end = 0
        for position in range(size):
            token = seen[b, position]
            special = token < low or token >= high
            for i in range(len(scattered)):
                special |= token == scattered[i]
            may = mask_specials or not special
            if starts[position]:
                starts[position] = 0
                end = position + length
            # no branch: what does not count is overwritten by the next
            allowed[num_allowed] = position
            num_allowed += may
            chosen[num_chosen] = position
            num_chosen += may and position < end
        if num_allowed < 2:
            continue
        state += GOLDEN
        if num_chosen == 0:
            chosen[0] = allowed[below(state, num_allowed)]
            num_chosen = 1
        elif num_chosen == num_allowed:
            num_chosen -= 1
            for i in range(below(state, num_allowed), num_chosen):
                chosen[i] = chosen[i + 1]
        base = b * num_positions
        if keep_prob + random_prob == 0:
            for i in range(num_chosen):
                seen[b, chosen[i]] = mask_id
                rows[total + i] = base + chosen[i]
            total += num_chosen
            continue
        for i in range(num_chosen):
            state += GOLDEN
            draw = unit(state)
            hidden = draw >= keep_prob + random_prob
            if hidden:
                seen[b, chosen[i]] = mask_id
            elif draw >= keep_prob:
                state += GOLDEN
                word = below(state, num_words)
                for special_id in special_ids:
                    word += special_id <= word
                seen[b, chosen[i]] = word
            rows[total] = base + chosen[i]
            total += hidden or loss_on_kept
    return total
