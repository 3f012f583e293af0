"""Features are computed in eval mode, and every module returns to its mode afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from d2v_fast.config import check_d2v
from d2v_fast.evaluation.features import evaluating, patch_features, sequence_features
from d2v_fast.objectives.build import build_model
from tests.helpers.masked_models import masked_config, random_masked_pair
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


@torch.no_grad()
def test_features_of_masked_training_are_the_encoders_output() -> None:
    """Not what its last MLP adds, from which the target is computed."""
    model, _ = random_masked_pair(masked_config("vision"))
    images = torch.randn(3, 1, 8, 8)
    hidden = model.student.eval()(images).last_hidden[:, 1:]
    found = patch_features(model.student, images, top_k=1)
    torch.testing.assert_close(found, F.layer_norm(hidden, hidden.shape[-1:]))
    added = model.student(images, top_k=1).features[0][:, 1:]
    assert not torch.allclose(found, F.layer_norm(added, hidden.shape[-1:]), atol=1e-2)
