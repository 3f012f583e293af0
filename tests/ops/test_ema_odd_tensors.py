"""Tensors without ordinary memory, and decays as tensors, in an update of averages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.ops import EmaUpdate, data2vec_loss, ema_update_, masked_smooth_l1, topk_target


def prepared(teacher: list[Tensor], student: list[Tensor], decay: float | Tensor, **options: list[Tensor]) -> None:
    EmaUpdate(teacher, student, **options)(decay)


UPDATES = pytest.mark.parametrize("update", [ema_update_, prepared])


def freed() -> Tensor:
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    return x


class Distributed(torch.Tensor):
    """As DTensor: of a shape, without memory of its own, and with operations of its own."""

    @staticmethod
    def __new__(cls) -> Distributed:
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    def to_local(self) -> Tensor:
        return torch.ones(3)

    @classmethod
    def __torch_dispatch__(cls, *args: object, **options: object) -> None:
        raise NotImplementedError


@UPDATES
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (freed, "has no memory, since its storage was freed"),
        (lambda: torch.ones(3).to_sparse(), r"has the layout torch.sparse_coo \(pass `.to_dense\(\)`\)"),
        (Distributed, r"is distributed \(pass the part of this process, `.to_local"),
    ],
    ids=["freed", "sparse", "distributed"],
)
@pytest.mark.parametrize("side", ["teacher", "student", "working"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_tensors_without_memory(update, make, message, side, as_dict):
    """Tensors without memory are named; reading their address would crash or blame another tensor."""
    sides = {name: [torch.zeros(2), torch.zeros(3)] for name in ("teacher", "student", "working")}
    sides[side][1] = make()
    if as_dict:
        sides = {name: dict(enumerate(tensors)) for name, tensors in sides.items()}
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"`{side}\[1\]` must be an ordinary dense tensor.* {message}"
    ):
        update(sides["teacher"], sides["student"], 0.5, working=sides["working"])


def test_storage_that_is_freed_and_comes_back():
    teacher, student = torch.zeros(3), torch.ones(3)
    update = EmaUpdate([teacher], [student])
    update(0.5)
    student.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"`student\[0\]` must be .* its storage was freed"):
        update(0.5)
    student.untyped_storage().resize_(12)
    student.fill_(1.0)
    update(0.0)
    assert teacher.tolist() == [1.0, 1.0, 1.0]


def test_negative_views_are_read_anew():
    base, teacher = torch.tensor([1.0, 2.0]), torch.zeros(2)
    update = EmaUpdate([teacher], [torch._neg_view(base)])
    base.fill_(5.0)
    update(0.0)
    assert teacher.tolist() == [-5.0, -5.0]


@UPDATES
def test_vmap_is_refused_in_words(update):
    def call(x: Tensor) -> Tensor:
        update([x], [torch.ones(3)], 0.5)
        return x

    with pytest.raises(ValueError, match=r"`teacher\[0\]` must be .* followed by a transform of `torch.func`"):
        torch.vmap(call)(torch.zeros(2, 3))


def test_update_is_a_constant_of_gradients():
    """As everything under `torch.no_grad()`, with the transform as without it."""
    teacher = torch.zeros(3)

    def loss(x: Tensor) -> Tensor:
        ema_update_([teacher], [x], 0.5)
        return (teacher + x).sum()

    assert torch.func.grad(loss)(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert teacher.tolist() == [0.5, 0.5, 0.5]
    x = torch.ones(3, requires_grad=True)
    loss(x).backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


@UPDATES
@pytest.mark.parametrize("value", [2.0, -0.1, float("nan")])
def test_decay_tensor_out_of_range(update, value):
    teacher = [torch.zeros(3)]
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\], but is"):
        update(teacher, [torch.ones(3)], torch.tensor(value))
    assert teacher[0].tolist() == [0.0, 0.0, 0.0]


@UPDATES
def test_working_copies_that_are_used_up(update):
    """A consumed iterator of working copies is an error, not an update without working copies."""
    for working in ([], iter([])):
        with pytest.raises(ValueError, match=r"`working` must have as many tensors as `teacher` \(1\), but has 0"):
            update([torch.zeros(3)], [torch.ones(3)], 0.5, working=working)


@pytest.mark.parametrize("rows", [[0, 1], 1, "01"])
def test_rows_that_are_no_tensor(rows):
    layers, pred = [torch.zeros(1, 4, 3)], torch.zeros(2, 3)
    for name, call in (
        ("rows", lambda: topk_target(layers, rows=rows)),
        ("rows", lambda: data2vec_loss(pred, layers, rows=rows)),
        ("lengths", lambda: topk_target(layers, lengths=rows)),
        ("target_rows", lambda: masked_smooth_l1(pred, torch.zeros(4, 3), target_rows=rows)),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be a 1-d int64 tensor, but is {type(rows).__name__} inst"):
            call()
