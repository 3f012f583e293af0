"""Features are computed in eval mode, and every module returns to its mode afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from d2v_fast.config import check_d2v
from d2v_fast.evaluation.features import evaluating, sequence_features
from d2v_fast.objectives.build import build_model
from tests.helpers.runs import TINY_SPEECH, TINY_TEXT


@pytest.mark.parametrize("base", [TINY_SPEECH, TINY_TEXT], ids=["speech", "text"])
def test_a_teacher_stays_in_eval_mode(base: dict) -> None:
    """It shares modules with a student that trains, and the training step refuses a teacher in training mode."""
    config, problems = check_d2v(base["d2v"])
    assert config is not None, problems
    student = build_model(config).student.train()
    teacher = copy.deepcopy(student.averaged).eval()
    whole = student.with_averaged(teacher)
    if base is TINY_TEXT:
        inputs, num_places = [torch.randint(5, 300, (n,)) for n in (4, 9, 6)], int
    else:
        inputs, num_places = [torch.randn(n) for n in (4000, 3000, 4800)], config.model.num_frames  # type: ignore
    together = sequence_features(whole, inputs, num_places=num_places)
    alone = [sequence_features(whole, [one], num_places=num_places)[0] for one in inputs]
    assert [len(rows) for rows in together] == [num_places(len(one)) for one in inputs]
    for rows, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert not any(module.training for module in teacher.modules())
    assert student.training
    assert all(module.training for module in student.averaged.modules())


def test_modes_come_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    during = []

    def fail() -> None:
        with evaluating(model):
            during.append(model[0].training)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert during == [False]
    assert [module.training for module in model.modules()] == [True, True, False]
