"""What may be passed as the layers of a target, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d2v_fast.ops import data2vec_loss, topk_target

ROWS = torch.arange(6)
PRED = torch.randn(6, 4)


@pytest.fixture(params=["topk_target", "data2vec_loss"])
def build(request: pytest.FixtureRequest) -> Callable[[Any], Tensor]:
    if request.param == "topk_target":
        return lambda layers: topk_target(layers, rows=ROWS)
    return lambda layers: data2vec_loss(PRED, layers, rows=ROWS).loss


@pytest.mark.parametrize(
    "kind",
    [tuple, iter, lambda layers: (x for x in layers), torch.stack],
    ids=["tuple", "iterator", "generator", "4-d"],
)
def test_sequences(build, kind):
    layers = [torch.randn(2, 3, 4) for _ in range(3)]
    assert torch.equal(build(kind(layers)), build(layers))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (torch.zeros(2, 3, 4), r"`layers` must be a list of tensors, but is one tensor instead: pass `\[tensor\]`"),
        ({"a": torch.zeros(2, 3, 4)}, "`layers` must be a list of tensors, .* but is dict instead"),
        (nn.Linear(4, 4), r"`layers` must be a list of tensors, but is a module \(Linear\)"),
        (None, "`layers` must be .* but is NoneType instead"),
        ([torch.zeros(2, 3, 4), None], r"`layers\[1\]` must be a tensor, but is NoneType instead"),
        ([(torch.zeros(2, 3, 4),)], r"`layers\[0\]` must be a tensor, but is tuple instead\."),
    ],
    ids=["tensor", "dict", "module", "None", "None within", "nested"],
)
def test_mistakes(build, layers, message):
    with pytest.raises(TypeError, match=message):
        build(layers)
