from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.masking import channel_mask_rows, span_mask_reference, span_mask_rows
from tests.helpers.common import assert_same_share

# (frames, prob, length)
PUBLISHED = (781, 0.65, 10)

# of seed 0, epoch 1, samples 2 and 3, with 20 frames
RAGGED = [2, 3, 4, 8, 9, 10, 15, 16, 17, 18, 23, 24, 25, 27, 28, 29, 32, 33, 34]
EQUAL = [2, 3, 4, 8, 10, 15, 16, 17, 18, 23, 24, 25, 27, 28, 29, 32, 33, 34]


def span_masks(ids: np.ndarray, num_positions: int, *options, seed: int = 0, epoch: int = 0, **more) -> np.ndarray:
    """The masks as bool `[B, num_positions]`."""
    rows = span_mask_rows(seed, epoch, ids, num_positions, *options, **more)
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    masks = np.zeros(len(ids) * num_positions, dtype=bool)
    masks[rows] = True
    return masks.reshape(len(ids), num_positions)


def test_published_figures() -> None:
    # the public code: 49 % as it draws, with its position bias
    masks = span_masks(np.arange(20_000), *PUBLISHED, equal_counts=False)
    assert masks.mean() == pytest.approx(0.490, abs=0.001)
    # 0.065 starts per frame, all of them early enough to leave the last frame
    assert masks[:, 0].mean() == pytest.approx(0.65 / 10 * 781 / 771, abs=0.009)
    np.testing.assert_array_less(masks[:, :9].mean(axis=0), masks[:, 9:-11].mean())
    assert masks[:, 9:-11].mean(axis=0) == pytest.approx(0.496, abs=0.018)
    assert not masks[:, -1].any()


@pytest.mark.parametrize(("num_rows", "share"), [(8, 0.454), (12, 0.450), (24, 0.447)])
def test_published_figures_with_equal_counts(num_rows: int, share: float) -> None:
    batches = np.array([span_masks(np.arange(num_rows) + first, *PUBLISHED) for first in range(0, 24_000, num_rows)])
    counts = batches.sum(axis=2)
    assert (counts == counts[:, :1]).all()
    assert batches.mean() == pytest.approx(share, abs=0.004)
    assert batches[..., 0].mean() == pytest.approx(0.058, abs=0.008)
    assert not batches[..., -1].any()
    # punctured: a run had 16 frames before the cut
    assert 5 < counts.sum() / _num_runs(batches.reshape(-1, 781)).sum() < 9


def _num_runs(masks: np.ndarray) -> np.ndarray:
    return masks[:, 0] + (masks[:, 1:] & ~masks[:, :-1]).sum(axis=1)


def _longest_run(masks: np.ndarray) -> np.ndarray:
    longest = current = np.zeros(len(masks), dtype=int)
    for column in masks.T:
        current = (current + 1) * column
        longest = np.maximum(longest, current)
    return longest


