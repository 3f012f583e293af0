from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.masking import token_mask_reference, token_mask_rows
from tests.helpers.common import assert_same_share

VOCAB = 50_265
MASK_ID = VOCAB - 1
# RoBERTa's: begin, padding, end, unknown, mask
SPECIALS = (0, 1, 2, 3, MASK_ID)
SPAN = {"prob": 0.35, "length": 4}
BERT = {"prob": 0.15, "length": 1, "keep_prob": 0.1, "random_prob": 0.1}
ROBERTA = {"vocab_size": VOCAB, "mask_id": MASK_ID, "special_ids": SPECIALS}
SMALL = {"vocab_size": 12, "mask_id": 11, "special_ids": (0, 1, 2, 3, 11)}

# of seed 0, epoch 1, samples 2 and 3, with 16 tokens each
SPAN_ROWS = [2, 3, 4, 5, 9, 10, 11, 12, 19, 20, 21, 22]
SPAN_TOKENS = [
    [0, 4, 11, 11, 11, 11, 9, 10, 4, 11, 11, 11, 11, 9, 10, 2],
    [0, 4, 5, 11, 11, 11, 11, 10, 4, 5, 6, 7, 8, 9, 10, 2],
]
REPLACING = {"prob": 0.4, "length": 1, "keep_prob": 0.3, "random_prob": 0.3}
REPLACING_ROWS = [1, 5, 6, 10, 11, 12, 18, 21, 23, 24, 25]
REPLACING_TOKENS = [
    [0, 11, 5, 6, 7, 8, 9, 10, 4, 5, 10, 6, 11, 9, 10, 2],
    [0, 4, 5, 6, 7, 11, 9, 4, 4, 11, 6, 7, 8, 9, 10, 2],
]


def blocks(num: int, size: int = 512, vocab_size: int = VOCAB) -> np.ndarray:
    """Begin, ordinary tokens, end; int64 `[num, size]`."""
    tokens = np.random.default_rng(0).integers(4, vocab_size - 1, (num, size))
    tokens[:, 0], tokens[:, -1] = 0, 2
    return tokens


def masked(tokens: np.ndarray, seed: int = 0, epoch: int = 0, first: int = 0, ids: np.ndarray | None = None, **more):
    """Whether each token is in the loss, bool `[B, T]`, and what the student sees."""
    ids = np.arange(first, first + len(tokens)) if ids is None else ids
    lengths = more.pop("lengths", np.full(len(tokens), tokens.shape[1]))
    rows, seen = token_mask_rows(seed, epoch, ids, tokens, lengths, **{**ROBERTA, **more})
    assert rows.dtype == seen.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    flags = np.zeros(tokens.size, dtype=bool)
    flags[rows] = True
    return flags.reshape(tokens.shape), seen


def test_published_spans() -> None:
    tokens = blocks(10_000)
    in_loss, seen = masked(tokens, **SPAN, mask_specials=True)
    np.testing.assert_array_equal(in_loss, seen != tokens)
    assert (seen[in_loss] == MASK_ID).all()
    shares = in_loss.mean(axis=1)
    assert shares.mean() == pytest.approx(0.307, abs=0.001)
    assert shares.std() == pytest.approx(0.011, abs=0.001)
    # a start hides begin, any of four hides end
    assert in_loss[:, 0].mean() == pytest.approx(0.35 / 4, abs=0.012)
    assert in_loss[:, -1].mean() == pytest.approx(0.30, abs=0.02)


def test_published_single_tokens() -> None:
    tokens = blocks(10_000)
    in_loss, seen = masked(tokens, **BERT, mask_specials=True)
    hidden = seen == MASK_ID
    # the published code trains on the mask tokens only
    np.testing.assert_array_equal(in_loss, hidden)
    assert in_loss.mean() == pytest.approx(0.120, abs=0.0005)
    everything, again = masked(tokens, **BERT, mask_specials=True, loss_on_kept=True)
    np.testing.assert_array_equal(again, seen)
    assert everything.mean() == pytest.approx(0.150, abs=0.0005)
    assert everything[:, 0].mean() == pytest.approx(0.15, abs=0.015)
    replaced = (seen != tokens) & ~hidden
    kept = everything & (seen == tokens)
    for part, share in ((hidden, 0.8), (replaced, 0.1), (kept, 0.1)):
        assert part.sum() / everything.sum() == pytest.approx(share, abs=0.002)
    # any ordinary token replaces, all of them alike
    assert not np.isin(seen[replaced], SPECIALS).any()
    assert seen[replaced].mean() == pytest.approx((4 + MASK_ID - 1) / 2, rel=0.01)
    few, _ = np.histogram(seen[replaced], bins=10, range=(4, MASK_ID))
    assert few == pytest.approx(few.mean(), rel=0.05)


