"""Masks of data2vec 2.0 against statistics of 10,000 masks of each published kind, drawn by the published code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from d2v_fast.masking import num_masked_of, several_image_masks, several_sequence_masks
from tests.helpers.places import ROOT

KINDS: dict[str, Any] = json.loads((ROOT / "tests/golden2/mask_statistics.json").read_text())["kinds"]
NUM_MASKS, NUM_SAMPLES = 8, 1250


def drawn(kind: dict[str, Any]) -> np.ndarray:
    """Masks of a kind as bool `[10,000, T]`."""
    config, ids = kind["config"], np.arange(NUM_SAMPLES)
    prob, length, adjust = config["mask_prob"], config["mask_length"], config.get("mask_prob_adjust", 0.0)
    if "grid" in config:
        masks = several_image_masks(3, 0, ids, config["grid"], prob, length, adjust, num_masks=NUM_MASKS)
    else:
        # random masks, as for text: inverse blocks of one place
        inverse, lengths = config.get("inverse_mask", True), np.full(NUM_SAMPLES, kind["positions"])
        masks = several_sequence_masks(3, 0, ids, lengths, prob, length, adjust, num_masks=NUM_MASKS, inverse=inverse)
    flags = np.zeros(NUM_SAMPLES * NUM_MASKS * kind["positions"], dtype=bool)
    flags[masks.rows] = True
    assert not flags[masks.visible].any()
    assert flags.sum() + masks.visible.size == flags.size
    return flags.reshape(-1, kind["positions"])


def runs(lines: np.ndarray, value: bool) -> np.ndarray:
    """The lengths of all runs of `value` in bool `[L, T]`."""
    marked = np.pad(lines == value, ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(marked, axis=1)
    return np.argwhere(steps == -1)[:, 1] - np.argwhere(steps == 1)[:, 1]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_statistics_are_the_published_ones(name: str) -> None:
    kind = KINDS[name]
    masks = drawn(kind)
    [(count, _)] = kind["masked_per_row"].items()
    assert (masks.sum(1) == int(count)).all()

    theirs = np.array(kind["position_frequency_as_grid" if "grid" in kind["config"] else "position_frequency"])
    error = kind["position_frequency_standard_error"] * np.sqrt(2)
    assert np.abs(masks.mean(0) - theirs.ravel()).max() < 5 * error

    if "grid" in kind["config"]:
        lines = masks.reshape(-1, kind["config"]["grid"], kind["config"]["grid"])
        directions = {"runs_along_rows": lines, "runs_along_columns": lines.swapaxes(1, 2)}
    else:
        directions = {"runs": masks[:, None]}
    for key, along in directions.items():
        for word, value in (("masked", True), ("visible", False)):
            expected, found = kind[key][word], runs(along.reshape(-1, along.shape[2]), value)
            # runs of one mask depend on each other: count a mask as one draw
            assert abs(found.mean() - expected["mean"]) < 5 * expected["std"] * np.sqrt(2 / kind["draws"]), (key, word)


def test_lengths_and_counts() -> None:
    lengths, ids = np.array([9, 4, 9, 2]), np.array([5, 6, 7, 8])
    settings: dict[str, Any] = {"prob": 0.5, "length": 5, "prob_adjust": 0.05, "num_masks": 3, "inverse": False}
    masks = several_sequence_masks(0, 1, ids, lengths, **settings)
    flags = np.zeros(4 * 3 * 9, dtype=bool)
    flags[masks.rows] = True
    flags = flags.reshape(4, 3, 9)
    np.testing.assert_array_equal(flags.sum(2), np.repeat([[4], [2], [4], [1]], 3, axis=1))
    assert len(masks.rows) == 3 * num_masked_of(lengths, 0.5, inverse=False)
    assert masks.visible_lengths is not None
    np.testing.assert_array_equal(masks.visible_lengths, np.repeat([5, 2, 5, 1], 3))
    for row, (listed, num) in enumerate(zip(masks.visible, masks.visible_lengths, strict=True)):
        sample, size = divmod(row, 3)[0], lengths[row // 3]
        np.testing.assert_array_equal(listed[:num] - 9 * row, np.flatnonzero(~flags[sample, row % 3, :size]))
        assert (listed[num:] == flags.size).all()
    # a mask depends on its own sample and length only, and differs from the sample's other masks
    alone = several_sequence_masks(0, 1, ids[2:3], lengths[2:3], **settings)
    np.testing.assert_array_equal(alone.rows, np.flatnonzero(flags[2]))
    assert len({tuple(mask) for mask in flags[0].tolist()} | {tuple(mask) for mask in flags[2].tolist()}) == 6


def test_text_masks_are_uniform() -> None:
    masks = drawn(KINDS["text_base_T512"])
    together, share = (masks[:, 0] & masks[:, 1]).mean(), (246 / 512) * (245 / 511)
    assert abs(together - share) < 5 * np.sqrt(share * (1 - share) / len(masks))
