"""Learning-rate schedules against closed forms."""

from __future__ import annotations

import math

import pytest

from d2v_fast.config import ScheduleConfig
from d2v_fast.training.learning_rate import LearningRate


def rates(steps_per_epoch: int = 10, **fields) -> list[float]:
    schedule = LearningRate(ScheduleConfig(**fields), 2.0, steps_per_epoch)
    return [schedule.at(step) for step in range(schedule.num_steps)]


def test_warmup_is_linear_and_moves_at_once() -> None:
    assert rates(kind="constant", steps=6, warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    started = rates(kind="constant", steps=6, warmup_steps=4, initial_lr_ratio=0.2)
    assert started[:4] == pytest.approx([2 * (0.2 + 0.8 * n / 4) for n in (1, 2, 3, 4)])


def test_cosine_ends_at_its_final_ratio() -> None:
    found = rates(kind="cosine", steps=25, warmup_steps=5, final_lr_ratio=0.1)
    expected = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * n / 19)) / 2) for n in range(20)]
    assert found[5:] == pytest.approx(expected)
    assert found[5] == 2.0
    assert found[-1] == pytest.approx(0.2)


def test_linear_is_the_published_decay_of_text() -> None:
    found = rates(kind="linear", epochs=10, warmup_epochs=0.6, final_lr_ratio=0.0)
    # 6 of 100 steps of warm-up; update n of fairseq's polynomial decay uses 1 - (n - 6) / 94 of the peak
    assert found[5:] == pytest.approx([2.0] + [2 * (1 - (n - 6) / 94) for n in range(6, 100)])
    assert rates(kind="linear", steps=4, final_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_tri_stage() -> None:
    # the published speech schedule: 3 % warm-up, 90 % at the peak, 7 % exponential decay to 5 %
    found = rates(kind="tri_stage", steps=400, warmup_steps=12, hold_ratio=0.9, final_lr_ratio=0.05)
    assert found[11:372] == [2.0] * 361
    assert found[372:] == pytest.approx([2 * 0.05 ** (n / 28) for n in range(1, 29)])


def test_epochs_become_steps() -> None:
    schedule = LearningRate(ScheduleConfig(epochs=3, warmup_epochs=0.5), 1.0, steps_per_epoch=9)
    assert (schedule.num_steps, schedule.warmup_steps) == (27, 4)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "tri_stage"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1])
def test_shortest_runs(kind: str, steps: int, warmup: int) -> None:
    found = rates(kind=kind, steps=steps, warmup_steps=warmup, final_lr_ratio=0.5)
    assert len(found) == steps
    assert all(1.0 <= rate <= 2.0 for rate in found)


def test_after_the_end_it_stays() -> None:
    schedule = LearningRate(ScheduleConfig(steps=5, final_lr_ratio=0.5), 1.0, 1)
    assert schedule.at(4) == schedule.at(100) == pytest.approx(0.5)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_epochs"):
        LearningRate(ScheduleConfig(steps=5, warmup_epochs=1), 1.0, steps_per_epoch=9)