@pytest.mark.parametrize("options", [SPAN, BERT], ids=["span", "bert"])
def test_specials_are_left_alone_and_others_are_hidden_as_often(options: dict) -> None:
    tokens = blocks(10_000)
    # ends of documents within the block
    tokens[:, [100, 101, 300]] = 2
    ordinary = ~np.isin(tokens, SPECIALS)
    with_specials, seen_with = masked(tokens, **options, mask_specials=True)
    without, seen = masked(tokens, **options)
    np.testing.assert_array_equal(seen[~ordinary], tokens[~ordinary])
    assert not without[~ordinary].any()
    assert (seen_with != tokens)[~ordinary].any()
    assert without[ordinary].mean() == pytest.approx(with_specials[ordinary].mean(), rel=0.005)


@pytest.mark.parametrize("mask_specials", [False, True], ids=["ordinary", "all"])
@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"prob": 0.35, "length": 4}, [0, 4, 5, 6, 7, 8, 9, 10, 2, 4, 5, 6, 2]),
        (REPLACING, [0, 4, 5, 6, 7, 2, 2]),
        ({"prob": 0.3, "length": 2, "random_prob": 0.5, "loss_on_kept": True}, [0, 4, 5, 6, 7, 8, 2]),
        # all chosen, so that one is given free
        ({"prob": 1.0, "length": 1}, [0, 4, 5, 2]),
        ({"prob": 0.9, "length": 9}, [4, 5, 6]),
        # often none of the ordinary ones, so that one is added
        ({"prob": 0.2, "length": 1, "keep_prob": 0.2}, [0, 2, 2, 2, 4, 5]),
    ],
    ids=str,
)
def test_same_distribution_as_reference(options: dict, row: list[int], mask_specials: bool) -> None:
    num_reference, num_compiled = 4000, 16_000
    generator = random.Random(3)
    more = {"keep_prob": 0.0, "random_prob": 0.0, "loss_on_kept": False, "mask_specials": mask_specials}
    more |= {**SMALL, **options}
    theirs_in_loss = np.zeros((num_reference, len(row)), dtype=bool)
    theirs = np.empty((num_reference, len(row)), dtype=np.int64)
    for i in range(num_reference):
        positions, theirs[i] = token_mask_reference(generator, row, **more)
        theirs_in_loss[i, positions] = True
    ours_in_loss, ours = masked(np.tile(np.array(row), (num_compiled, 1)), seed=4, **more)
    for position in range(len(row)):
        assert_same_share(ours_in_loss[:, position], theirs_in_loss[:, position])
        for token in np.union1d(ours[:, position], theirs[:, position]):
            assert_same_share(ours[:, position] == token, theirs[:, position] == token)
        # neighbors: spans
        assert_same_share(
            ours_in_loss[:, position] & ours_in_loss[:, position - 1],
            theirs_in_loss[:, position] & theirs_in_loss[:, position - 1],
        )
    for count in range(len(row) + 1):
        assert_same_share(ours_in_loss.sum(axis=1) == count, theirs_in_loss.sum(axis=1) == count)


def test_only_seed_epoch_and_sample_matter() -> None:
    tokens, ids = blocks(64), np.arange(64)
    more = {"seed": 3, "epoch": 4, **BERT}
    in_loss, seen = masked(tokens, **more)
    shuffled = np.random.default_rng(0).permutation(ids)
    for ours, expected in zip(masked(tokens[shuffled], ids=shuffled, **more), (in_loss, seen), strict=True):
        np.testing.assert_array_equal(ours, expected[shuffled])
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: masked(tokens[i : i + 1], first=i, **more)[1], ids.tolist()))
    np.testing.assert_array_equal(np.concatenate(parts), seen)
    for changed in ({"seed": 4}, {"epoch": 5}):
        others, _ = masked(tokens, **{**more, **changed})
        assert not (others == in_loss).all(axis=1).any()
    assert len(np.unique(in_loss, axis=0)) == 64


def test_every_epoch_hides_others_until_all_were_hidden() -> None:
    tokens = blocks(4)
    ever = np.zeros(tokens.shape, dtype=bool)
    for epoch in range(60):
        ever |= masked(tokens, epoch=epoch, **SPAN)[0]
    np.testing.assert_array_equal(ever, ~np.isin(tokens, SPECIALS))


def test_padding_does_not_matter() -> None:
    tokens = blocks(7, 100)
    lengths = np.array([0, 1, 2, 3, 12, 77, 100])
    for row, length in enumerate(lengths):
        tokens[row, length:] = 1
    in_loss, seen = masked(tokens, lengths=lengths, **SPAN, mask_specials=True)
    longer = np.concatenate([tokens, np.full((7, 60), 1)], axis=1)
    in_longer, seen_longer = masked(longer, lengths=lengths, **SPAN, mask_specials=True)
    np.testing.assert_array_equal(in_longer[:, :100], in_loss)
    np.testing.assert_array_equal(seen_longer[:, :100], seen)
    for row, length in enumerate(lengths):
        assert not in_longer[row, length:].any()
        assert (seen_longer[row, length:] == 1).all()
    assert (in_loss.sum(axis=1)[:2] == 0).all()
    assert (in_loss.sum(axis=1)[2:] >= 1).all()


