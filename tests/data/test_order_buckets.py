"""Steps of similar lengths: every utterance once per epoch, the same for any split, bounded, little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from d2v_fast.config import BatchSplit
from d2v_fast.data.order import MicroStep, StepOrder
from d2v_fast.errors import DataError
from d2v_fast.masking.streams import ORDER, permutation

RATE = 16_000


def mixed(num: int, seed: int = 0) -> np.ndarray:
    """Lengths in samples as in LibriSpeech: 12 s in the mean, most of them 12 to 16 s, some down to 2 s."""
    generator = np.random.default_rng(seed)
    most, some = generator.beta(6, 1.6, num) * 16.8, generator.uniform(1.4, 14, num)
    return (np.where(generator.random(num) < 0.72, np.maximum(most, 2), some) * RATE).astype(np.int64)


def make_order(lengths: np.ndarray | None, batch: int, *, num: int = 0, **changes: int | None) -> StepOrder:
    accumulation, world_size = changes.pop("accumulation", 1), changes.pop("world_size", 1)
    split = BatchSplit.of(batch // (accumulation * world_size), accumulation, world_size)
    return StepOrder(num if lengths is None else len(lengths), split, lengths=lengths, **{"seed": 5, **changes})


def first(order: StepOrder, num_steps: int) -> list[MicroStep]:
    return list(itertools.islice(order, num_steps * order.split.accumulation))


def step_ids(order: StepOrder, num_steps: int) -> list[list[int]]:
    return [micro.step_sample_ids.tolist() for micro in first(order, num_steps)[:: order.split.accumulation]]


def test_every_sample_once_per_epoch() -> None:
    lengths = mixed(1000)
    order = make_order(lengths, 32)
    per_epoch = order.steps_per_epoch
    steps = step_ids(order, 3 * per_epoch)
    epochs = [steps[i * per_epoch : (i + 1) * per_epoch] for i in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(1000))
    assert epochs[0] != epochs[1] != epochs[2]
    # others are together, and steps of like length are not seen one after the other
    assert {frozenset(step) for step in epochs[0]} != {frozenset(step) for step in epochs[1]}
    longest = [lengths[step].max() for step in epochs[0]]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.5
    assert [micro.epoch for micro in first(order, 2 * per_epoch)] == [0] * per_epoch + [1] * per_epoch


@pytest.mark.parametrize(("accumulation", "world_size"), [(1, 1), (5, 1), (1, 3), (2, 3), (3, 5)])
def test_steps_do_not_depend_on_how_they_are_split(accumulation: int, world_size: int) -> None:
    lengths, limit = mixed(500), 20 * 17 * RATE
    whole = step_ids(make_order(lengths, 30, max_step_length=limit), 40)
    ranks = [
        first(
            make_order(lengths, 30, accumulation=accumulation, world_size=world_size, rank=rank, max_step_length=limit),
            40,
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [
            ranks[rank][step * accumulation + micro_step].sample_ids
            for micro_step in range(accumulation)
            for rank in range(world_size)
        ]
        assert np.concatenate(parts).tolist() == expected
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 30 // (accumulation * world_size)
        assert min(sizes) >= 1


def test_goes_on_at_any_step() -> None:
    lengths = mixed(300)
    whole = step_ids(make_order(lengths, 16), 60)
    for start in (1, 18, 19, 20, 37, 38, 59):
        resumed = make_order(lengths, 16, start_step=start, num_steps=60)
        assert step_ids(resumed, 60) == whole[start:]


@pytest.mark.parametrize("limit_s", [17, 100, 333, 10_000])
def test_sums_are_bounded(limit_s: int) -> None:
    lengths = mixed(400)
    order = make_order(lengths, 24, max_step_length=limit_s * RATE)
    for step in step_ids(order, order.steps_per_epoch):
        assert 1 <= len(step) <= 24
        assert len(step) * lengths[step].max() <= limit_s * RATE


def test_little_is_padded_or_cropped() -> None:
    lengths = mixed(28_539)
    order = make_order(lengths, 128)
    steps = step_ids(order, order.steps_per_epoch)
    padded = sum(len(step) * lengths[step].max() for step in steps)
    cropped = sum(len(step) * lengths[step].min() for step in steps)
    # 2.3 % of what is computed, and 2.3 % of what there is
    assert 1 - lengths.sum() / padded < 0.03
    assert 1 - cropped / lengths.sum() < 0.03
    # nearly all steps are full
    assert order.steps_per_epoch == -(-len(lengths) // 128)
    assert np.mean([len(step) == 128 for step in steps]) > 0.98


def test_samples_after() -> None:
    lengths = mixed(333)
    order = make_order(lengths, 20, max_step_length=16 * 12 * RATE)
    sizes = [len(step) for step in step_ids(order, 3 * order.steps_per_epoch)]
    assert len(set(sizes)) > 1
    for step in range(len(sizes)):
        assert order.samples_after(step) == sum(sizes[:step])
    assert order.samples_after(2 * order.steps_per_epoch) == 2 * 333


def test_without_lengths_nothing_changes() -> None:
    steps = []
    for rank in range(2):
        order = make_order(None, 12, num=50, accumulation=3, world_size=2, rank=rank, start_step=2, num_steps=11)
        assert (order.steps_per_epoch, order.split.global_batch) == (4, 12)
        steps.append(list(order))
        assert [order.samples_after(step) for step in range(9)] == [12 * step for step in range(9)]
    for step in range(9):
        epoch, position = divmod(step + 2, 4)
        expected = permutation(5, ORDER, epoch, 50)[position * 12 : (position + 1) * 12]
        for micro_step in range(3):
            for rank in range(2):
                micro = steps[rank][3 * step + micro_step]
                start = 2 * (2 * micro_step + rank)
                assert micro.epoch == epoch
                assert micro.sample_ids.tolist() == expected[start : start + 2].tolist()
                assert micro.step_sample_ids.tolist() == expected.tolist()
    assert len(steps[0]) == 27


@pytest.mark.parametrize("num", [1, 2, 3, 15, 16, 17, 31, 33])
def test_small_and_equal(num: int) -> None:
    for lengths in (np.full(num, 7), np.arange(1, num + 1), 10 ** (1 + np.arange(num) % 5)):
        order = make_order(lengths, 16)
        steps = step_ids(order, order.steps_per_epoch)
        assert sorted(itertools.chain(*steps)) == list(range(num))
        assert len(steps) == -(-num // 16)
        assert min(len(step) for step in steps) >= min(num, 8)


def test_order_of_equal_lengths_depends_on_the_seed_only() -> None:
    lengths = np.full(40, 9)
    assert step_ids(make_order(lengths, 8), 9) == step_ids(make_order(lengths, 8), 9)
    assert step_ids(make_order(lengths, 8), 9) != step_ids(make_order(lengths, 8, seed=6), 9)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 8 samples \(4 micro-steps x 2 processes\).*the smallest 5"):
        make_order(mixed(5), 16, accumulation=4, world_size=2)
    with pytest.raises(DataError, match=r"raise `d2v\.data\.max_batch_seconds`"):
        make_order(np.full(100, 10), 16, accumulation=4, world_size=2, max_step_length=79)
    with pytest.raises(DataError, match=r"must hold the longest sample \(10\), but is 9 instead"):
        make_order(np.full(100, 10), 16, max_step_length=9)
    with pytest.raises(DataError, match="at least 1 samples"):
        make_order(np.zeros(0, dtype=np.int64), 16)
    with pytest.raises(ValueError, match="`lengths` must hold 7 values, but holds 8"):
        StepOrder(7, BatchSplit.of(1), seed=0, lengths=np.ones(8, dtype=np.int64))
