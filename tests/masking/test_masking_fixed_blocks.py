from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.masking import (
    block_mask_1d_reference,
    block_mask_1d_rows,
    inverse_block_mask_reference,
    inverse_block_mask_rows,
    num_masked_of,
    several_sequence_masks,
)
from tests.helpers.common import assert_same_share

# (grid or positions, prob, length, prob_adjust), as published for ViT-B and for speech
IMAGE = (14, 0.8, 3, 0.07)
SPEECH = (781, 0.5, 5, 0.05)


def image_masks(num_samples: int, *options, seed: int = 0, epoch: int = 0, num_masks: int = 1) -> np.ndarray:
    """The masks of samples 0 to `num_samples` - 1 as bool `[B * M, grid_size, grid_size]`."""
    rows = inverse_block_mask_rows(seed, epoch, np.arange(num_samples), *options, num_masks=num_masks)
    return _unflatten(rows, num_samples * num_masks, options[0] ** 2).reshape(-1, options[0], options[0])


def sequence_masks(num_samples: int, *options, inverse: bool, seed: int = 0) -> np.ndarray:
    """The masks of samples 0 to `num_samples` - 1 as bool `[B, num_positions]`."""
    rows = block_mask_1d_rows(seed, 0, np.arange(num_samples), *options, inverse=inverse)
    return _unflatten(rows, num_samples, options[0])


def _unflatten(rows: np.ndarray, num_masks: int, size: int) -> np.ndarray:
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    masks = np.zeros(num_masks * size, dtype=bool)
    masks[rows] = True
    return masks.reshape(num_masks, size)


def test_published_figures_for_images() -> None:
    for options, visible in ((IMAGE, 39), ((14, 0.75, 3, 0.1), 49), ((16, 0.75, 3, 0.1), 64)):
        masks = image_masks(20_000, *options)
        assert ((~masks).sum(axis=(1, 2)) == visible).all()
    visible = 1 - image_masks(50_000, *IMAGE).mean(axis=0)
    # a block at the border is cut, and the public code shows the same
    assert visible[0, 0] == pytest.approx(0.110, abs=0.01)
    assert visible[0, 1:-1].mean() == pytest.approx(0.155, abs=0.01)
    assert visible[1:-1, 1:-1] == pytest.approx(0.219, abs=0.012)


@pytest.mark.parametrize(
    ("options", "num_masked", "masked_run", "visible_run"),
    [(SPEECH, 390, 4.4, 4.4), ((781, 0.55, 5, 0.1), 429, 5.0, 4.1)],
    ids=["base", "large"],
)
def test_published_figures_for_speech(options: tuple, num_masked: int, masked_run: float, visible_run: float) -> None:
    masks = sequence_masks(2000, *options, inverse=False)
    assert (masks.sum(axis=1) == num_masked).all()
    assert masks.sum() / _num_runs(masks).sum() == pytest.approx(masked_run, abs=0.1)
    assert (~masks).sum() / _num_runs(~masks).sum() == pytest.approx(visible_run, abs=0.1)


def test_published_text_mask() -> None:
    # blocks of one position: every set of positions is equally likely
    masks = sequence_masks(20_000, 512, 0.48, 1, 0.0, inverse=True)
    assert ((~masks).sum(axis=1) == 266).all()
    assert masks.mean(axis=0) == pytest.approx(246 / 512, abs=5 * 0.5 / np.sqrt(20_000))
    pairs = (masks[:, 1:] & masks[:, :-1]).mean()
    assert pairs == pytest.approx(246 * 245 / (512 * 511), abs=0.001)


def _num_runs(masks: np.ndarray) -> np.ndarray:
    return masks[:, 0] + (masks[:, 1:] & ~masks[:, :-1]).sum(axis=1)


