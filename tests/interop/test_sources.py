"""Which head fine-tuning begins with: that of its source, or a new one and why."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2v_fast.config import check_d2v
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.interop.heads import SavedHead
from d2v_fast.interop.sources import Found
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.finetune import Finetune
from tests.helpers.finetuning import TINY_CLASSIFY

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"keys": {}}, None),
        ({"keys": {"pooling": "token"}}, 'its `d2v.head.pooling` is "token", and that of the run "mean"'),
        ({"labels": ("a", "c", "b")}, "its classes have another order"),
        ({"labels": ("a", "b")}, 'it distinguishes 2 classes ("a", "b"), and the run 3 classes ("a", "b", "c")'),
        ({"labels": None}, "it distinguishes no classes"),
        ({"tensors": {"weight": torch.zeros(3, 4)}}, "its tensors have other names or shapes"),
    ],
    ids=str,
)
def test_the_head_of_a_source(
    changes: dict[str, object], why: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config, _ = check_d2v({**TINY_CLASSIFY["d2v"], "labels": list(LABELS)})
    assert isinstance(config, FinetuneConfig)
    model = build_objective(config)
    assert isinstance(model, Finetune)
    tensors = {name: torch.rand_like(value) for name, value in model.head.state_dict().items()}
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    head = replace(SavedHead(tensors, LABELS, {"pooling": "mean"}), **changes)  # type: ignore[arg-type]
    Found("there", config.model, model.student.state_dict(), head).copy_to(model.student, model.head, config)
    expected = tensors if why is None else before
    assert all(torch.equal(value, expected[name]) for name, value in model.head.state_dict().items())
    told = "\n".join(caplog.messages)
    assert ("the head is that of there" in told) == (why is None)
    assert (f"the head is a new one, not that of there: {why}" in told) == (why is not None)