@pytest.mark.parametrize("equal_counts", [False, True], ids=["ragged", "equal"])
@pytest.mark.parametrize(
    ("options", "min_masks", "lengths"),
    [
        ((60, 0.65, 10), 1, [60, 60, 60, 60]),
        pytest.param((60, 0.65, 10), 2, [60, 41, 35, 20], marks=pytest.mark.slow),
        pytest.param((24, 0.9, 3), 1, [24, 24], marks=pytest.mark.slow),
        # too short for as many starts as spans
        ((14, 0.65, 10), 1, [14, 11, 13]),
        pytest.param((9, 1.0, 1), 1, [9, 9], marks=pytest.mark.slow),
        # shorter than a span, down to two frames
        ((8, 0.65, 10), 1, [8, 5, 2]),
        pytest.param((6, 0.5, 2), 9, [6, 3], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_distribution_as_reference(options: tuple, min_masks: int, lengths: list, equal_counts: bool) -> None:
    num_reference, num_compiled = 2000, 4000
    generator = random.Random(21)
    reference = np.array(
        [span_mask_reference(generator, *options, min_masks, equal_counts, lengths) for _ in range(num_reference)]
    )
    more = {"min_masks": min_masks, "equal_counts": equal_counts, "lengths": np.array(lengths)}
    ids = np.arange(len(lengths))
    compiled = np.array([span_masks(ids, *options, seed=12, epoch=epoch, **more) for epoch in range(num_compiled)])

    for b in range(len(lengths)):
        ours, theirs = compiled[:, b], reference[:, b]
        counts, expected = ours.sum(axis=1), theirs.sum(axis=1)
        error = expected.std() * np.sqrt(1 / num_reference + 1 / num_compiled)
        assert abs(counts.mean() - expected.mean()) < 5 * error + 1e-9
        for statistic in (lambda masks: masks.sum(axis=1), _num_runs, _longest_run):
            for value in np.union1d(statistic(ours), statistic(theirs)):
                assert_same_share(statistic(ours) == value, statistic(theirs) == value)
        for position in range(options[0]):
            assert_same_share(ours[:, position], theirs[:, position])
    # rows are drawn independently, and the cut ties their counts only
    assert_same_share(compiled[:, 0, 1] & compiled[:, 1, 1], reference[:, 0, 1] & reference[:, 1, 1])


def test_only_seed_epoch_and_sample_matter() -> None:
    ids = np.arange(64)
    more = {"seed": 3, "epoch": 4, "equal_counts": False}
    masks = span_masks(ids, 200, 0.65, 10, **more)
    shuffled = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(span_masks(shuffled, 200, 0.65, 10, **more), masks[shuffled])
    np.testing.assert_array_equal(
        np.concatenate([span_masks(part, 200, 0.65, 10, **more) for part in np.split(ids, [1, 20, 63])]), masks
    )
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: span_masks(ids[i : i + 1], 200, 0.65, 10, **more), ids)
        np.testing.assert_array_equal(np.concatenate(list(parts)), masks)
    for changed in ({"seed": 4}, {"epoch": 5}):
        others = span_masks(ids, 200, 0.65, 10, **{**more, **changed})
        assert not (others == masks).all(axis=1).any()
    assert len(np.unique(masks, axis=0)) == 64


def test_equal_counts_cut_what_is_drawn_anyway() -> None:
    ids, lengths = np.arange(64), np.random.default_rng(1).integers(100, 201, 64)
    ragged = span_masks(ids, 200, 0.65, 10, equal_counts=False, lengths=lengths)
    equal = span_masks(ids, 200, 0.65, 10, lengths=lengths)
    assert not (equal & ~ragged).any()
    assert (equal.sum(axis=1) == ragged.sum(axis=1).min()).all()
    # the set of rows matters, not its order, nor which row is the smallest
    shuffled = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(span_masks(shuffled, 200, 0.65, 10, lengths=lengths[shuffled]), equal[shuffled])


def test_padding_does_not_matter() -> None:
    ids, lengths = np.arange(9), np.array([0, 1, 2, 3, 10, 11, 12, 77, 100])
    short = span_masks(ids, 100, 0.65, 10, equal_counts=False, lengths=lengths)
    long = span_masks(ids, 300, 0.65, 10, equal_counts=False, lengths=lengths)
    np.testing.assert_array_equal(long[:, :100], short)
    counts = short.sum(axis=1)
    assert (counts[:2] == 0).all()
    assert (counts[2:] >= 1).all()
    assert (counts[2:] < lengths[2:]).all()
    for mask, length in zip(long, lengths, strict=True):
        assert not mask[length:].any()


def test_masks_never_change() -> None:
    # a resumed run relies on them
    ragged = span_mask_rows(0, 1, np.array([2, 3]), 20, 0.5, 3, equal_counts=False)
    np.testing.assert_array_equal(ragged, RAGGED)
    np.testing.assert_array_equal(span_mask_rows(0, 1, np.array([2, 3]), 20, 0.5, 3), EQUAL)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_positions=st.integers(2, 40), equal_counts=st.booleans())
def test_some_masked_some_visible(data: st.DataObject, num_positions: int, equal_counts: bool) -> None:
    prob = data.draw(st.floats(0, 1, exclude_min=True))
    length, min_masks = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    lengths = np.array(data.draw(st.lists(st.integers(2, num_positions), min_size=1, max_size=8)))
    more = {"min_masks": min_masks, "equal_counts": equal_counts, "lengths": lengths}
    counts = span_masks(np.arange(len(lengths)), num_positions, prob, length, **more).sum(axis=1)
    assert (counts >= 1).all()
    assert (counts < lengths).all()
    assert not equal_counts or len(np.unique(counts)) == 1


@pytest.mark.parametrize("equal_counts", [False, True])
def test_one_row_and_none(equal_counts: bool) -> None:
    one = span_mask_rows(0, 0, np.array([7]), 300, 0.65, 10, equal_counts=equal_counts)
    np.testing.assert_array_equal(one, span_mask_rows(0, 0, np.array([7]), 300, 0.65, 10, equal_counts=False))
    nothing = np.empty(0, dtype=np.int64)
    assert span_mask_rows(0, 0, nothing, 300, 0.65, 10, equal_counts=equal_counts).shape == (0,)
    more = {"lengths": nothing, "equal_counts": equal_counts}
    assert span_mask_rows(0, 0, nothing, 300, 0.65, 10, **more).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prob": 0.0}, r"`mask.prob` must be in \(0, 1\], but is 0.0 instead"),
        ({"prob": 1.3}, r"`mask.prob` must be in \(0, 1\], but is 1.3 instead"),
        ({"prob": float("nan")}, r"`mask.prob` must be in \(0, 1\]"),
        ({"length": 0}, r"`mask.length` must be in \[1, 2\*\*31\), but is 0"),
        ({"min_masks": -1}, "`mask.min_masks` must be >= 0, but is -1"),
        ({"num_positions": 1}, "`num_positions` must be >= 2, but is 1 instead"),
        ({"lengths": np.array([5, 21])}, r"`lengths` must be in \[0, 20\], but one is 21"),
        ({"lengths": np.array([-1, 5])}, r"`lengths` must be in \[0, 20\], but one is -1"),
        ({"lengths": np.array([5, 1])}, "`lengths` must be >= 2 with `mask.equal_counts`, but one is 1 instead"),
        ({"lengths": np.array([5])}, r"`lengths` must be int64 \[2\], but is int64 \[1\]"),
        ({"lengths": np.array([5.0, 5.0])}, r"`lengths` must be int64 \[2\], but is float64 \[2\]"),
        ({"sample_ids": np.arange(2.0)}, r"`sample_ids` must be int64 \[B\], but is float64 \[2\]"),
    ],
    ids=str,
)
def test_bad_options(changed: dict, message: str) -> None:
    good = {"sample_ids": np.arange(2), "num_positions": 20, "prob": 0.65, "length": 10}
    span_mask_rows(0, 0, **good)
    with pytest.raises(ValueError, match=message):
        span_mask_rows(0, 0, **{**good, **changed})


def test_channel_masks() -> None:
    ids = np.arange(4000)
    # 48 * 0.5 / 20 = 1.2 spans: one of 20 channels in four of five samples, else two
    masked = np.zeros((len(ids), 48), dtype=bool)
    masked.ravel()[channel_mask_rows(3, 1, ids, 48, 0.5, 20)] = True
    generator = random.Random(0)
    expected = np.array(span_mask_reference(generator, 48, 0.5, 20, 0, False, [48] * 4000))
    assert abs((masked.sum(1) == 20).mean() - 0.8) < 0.02
    assert np.abs(masked.mean(0) - expected.mean(0)).max() < 0.04
    # a narrow model: a quarter of a span, and each sample's mask depends on itself alone
    few = channel_mask_rows(3, 1, ids, 24, 0.25, 24) // 24
    assert abs(len(np.unique(few)) / len(ids) - 0.25) < 0.03
    np.testing.assert_array_equal(np.unique(channel_mask_rows(3, 1, ids[7:8], 48, 0.5, 20)), np.flatnonzero(masked[7]))
    # other streams than those of the frames
    assert masked.ravel()[span_mask_rows(3, 1, ids, 48, 0.5, 20, equal_counts=False)].mean() < 0.75