@pytest.mark.parametrize(
    "options",
    # the third has too few blocks, the fourth too many, the fifth none; a block may be even, or the whole grid
    [(14, 0.8, 3, 0.07), (7, 0.6, 2, 0.1), (8, 0.5, 3, 0.0), (6, 0.9, 2, 0.6), (4, 0.8, 3, 0.07), (3, 0.5, 3, 1.0)],
    ids=str,
)
def test_same_distribution_as_reference_2d(options: tuple) -> None:
    generator = random.Random(22)
    reference = np.array([inverse_block_mask_reference(generator, *options) for _ in range(2000)])
    compiled = image_masks(40_000, *options, seed=13)
    assert np.ptp(compiled.sum(axis=(1, 2))) == 0
    assert reference[0].sum() == compiled[0].sum()
    for row in range(options[0]):
        for col in range(options[0]):
            assert_same_share(compiled[:, row, col], reference[:, row, col])
    for axis in (1, 2):
        ours, theirs = (np.diff(masks, axis=axis).sum(axis=(1, 2)) for masks in (compiled, reference))
        for value in np.union1d(ours, theirs):
            assert_same_share(ours == value, theirs == value)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "options",
    [(60, 0.5, 5, 0.05), (31, 0.55, 4, 0.1), (40, 0.2, 3, 0.0), (20, 0.7, 1, 0.5), (9, 0.4, 9, 1.0), (2, 0.5, 1, 0.0)],
    ids=str,
)
def test_same_distribution_as_reference_1d(options: tuple, inverse: bool) -> None:
    generator = random.Random(23)
    reference = np.array([block_mask_1d_reference(generator, *options, inverse) for _ in range(3000)])
    compiled = sequence_masks(40_000, *options, inverse=inverse, seed=14)
    assert np.ptp(compiled.sum(axis=1)) == 0
    assert reference[0].sum() == compiled[0].sum()
    for position in range(options[0]):
        assert_same_share(compiled[:, position], reference[:, position])
    ours, theirs = _num_runs(compiled), _num_runs(reference)
    for value in np.union1d(ours, theirs):
        assert_same_share(ours == value, theirs == value)


def test_only_seed_epoch_sample_and_index_matter() -> None:
    ids = np.arange(32)

    def draw(ids: np.ndarray, seed: int = 3, epoch: int = 4, num_masks: int = 4) -> np.ndarray:
        """`[B, M, P]`."""
        rows = inverse_block_mask_rows(seed, epoch, ids, *IMAGE, num_masks=num_masks)
        return _unflatten(rows, len(ids) * num_masks, 196).reshape(len(ids), num_masks, 196)

    masks = draw(ids)
    shuffled = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(draw(shuffled), masks[shuffled])
    np.testing.assert_array_equal(np.concatenate([draw(part) for part in np.split(ids, [1, 20, 31])]), masks)
    np.testing.assert_array_equal(draw(ids, num_masks=2), masks[:, :2])
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: draw(ids[i : i + 1]), ids)
        np.testing.assert_array_equal(np.concatenate(list(parts)), masks)
    assert not (draw(ids, seed=4) == masks).all(axis=2).any()
    assert not (draw(ids, epoch=5) == masks).all(axis=2).any()
    assert len(np.unique(masks.reshape(-1, 196), axis=0)) == 32 * 4


def test_masks_of_a_sample_are_independent() -> None:
    # two masks of one image share as many visible patches as masks of two images do
    masks = ~image_masks(20_000, *IMAGE, num_masks=2).reshape(20_000, 2, 196)
    same = (masks[:, 0] & masks[:, 1]).sum(axis=1)
    other = (masks[:, 0] & np.roll(masks[:, 1], 1, axis=0)).sum(axis=1)
    assert abs(same.mean() - other.mean()) < 5 * np.sqrt((same.var() + other.var()) / 20_000)


def test_masks_never_change() -> None:
    # a resumed run relies on them
    rows = inverse_block_mask_rows(0, 1, np.array([2]), 4, 0.5, 2, 0.1, num_masks=2)
    np.testing.assert_array_equal(rows, [4, 5, 8, 9, 11, 12, 13, 14, 16, 17, 20, 23, 25, 29, 30, 31])
    rows = block_mask_1d_rows(0, 1, np.array([2]), 12, 0.5, 3, 0.1)
    np.testing.assert_array_equal(rows, [4, 7, 8, 9, 10, 11])