def test_tokens_are_not_changed_in_place() -> None:
    tokens = blocks(8)
    before = tokens.copy()
    _, seen = masked(tokens, **SPAN)
    np.testing.assert_array_equal(tokens, before)
    # in any layout
    transposed = np.asfortranarray(tokens)
    np.testing.assert_array_equal(masked(transposed, **SPAN)[1], seen)


def test_specials_that_lie_anywhere() -> None:
    # as in BERT: padding 0, unknown, begin, end, mask in the midst
    specials = (0, 100, 101, 102, 103)
    tokens = np.random.default_rng(0).integers(1, 300, (500, 64))
    more = {"vocab_size": 300, "mask_id": 103, "special_ids": specials, "prob": 0.5, "length": 1, "random_prob": 0.5}
    _, seen = masked(tokens, **more)
    changed = seen != tokens
    assert not changed[np.isin(tokens, specials)].any()
    drawn = seen[changed & (seen != 103)]
    assert set(drawn) == set(range(300)) - set(specials)


def test_masks_never_change() -> None:
    # a resumed run relies on them
    row = [0, *(4 + i % 7 for i in range(14)), 2]
    for options, *expected in ((SPAN, SPAN_ROWS, SPAN_TOKENS), (REPLACING, REPLACING_ROWS, REPLACING_TOKENS)):
        tokens = np.array([row, row])
        more = {**SMALL, **options, "loss_on_kept": True}
        rows, seen = token_mask_rows(0, 1, np.array([2, 3]), tokens, np.array([16, 16]), **more)
        assert [rows.tolist(), seen.tolist()] == expected


@settings(deadline=None, max_examples=200)
@given(data=st.data(), size=st.integers(1, 40), mask_specials=st.booleans())
def test_some_hidden_some_visible(data: st.DataObject, size: int, mask_specials: bool) -> None:
    tokens = np.array(data.draw(st.lists(st.lists(st.integers(0, 11), min_size=size, max_size=size), min_size=1)))
    more = {
        "prob": data.draw(st.floats(0, 1, exclude_min=True)),
        "length": data.draw(st.integers(1, 50)),
        "keep_prob": data.draw(st.floats(0, 0.5)),
        "random_prob": data.draw(st.floats(0, 0.5)),
        "loss_on_kept": True,
    }
    counts = masked(tokens, **SMALL, **more, mask_specials=mask_specials)[0].sum(axis=1)
    allowed = np.full(len(tokens), size) if mask_specials else (~np.isin(tokens, SMALL["special_ids"])).sum(axis=1)
    assert (counts[allowed < 2] == 0).all()
    assert (counts[allowed >= 2] >= 1).all()
    assert (counts[allowed >= 2] < allowed[allowed >= 2]).all()


def test_no_rows() -> None:
    nothing = np.empty(0, dtype=np.int64)
    rows, seen = token_mask_rows(0, 0, nothing, nothing.reshape(0, 9), nothing, **SPAN, **ROBERTA)
    assert rows.shape == (0,)
    assert seen.shape == (0, 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prob": 0.0}, r"`mask.prob` must be in \(0, 1\], but is 0.0 instead"),
        ({"prob": float("nan")}, r"`mask.prob` must be in \(0, 1\]"),
        ({"length": 0}, r"`mask.length` must be in \[1, 2\*\*31\), but is 0"),
        ({"keep_prob": -0.1}, r"`mask.keep_prob` must be in \[0, 1\], but is -0.1"),
        ({"random_prob": 1.1}, r"`mask.random_prob` must be in \[0, 1\], but is 1.1"),
        ({"keep_prob": 0.6, "random_prob": 0.5}, "`mask.keep_prob` must be <= 0.5, but is 0.6"),
        ({"lengths": np.array([5, 21])}, r"`lengths` must be in \[0, 20\], but one is 21"),
        ({"lengths": np.array([5.0, 5.0])}, r"`lengths` must be int64 \[2\], but is float64"),
        ({"tokens": np.zeros((3, 20), dtype=np.int64)}, r"`tokens` must be int64 \[2, T\], but is int64 \[3, 20\]"),
        ({"tokens": np.zeros((2, 20), dtype=np.int32)}, r"`tokens` must be int64 \[2, T\], but is int32"),
        ({"sample_ids": np.arange(2.0)}, r"`sample_ids` must be int64 \[B\], but is float64 \[2\]"),
        ({"mask_id": 12}, r"`mask_id` must be in \[0, 12\), but is 12"),
        ({"special_ids": (0, 12)}, r"`special_ids` must be in \[0, 12\), but one is 12"),
        ({"special_ids": range(12)}, "`vocab_size` must be > 12, the special tokens, but is 12"),
    ],
    ids=str,
)
def test_bad_options(changed: dict, message: str) -> None:
    good = {"sample_ids": np.arange(2), "tokens": blocks(2, 20, 12), "lengths": np.array([20, 20]), **SMALL, **SPAN}
    token_mask_rows(0, 0, **good)
    with pytest.raises(ValueError, match=message):
        token_mask_rows(0, 0, **{**good, **changed})
