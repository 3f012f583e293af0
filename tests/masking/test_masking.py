from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import caching

from d2v_fast.masking import block_mask_reference, block_mask_rows, block_masks
from d2v_fast.masking._random import compiled
from tests.helpers.common import assert_same_share

PUBLISHED = (14, 120, 16, None, 0.3)

# of seed 0, epoch 1, sample 2 on a 4x4 grid
ROWS = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


def test_published_figures() -> None:
    # BEiT's own generator: mean 119.5, standard deviation 0.98, exactly 120 in 70 % of the images
    counts = block_masks(0, 0, np.arange(50_000), *PUBLISHED).sum(axis=(1, 2))
    assert counts.mean() == pytest.approx(119.5, abs=0.1)
    assert counts.std() == pytest.approx(0.95, abs=0.06)
    assert (counts == 120).mean() == pytest.approx(0.70, abs=0.015)
    assert counts.max() == 120
    assert counts.min() >= 100


@pytest.mark.parametrize(
    "options",
    [PUBLISHED, (14, 75, 16, 40, 0.3), (7, 30, 9, None, 0.5), (4, 10, 4, None, 0.3), (4, 10, 16, None, 0.3)],
    ids=lambda options: "-".join(map(str, options)),
)
def test_same_distribution_as_reference(options: tuple) -> None:
    num_reference = 3000
    generator = random.Random(20)
    reference = np.array([block_mask_reference(generator, *options) for _ in range(num_reference)])
    compiled = block_masks(11, 0, np.arange(40_000), *options)

    counts, expected = compiled.sum(axis=(1, 2)), reference.sum(axis=(1, 2))
    error = expected.std() * np.sqrt(1 / num_reference + 1 / len(counts))
    assert abs(counts.mean() - expected.mean()) < 5 * error + 1e-9
    for value in np.unique(expected):
        assert_same_share(counts == value, expected == value)
    for row in range(options[0]):
        for col in range(options[0]):
            assert_same_share(compiled[:, row, col], reference[:, row, col])
    # neighbors are masked together: blocks, not scattered patches
    assert_same_share(
        (compiled[:, :, 1:] != compiled[:, :, :-1]).mean(axis=(1, 2)) > 0.3,
        (reference[:, :, 1:] != reference[:, :, :-1]).mean(axis=(1, 2)) > 0.3,
    )


def test_rows_and_masks_are_the_same_thing() -> None:
    ids = np.array([5, 0, 2**40, 5])
    rows, masks = block_mask_rows(1, 2, ids, *PUBLISHED), block_masks(1, 2, ids, *PUBLISHED)
    assert rows.dtype == np.int64
    assert masks.shape == (4, 14, 14)
    np.testing.assert_array_equal(rows, np.flatnonzero(masks))
    np.testing.assert_array_equal(masks[0], masks[3])


def test_only_seed_epoch_and_sample_matter() -> None:
    ids = np.arange(64)
    masks = block_masks(3, 4, ids, *PUBLISHED)
    shuffled = np.random.default_rng(0).permutation(ids)
    np.testing.assert_array_equal(block_masks(3, 4, shuffled, *PUBLISHED), masks[shuffled])
    np.testing.assert_array_equal(
        np.concatenate([block_masks(3, 4, part, *PUBLISHED) for part in np.split(ids, [1, 20, 63])]), masks
    )
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: block_masks(3, 4, ids[i : i + 1], *PUBLISHED), ids)
        np.testing.assert_array_equal(np.concatenate(list(parts)), masks)
    for seed, epoch in ((4, 4), (3, 5)):
        others = block_masks(seed, epoch, ids, *PUBLISHED)
        assert not (others == masks).all(axis=(1, 2)).any()
    assert len(np.unique(masks.reshape(64, -1), axis=0)) == 64


def test_masks_never_change() -> None:
    # a resumed run relies on them
    rows = block_mask_rows(0, 1, np.array([2]), 4, 10, 4, None, 0.3)
    np.testing.assert_array_equal(rows, ROWS)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), grid_size=st.integers(2, 20))
def test_some_masked_some_visible(data: st.DataObject, grid_size: int) -> None:
    num_patches = data.draw(st.integers(1, grid_size**2 - 1))
    min_patches = data.draw(st.integers(1, grid_size**2))
    max_patches = data.draw(st.none() | st.integers(1, grid_size**2))
    min_aspect = data.draw(st.floats(0.01, 1))
    masks = block_masks(0, 0, np.arange(20), grid_size, num_patches, min_patches, max_patches, min_aspect)
    counts = masks.sum(axis=(1, 2))
    assert counts.min() >= 1
    assert counts.max() <= num_patches


def test_grid_too_small_for_any_rectangle() -> None:
    # every side of a rectangle of 3 patches rounds to 2, and must be shorter than the grid
    options = (2, 3, 3, None, 1.0)
    masks = block_masks(0, 0, np.arange(400), *options)
    assert (masks.sum(axis=(1, 2)) == 1).all()
    assert masks.mean(axis=0) == pytest.approx(0.25, abs=0.11)
    reference = block_mask_reference(random.Random(0), *options)
    assert np.sum(reference) == 1


def test_empty() -> None:
    assert block_mask_rows(0, 0, np.empty(0, dtype=np.int64), *PUBLISHED).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((14, 196, 16, None, 0.3), r"`mask.num_patches` must be in \[1, 195\], but is 196 instead"),
        ((14, 0, 16, None, 0.3), r"`mask.num_patches` must be in \[1, 195\], but is 0"),
        ((1, 1, 1, None, 0.3), r"`mask.num_patches` must be in \[1, 0\]"),
        ((14, 120, 0, None, 0.3), "`mask.min_patches` must be >= 1"),
        ((14, 120, 16, 0, 0.3), "`mask.max_patches` must be >= 1"),
        ((14, 120, 16, None, 0.0), r"`mask.min_aspect` must be in \(0, 1\]"),
        ((14, 120, 16, None, 1.5), r"`mask.min_aspect` must be in \(0, 1\]"),
    ],
)
def test_bad_options(options: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_mask_rows(0, 0, np.arange(2), *options)


@pytest.mark.parametrize("ids", [np.arange(4.0), np.arange(4).reshape(2, 2), np.arange(4, dtype=np.int32)])
def test_bad_ids(ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match="`sample_ids` must be int64"):
        block_mask_rows(0, 0, ids, *PUBLISHED)


def test_without_a_folder_for_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError("read-only")

    for locator in caching.CacheImpl._locator_classes:
        monkeypatch.setattr(locator, "ensure_cache_path", refuse)

    def twice(value: int) -> int:
        return 2 * value

    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(twice)
    assert compiled(twice)(4) == 8
