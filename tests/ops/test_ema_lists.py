"""ema_update_ and EmaUpdate accept iterators, dicts by name and integers, and refuse mistakes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from d2v_fast.ops import EmaUpdate, ema_update_
from tests.ops.ema_reference import expected

Update = Callable[..., None]


@pytest.fixture(params=["ema_update_", "EmaUpdate"])
def update(request: pytest.FixtureRequest) -> Update:
    def prepared(teacher: Any, student: Any, decay: Any, *, working: Any = None) -> None:
        EmaUpdate(teacher, student, working=working)(decay)

    return ema_update_ if request.param == "ema_update_" else prepared


class Net(nn.Module):
    """Tied weights, and a batch norm, which counts batches in an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def pair() -> tuple[Net, Net]:
    teacher, student = Net(), Net()
    for _ in range(3):
        student(torch.randn(8, 3))
    return teacher, student


def assert_averaged(teacher: dict[str, Tensor], before: dict[str, Tensor], student: dict[str, Tensor]) -> None:
    names = [name for name in before if before[name].is_floating_point()]
    want = expected([before[name] for name in names], [student[name] for name in names], 0.25)
    for name, right in zip(names, want, strict=True):
        torch.testing.assert_close(teacher[name].detach(), right, rtol=1.2e-7, atol=1e-38, msg=name)
    for name in before.keys() - set(names):
        assert torch.equal(teacher[name], student[name]), name


def test_iterators(update):
    teacher, student = pair()
    before = copy.deepcopy(dict(teacher.named_parameters()))
    update(teacher.parameters(), (p for p in student.parameters()), 0.25, working=iter([*before.values()][::1]))
    working = before
    averaged = dict(teacher.named_parameters())
    assert all(torch.equal(working[name], p) for name, p in averaged.items())


@pytest.mark.parametrize("kind", [tuple, nn.ParameterList, iter], ids=["tuple", "ParameterList", "iterator"])
def test_sequences(update, kind):
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    want = expected(list(teacher.parameters()), list(student.parameters()), 0.25)
    update(kind(list(teacher.parameters())), kind(list(student.parameters())), 0.25)
    assert all(torch.allclose(p, right, rtol=1.2e-7) for p, right in zip(teacher.parameters(), want, strict=True))


def test_iterator_that_is_used_up(update):
    teacher, parameters = nn.Linear(3, 2), nn.Linear(3, 2).parameters()
    list(parameters)
    with pytest.raises(ValueError, match=r"`student` must have as many tensors as `teacher` \(2\), but has 0"):
        update(teacher.parameters(), parameters, 0.25)


def test_dicts_are_matched_by_name(update):
    teacher = {"a": torch.zeros(3), "b": torch.zeros(3)}
    student = OrderedDict(b=torch.full((3,), 2.0), a=torch.ones(3))
    working = {"b": torch.empty(3).half(), "a": torch.empty(3).half()}
    update(teacher, student, 0.0, working=working)
    for side in (teacher, working):
        assert side["a"].tolist() == [1.0] * 3
        assert side["b"].tolist() == [2.0] * 3
    update(nn.ParameterDict(teacher), nn.ParameterDict(student), 0.0)


@pytest.mark.parametrize("with_working", [False, True])
def test_state_dict(update, with_working):
    """Buffers are averaged, the count of batches is the student's, tied weights move once."""
    teacher, student = pair()
    before, working = copy.deepcopy(teacher.state_dict()), copy.deepcopy(teacher).state_dict() if with_working else None
    update(teacher.state_dict(), student.state_dict(), 0.25, working=working)
    after = teacher.state_dict()
    assert_averaged(after, before, student.state_dict())
    assert after["norm.num_batches_tracked"] == 3
    assert teacher.last.weight is teacher.first.weight
    if working is not None:
        assert all(torch.equal(working[name], value) for name, value in after.items())


def test_weights_tied_on_one_side_only(update):
    teacher, student = pair()
    student.last.weight = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(ValueError, match="share memory"):
        update(teacher.state_dict(), student.state_dict(), 0.25)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_integers(device, update, as_tensor):
    """Integers are copied, in lists and dicts, unless the decay is 1."""
    counts = [torch.tensor(3, device=device), torch.tensor([True, False], device=device)]
    teacher = [
        torch.zeros(2, device=device),
        torch.tensor(0, device=device),
        torch.tensor([False, False], device=device),
    ]
    student = [torch.ones(2, device=device), *counts]
    working = [torch.empty(2, device=device), torch.tensor(9, device=device), torch.tensor([True, True], device=device)]
    values = (1.0, 0.5) if not as_tensor else (torch.tensor(1.0, device=device), torch.tensor(0.5, device=device))
    update(teacher, student, values[0], working=working)
    assert (teacher[1].item(), working[1].item()) == (0, 9)
    assert working[2].tolist() == [True, True]
    update(teacher, student, values[1], working=working)
    for side in (teacher, working):
        assert side[0].tolist() == [0.5, 0.5]
        assert side[1].item() == 3
        assert side[2].tolist() == [True, False]
    alone = [torch.tensor(0, device=device)]
    update(alone, [counts[0]], values[1])
    assert alone[0].item() == 3


