"""The sizes on docs/recipes.md are those that the code computes, and the page is linked."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from d2v_fast.config import TeacherConfig, load_config
from d2v_fast.masking import block_mask_rows, span_mask_rows
from d2v_fast.teacher import decay_at
from d2v_fast.training.learning_rate import LearningRate
from tests.helpers.places import ROOT

PAGE = (ROOT / "docs/recipes.md").read_text()
BETAS, EPS = (0.9, 0.98), 1e-6


def mean_updates(deviation: float, published: bool, steps: int) -> list[float]:
    """Mean size of Adam's update at a rate of 1 for random gradients, step by step."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0)
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    sizes = []
    for step in range(1, steps + 1):
        gradient = deviation * torch.randn(4000, dtype=torch.float64, generator=generator)
        if published:
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            rate = math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
            update = rate * first / (second.sqrt() + EPS)
        else:
            before = parameter.detach().clone()
            parameter.grad = gradient
            optimizer.step()
            update = before - parameter.detach()
        sizes.append(float(update.abs().mean()))
    return sizes


@pytest.mark.parametrize(
    ("deviation", "percent"),
    [(1e-3, {1: 2.2, 10: 0.1}), (1e-4, {1: 12, 10: 1.4, 100: 0.07}), (1e-6, {1: 75, 10: 40, 100: 3.6})],
)
def test_epsilon_of_adam(deviation: float, percent: dict[int, float]) -> None:
    ours, theirs = (mean_updates(deviation, published, max(percent)) for published in (False, True))
    for step, expected in percent.items():
        found = 100 * (1 - theirs[step - 1] / ours[step - 1])
        assert found == pytest.approx(expected, rel=0.1, abs=0.05)
        assert re.search(rf"\b{expected:g} %", PAGE)


def test_rate_is_one_step_ahead() -> None:
    """As fairseq's tri-stage and cosine schedules compute it from the number of updates made."""
    speech = load_config(ROOT / "configs/speech_base.json", ["d2v.data.path=/x"]).d2v.schedule
    rate = LearningRate(speech, 5e-4, 1000)
    for update in (0, 1, 5000, 11_998):
        published = 5e-4 * (0.01 + 0.99 * update / 12_000)
        assert rate.at(update) - published == pytest.approx(5e-4 * 0.99 / 12_000)
        assert rate.at(update) == pytest.approx(5e-4 * (0.01 + 0.99 * (update + 1) / 12_000))
    published = 5e-4 * 0.01 ** ((390_000 - 372_000) / 28_000)
    assert 1 - rate.at(390_000) / published == pytest.approx(1.6e-4, rel=0.05)
    text = load_config(ROOT / "configs/text_base.json", ["d2v.data.path=/x", "d2v.data.tokenizer=/y"]).d2v.schedule
    assert LearningRate(text, 2e-4, 1000).at(0) == pytest.approx(2e-4 / 10_000)


@pytest.mark.parametrize(("utterances", "share"), [(24, 0.443), (309, 0.424), (512, 0.421)])
def test_equal_counts_of_a_whole_step(utterances: int, share: float) -> None:
    counts = [len(span_mask_rows(seed, 0, np.arange(utterances), 781, 0.65, 10)) for seed in range(20)]
    assert np.mean(counts) / (781 * utterances) == pytest.approx(share, abs=0.0015)
    assert f"{share:g} with {utterances}" in PAGE


def test_masked_patches() -> None:
    rows = block_mask_rows(0, 0, np.arange(20_000), 14, 120, 16, 196, 0.3)
    counts = np.bincount(rows // 196)
    assert (round(counts.mean(), 2), round(counts.std(), 2), round((counts == 120).mean(), 4)) == (119.53, 0.94, 0.6966)
    assert "119.53, deviation 0.94, 120 in 69.7 %" in PAGE


def test_decay_of_the_text_teacher() -> None:
    presets = load_config(ROOT / "configs/text_base.json", ["d2v.data.path=/x", "d2v.data.tokenizer=/y"]).d2v.teacher
    code = TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_steps=300_000)
    assert round(decay_at(presets, 100_000), 4) == 0.9999
    assert round(decay_at(code, 100_000), 4) == 0.9993


def test_page_is_linked_and_names_files_that_exist() -> None:
    assert "docs/recipes.md" in (ROOT / "README.md").read_text()
    assert "docs/recipes.md" in (ROOT / "docs/architecture.md").read_text()
    named = re.findall(r"`((?:tests|configs)/[\w/]+\.\w+)`", PAGE)
    assert len(named) >= 4
    assert all((ROOT / name).is_file() for name in named)
    # every row has as many cells as its header
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
