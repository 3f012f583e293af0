from __future__ import annotations

import numpy as np
import pytest

from d2v_fast.masking._random import unit
from d2v_fast.masking.streams import AUGMENT, DROP, GOLDEN, MASK, ORDER, clone_keys, permutation, stream_keys, uniforms


def test_uniforms_are_splitmix64() -> None:
    # the published test vector of splitmix64 for seed 1234567
    published = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], dtype=np.uint64)
    drawn = uniforms(np.array([1234567], dtype=np.uint64), 3)[0]
    np.testing.assert_array_equal(drawn, (published >> np.uint64(11)) * 2.0**-53)


def test_compiled_and_numpy_streams_agree() -> None:
    keys = stream_keys(7, MASK, 3, np.arange(50))
    expected = uniforms(keys, 4)
    with np.errstate(over="ignore"):
        compiled = [[unit(key + np.uint64(n) * GOLDEN) for n in range(1, 5)] for key in keys]
    np.testing.assert_array_equal(compiled, expected)


def test_uniforms_are_uniform_and_independent_of_the_rest() -> None:
    keys = stream_keys(0, AUGMENT, 0, np.arange(20_000))
    drawn = uniforms(keys, 5)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    # chi-square with 99 degrees of freedom: mean 99, standard deviation 14
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * 14
    correlations = np.corrcoef(drawn.T) - np.eye(5)
    assert np.abs(correlations).max() < 5 / np.sqrt(20_000)
    np.testing.assert_array_equal(uniforms(keys[777:779], 2), drawn[777:779, :2])


@pytest.mark.parametrize("changed", [(1, MASK, 0), (0, AUGMENT, 0), (0, MASK, 1), (2**31, MASK, 0), (-1, MASK, 0)])
def test_every_counter_matters(changed: tuple[int, int, int]) -> None:
    ids = np.arange(100)
    keys, others = stream_keys(0, MASK, 0, ids), stream_keys(*changed, ids)
    assert len(np.unique(np.concatenate([keys, others]))) == 200


def test_clones_have_streams_of_their_own() -> None:
    keys = stream_keys(0, MASK, 0, np.arange(100))
    clones = clone_keys(keys, 16)
    assert len(np.unique([*keys, *clones.ravel()])) == 1700
    np.testing.assert_array_equal(clone_keys(keys[7:9], 3), clones[7:9, :3])


def test_permutation() -> None:
    orders = np.array([permutation(5, ORDER, epoch, 10) for epoch in range(3000)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(10), (3000, 1)))
    # every sample comes first equally often: 300 times, give or take 16
    assert np.abs(np.bincount(orders[:, 0], minlength=10) - 300).max() < 5 * 17
    assert len(permutation(5, ORDER, 0, 0)) == 0


def test_numbers_never_change() -> None:
    # a resumed run relies on them, also after an update of a library or of this project
    np.testing.assert_array_equal(permutation(0, ORDER, 0, 8), [0, 5, 7, 4, 3, 6, 2, 1])
    np.testing.assert_array_equal(stream_keys(1, MASK, 2, np.array([3]))[0], np.uint64(0x6B360221EDD5A20A))
    np.testing.assert_array_equal(stream_keys(1, DROP, 2, np.array([3]))[0], np.uint64(0xFD491DDDF0D22FA8))
