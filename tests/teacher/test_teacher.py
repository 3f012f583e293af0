"""The teacher: schedule, exactness, matching, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from d2v_fast.config import TeacherConfig
from d2v_fast.teacher import Teacher, decay_at


class Net(nn.Module):
    """Parameters of several shapes, and an integer buffer that an average would corrupt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.second = nn.Linear(5, 5, bias=False)
        self.register_buffer("index", torch.arange(732))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def train(net: nn.Module, steps: int, after_step) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        net(torch.randn(11, 7)).square().mean().backward()
        optimizer.step()
        after_step(step)


def test_schedule():
    config = TeacherConfig(decay_start=0.999, decay_end=0.9999, decay_steps=30_000)
    assert decay_at(config, 0) == 0.999
    assert decay_at(config, 15_000) == pytest.approx(0.99945, abs=1e-12)
    assert decay_at(config, 29_999) < 0.9999
    assert decay_at(config, 30_000) == decay_at(config, 10**9) == 0.9999
    assert decay_at(TeacherConfig(decay_start=0.9998, decay_end=0.9998), 1) == 0.9998


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_follows_the_average_in_fp64(dtype):
    net, config = Net(), TeacherConfig(decay_start=0.9, decay_end=0.99, decay_steps=7)
    teacher = Teacher(net, config, compute_dtype=dtype)
    truth = {name: p.detach().double() for name, p in net.named_parameters()}

    def after_step(step: int) -> None:
        teacher.update(step)
        decay = decay_at(config, step)
        for name, p in net.named_parameters():
            truth[name] = decay * truth[name] + (1 - decay) * p.detach().double()

    train(net, 12, after_step)
    average = teacher.state_dict()["average"]
    assert average.keys() == truth.keys()
    for name, right in truth.items():
        torch.testing.assert_close(average[name].double(), right, rtol=1e-5, atol=1e-6)
        assert (average[name] - net.get_parameter(name)).abs().max() > 1e-3, (
            "the teacher never moved apart from the student"
        )
        working = teacher.module.get_parameter(name)
        assert working.dtype == dtype
        assert torch.equal(working, average[name].to(dtype))
    assert torch.equal(teacher.module.index, torch.arange(732))


def test_module_is_frozen_and_apart():
    net = Net().train()
    teacher = Teacher(net, TeacherConfig())
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    mine = {p.data_ptr() for p in teacher.module.parameters()}
    assert not mine & {p.data_ptr() for p in net.parameters()}
    assert net.training


def test_decay_one_freezes():
    net = Net()
    teacher = Teacher(net, TeacherConfig(decay_start=1.0, decay_end=1.0), compute_dtype=torch.bfloat16)
    before = copy.deepcopy(teacher.state_dict()["average"])
    train(net, 3, teacher.update)
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict()["average"].items())


def test_flag_on_the_device():
    """A flag on the device decides whether an update is applied; without it nothing changes, even for NaN."""
    net = Net()
    teacher, other = (Teacher(net, TeacherConfig(decay_start=0.9998, decay_end=0.9998)) for _ in range(2))
    with torch.no_grad():
        net.first.weight += 1.0
    teacher.update(1, torch.tensor(True))
    other.update(1)
    for a, b in zip(teacher.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        net.first.weight.fill_(torch.nan)
    teacher.update(2, torch.tensor(False))
    for a, b in zip(teacher.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_notices_an_update(dtype):
    """Autograd refuses a backward pass through the teacher after an update or a restored state."""
    net = Net()
    teacher = Teacher(net, TeacherConfig(decay_start=0.5, decay_end=0.5), compute_dtype=dtype)
    state = copy.deepcopy(teacher.state_dict())
    for change in (lambda: teacher.update(1), lambda: teacher.load_state_dict(state)):
        x = torch.randn(3, 7, dtype=dtype, requires_grad=True)
        y = teacher.module(x).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_one_update_per_step():
    teacher = Teacher(Net(), TeacherConfig())
    teacher.update(1)
    with pytest.raises(ValueError, match="one update per optimizer step"):
        teacher.update(1)
    teacher.update(2)


def test_wrapped_names_match():
    net = Net()
    teacher = Teacher(net, TeacherConfig(decay_start=0.0, decay_end=0.0))
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = Net()
    teacher.follow(wrapped)
    teacher.update(1)
    # decay 0 copies: the names really led to the wrapped parameters
    assert torch.equal(teacher.module.first.weight, wrapped.module._orig_mod.first.weight)


def test_mismatches_are_errors():
    teacher = Teacher(Net(), TeacherConfig())
    with pytest.raises(ValueError, match="none of its 2 names"):
        teacher.follow(nn.Linear(3, 3))
    partial = Net()
    del partial.second
    with pytest.raises(ValueError, match=r"lacks 1 averaged parameters: second\.weight"):
        teacher.follow(partial)
    other = Net()
    other.second = nn.Linear(6, 5, bias=False)
    with pytest.raises(ValueError, match=r"second\.weight must have shape \(5, 5\), but has \(5, 6\)"):
        teacher.follow(other)
    with pytest.raises(ValueError, match="none of its 0 names"):
        Teacher(nn.ReLU(), TeacherConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_restored_exactly(dtype):
    net = Net()
    config = TeacherConfig(decay_start=0.9, decay_end=0.99, decay_steps=10)
    teacher = Teacher(net, config, compute_dtype=dtype)
    train(net, 4, teacher.update)
    saved, student = copy.deepcopy(teacher.state_dict()), copy.deepcopy(net.state_dict())

    restored_net = Net()
    restored = Teacher(restored_net, config, compute_dtype=dtype)
    restored_net.load_state_dict(student)
    restored.load_state_dict(saved)
    assert restored.last_step == 4
    for t in (teacher, restored):
        t.update(5)
    for (name, a), b in zip(teacher.module.named_parameters(), restored.module.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(x, restored.state_dict()["average"][n]) for n, x in teacher.state_dict()["average"].items())


def test_state_of_another_model_is_refused():
    teacher = Teacher(Net(), TeacherConfig())
    state = teacher.state_dict()
    with pytest.raises(ValueError, match="another model"):
        teacher.load_state_dict({**state, "average": {"x": torch.zeros(1)}})
    average = {**state["average"], "second.weight": torch.zeros(5, 6)}
    with pytest.raises(ValueError, match=r"second\.weight must have shape"):
        teacher.load_state_dict({**state, "average": average})