def test_counts_are_rounded_as_published() -> None:
    # 25 * (1 - 0.8) is 4.999999999999999 in floats, and 100 * 0.29 is 28.999999999999996
    assert (image_masks(3, 5, 0.8, 3, 0.07).sum(axis=(1, 2)) == 21).all()
    assert (image_masks(3, 14, 0.8, 3, 0.07).sum(axis=(1, 2)) == 157).all()
    assert (sequence_masks(3, 100, 0.29, 5, 0.0, inverse=False).sum(axis=1) == 28).all()


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_positions=st.integers(2, 40), inverse=st.booleans())
def test_exact_count(data: st.DataObject, num_positions: int, inverse: bool) -> None:
    prob = data.draw(st.floats(0.01, 0.99))
    marked = min(max(1, int(num_positions * (1 - prob if inverse else prob))), num_positions - 1)
    length, prob_adjust = data.draw(st.integers(1, num_positions)), data.draw(st.floats(0, 1))
    masks = sequence_masks(20, num_positions, prob, length, prob_adjust, inverse=inverse)
    assert ((masks != inverse).sum(axis=1) == marked).all()


def test_empty() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert inverse_block_mask_rows(0, 0, nothing, *IMAGE, num_masks=16).shape == (0,)
    assert block_mask_1d_rows(0, 0, nothing, *SPEECH).shape == (0,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prob": 0.0}, r"`mask.prob` must be in \(0, 1\), but is 0.0 instead"),
        ({"prob": 1.0}, r"`mask.prob` must be in \(0, 1\), but is 1.0 instead"),
        ({"prob": float("nan")}, r"`mask.prob` must be in \(0, 1\)"),
        ({"length": 0}, r"`mask.length` must be in \[1, 14\], but is 0"),
        ({"length": 15}, r"`mask.length` must be in \[1, 14\], but is 15"),
        ({"prob_adjust": -0.1}, r"`mask.prob_adjust` must be in \[0, 1\], but is -0.1"),
        ({"prob_adjust": 1.1}, r"`mask.prob_adjust` must be in \[0, 1\], but is 1.1"),
        ({"num_masks": 0}, "`mask.num_masks` must be >= 1, but is 0"),
        ({"sample_ids": np.arange(2, dtype=np.int32)}, r"`sample_ids` must be int64 \[B\], but is int32 \[2\]"),
    ],
    ids=str,
)
def test_bad_options(changed: dict, message: str) -> None:
    good = {"sample_ids": np.arange(2), "prob": 0.8, "length": 3, "prob_adjust": 0.07, "num_masks": 2}
    with pytest.raises(ValueError, match=message):
        inverse_block_mask_rows(0, 0, grid_size=14, **{**good, **changed})
    with pytest.raises(ValueError, match=message):
        block_mask_1d_rows(0, 0, num_positions=14, inverse=True, **{**good, **changed})


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="`grid_size` must be >= 2, but is 1 instead"):
        inverse_block_mask_rows(0, 0, np.arange(2), 1, 0.8, 1, 0.0)
    with pytest.raises(ValueError, match="`num_positions` must be >= 2, but is 1 instead"):
        block_mask_1d_rows(0, 0, np.arange(2), 1, 0.5, 1, 0.0)


def test_something_is_masked_and_something_visible() -> None:
    """Whatever the share is: a document may end in a block of two tokens."""
    several = several_sequence_masks(
        0, 0, np.arange(3), np.array([20, 2, 3]), 0.9, 1, 0.0, num_masks=2, inverse=True
    )  # fmt: skip
    assert several.visible_lengths is not None
    assert several.visible_lengths.tolist() == [1, 1, 1, 1, 1, 1]
    assert len(several.rows) == 2 * num_masked_of(np.array([20, 2, 3]), 0.9, inverse=True) == 2 * (19 + 1 + 2)
    assert (sequence_masks(5, 3, 0.01, 2, 0.05, inverse=False).sum(axis=1) == 1).all()