def test_integers_that_do_not_match(update):
    for student in (torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)):
        teacher = [torch.zeros(2), torch.zeros(2, dtype=torch.int64)]
        with pytest.raises(ValueError, match=r"`student\[1\]` must be torch.int64 of shape \(2,\) as `teacher\[1\]`"):
            update(teacher, [torch.ones(2), student], 0.5)
        assert teacher[0].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"`teacher\[0\]` must be fp32"):
        update([torch.zeros(2, dtype=torch.complex64)], [torch.zeros(2)], 0.5)


X = torch.zeros(3)
MISTAKES = {
    "module": ((nn.Linear(3, 1), [X]), TypeError, r"`teacher` must be .* a module \(Linear\) instead: pass `list\(mod"),
    "student module": (([X], nn.Linear(3, 1)), TypeError, "`student` must be a list of tensors, but is a module"),
    "Sequential": ((nn.Sequential(nn.Linear(3, 1)), [X]), TypeError, "but is a module"),
    "tensor": (
        (X, [X]),
        TypeError,
        r"`teacher` must be a list of tensors, but is one tensor instead: pass `\[tensor\]`",
    ),
    "None": (([X, X.clone()], [X, None]), TypeError, r"`student\[1\]` must be a tensor, but is NoneType .*: leave it"),
    "no list": ((None, [X]), TypeError, "`teacher` must be a list of tensors, or another sequence .* NoneType instead"),
    "pairs": (
        (list(nn.Linear(3, 1).named_parameters()), list(nn.Linear(3, 1).named_parameters())),
        TypeError,
        r"`teacher\[0\]` must be a tensor, but is tuple instead: of `named_parameters\(\)` pass `dict\(",
    ),
    "numbers": (([1.0], [2.0]), TypeError, r"`teacher\[0\]` must be a tensor, but is float"),
    "set": (({X}, {X.clone()}), TypeError, "`teacher` must be .*, but is set instead"),
    "string": (("model.pt", [X]), TypeError, "`teacher` must be .*, but is str instead"),
    "dict and list": (({"a": X}, [X]), TypeError, "`student` must be a dict, as `teacher` is, to be matched by name"),
    "list and dict": (([X], {"a": X}), TypeError, "`teacher` must be a dict, as `student` is, to be matched by name"),
    "other names": (({"a": X, "b": X}, {"a": X, "c": X}), ValueError, "`student` must have the names .* 2 .*: b, c"),
    "None by name": (({"a": X}, {"a": None}), TypeError, "`student.* must be a tensor, but is NoneType"),
}


@pytest.mark.parametrize(("lists", "error", "message"), MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_mistakes(update, lists, error, message, decay):
    lists = copy.deepcopy(lists)
    with pytest.raises(error, match=message) as refused:
        update(*lists, decay)
    # one error, without that of the operation before it
    assert refused.value.__context__ is None or refused.value.__suppress_context__


def test_working_copies_by_mistake(update):
    x = [torch.zeros(3)], [torch.ones(3)]
    with pytest.raises(TypeError, match="`working` must be a list of tensors, but is a module"):
        update(*x, 0.5, working=nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"`working\[0\]` must be a tensor, but is NoneType"):
        update(*x, 0.5, working=[None])
    with pytest.raises(TypeError, match="`working` must be a dict, as `teacher`, `student` is"):
        update({"a": x[0][0]}, {"a": x[1][0]}, 0.5, working=[torch.zeros(3)])


def compiled(backend: str, function: Callable[..., None]) -> tuple[Callable[..., None], CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True), counter


class Schedule:
    decay = 0.0


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["argument", "attribute"])
def test_decay_that_changes_compiles_no_more(device, backend, where):
    """A value, then any value: fewer compilations than values, and far below the limit, past which nothing compiles."""
    schedule = Schedule()

    def by_argument(teacher: list[Tensor], student: list[Tensor], decay: float) -> None:
        ema_update_(teacher, student, decay)

    def by_attribute(teacher: list[Tensor], student: list[Tensor], decay: float) -> None:
        ema_update_(teacher, student, schedule.decay)

    run, counter = compiled(backend, by_argument if where == "argument" else by_attribute)
    teacher, student = [torch.randn(5, device=device)], [torch.randn(5, device=device)]
    for step in range(12):
        schedule.decay = 0.9 + 0.099 * step / 12
        want = expected(teacher, student, schedule.decay)
        run(teacher, student, schedule.decay)
        torch.testing.assert_close(teacher[0], want[0], rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


def test_compiled_with_a_decay_out_of_range(device):
    run, _ = compiled("aot_eager", lambda t, s, decay: ema_update_(t, s, decay))
    teacher, student = [torch.zeros(5, device=device)], [torch.ones(5, device=device)]
    for decay in (0.5, 0.6, 1.0, 0.0):
        run(teacher, student, decay)
    assert teacher[0].tolist() == [1.0] * 5
    with pytest.raises((RuntimeError, ValueError), match=r"in \[0, 1\]"):
        run(teacher, student, 1.5)


def test_compiled_with_dicts_and_integers(device):
    run, counter = compiled("aot_eager", lambda t, s, decay: ema_update_(t, s, decay))
    teacher = {"a": torch.zeros(2, device=device), "n": torch.tensor(0, device=device)}
    student = {"n": torch.tensor(5, device=device), "a": torch.ones(2, device=device)}
    for decay in (0.5, 0.25, 0.75):
        run(teacher, student, decay)
    assert teacher["n"].item() == 5
    torch.testing.assert_close(teacher["a"], torch.full((2,), 1 - 0.5 * 0.25 * 0.75, device=device))
    assert counter.frame_count <= 2
