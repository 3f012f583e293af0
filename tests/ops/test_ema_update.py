"""EmaUpdate, and what ema_update_ remembers: tensors that change after they were checked, lifetimes, host time."""

from __future__ import annotations

import copy
import gc
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2v_fast.ops import EmaUpdate, ema, ema_update_
from d2v_fast.ops._library import in_cpp
from tests.helpers.common import DTYPES, non_contiguous
from tests.ops.ema_reference import SHAPES, WORKING, expected, make

HAS_CPP = in_cpp("ema_prepare")
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture(params=["kernels", "no kernels"])
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let C++ check the lists, or Python, as in an installation without kernels."""
    if request.param == "no kernels":
        monkeypatch.setattr(ema, "in_cpp", lambda name: False)
    elif not HAS_CPP:
        pytest.skip("the C++ kernels are not built")
    return request.param


@pytest.fixture(params=["EmaUpdate", "ema_update_"])
def prepare(request: pytest.FixtureRequest, checks: str) -> Callable[[Lists], Callable[[float], None]]:
    """Check the lists once and return a function that updates them again, by either of the two."""

    def from_lists(lists: Lists) -> Callable[[float], None]:
        if request.param == "EmaUpdate":
            return EmaUpdate(lists[0], lists[1], working=lists[2])
        ema_update_(lists[0], lists[1], 1.0, working=lists[2])
        ema_update_(lists[0], lists[1], 0.5, working=lists[2])
        return lambda decay: ema_update_(lists[0], lists[1], decay, working=lists[2])

    return from_lists


def three(device: torch.device) -> Lists:
    teacher = [torch.randn(4, 4, device=device), torch.randn(7, device=device), torch.randn(4, 4, device=device)]
    return teacher, [torch.randn_like(t) for t in teacher], [torch.zeros_like(t).bfloat16() for t in teacher]


def assert_updated(lists: Lists, update: Callable[[float], None]) -> None:
    want = expected(*lists[:2], 0.25)
    update(0.25)
    for got, copied, right in zip(lists[0], lists[2], want, strict=True):
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)
        assert torch.equal(copied, right.to(copied.dtype))


def swap(x: Tensor) -> None:
    x.data = torch.randn(4, 4, device=x.device).to(x.dtype)


def put_elsewhere(x: Tensor) -> None:
    x.set_(torch.randn(4, 4, device=x.device).to(x.dtype))


def widen(x: Tensor) -> None:
    x.data = non_contiguous(x)


CHANGES = {
    "memory": swap,
    "set_": put_elsewhere,
    "transposed in place": lambda x: x.t_(),
    "gaps": widen,
    "values": lambda x: x.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("side", [0, 1, 2], ids=["teacher", "student", "working"])
def test_change_that_is_followed(device, prepare, side, change):
    lists = three(device)
    update = prepare(lists)
    assert_updated(lists, update)
    before = lists[side][2].detach().view(-1)
    content = before.clone()
    change(lists[side][2])
    moved = lists[side][2].data_ptr() != before.data_ptr()
    for _ in range(2):
        assert_updated(lists, update)
    # memory that was left is not written any more
    assert not moved or torch.equal(before, content)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [1, 2], ids=["student", "working"])
def test_other_dtype(device, prepare, side, dtype):
    lists = three(device)
    update = prepare(lists)
    lists[side][0].data = lists[side][0].data.to(dtype)
    assert_updated(lists, update)


REFUSED = {
    "larger": (0, lambda x, lists: x.resize_(5, 4), "shape"),
    "smaller": (0, lambda x, lists: x.resize_(3, 4), "shape"),
    "smaller student": (1, lambda x, lists: x.resize_(3, 4), "shape"),
    "smaller working copy": (2, lambda x, lists: x.resize_(2, 4), "shape"),
    "one more dimension": (0, lambda x, lists: x.unsqueeze_(0), "shape"),
    "same number of elements": (1, lambda x, lists: x.resize_(2, 8), "shape"),
    "lower teacher": (0, lambda x, lists: setattr(x, "data", x.data.bfloat16()), "must be fp32"),
    "fp64 student": (1, lambda x, lists: setattr(x, "data", x.data.double()), "fp32, bf16 or fp16"),
    "integers": (2, lambda x, lists: setattr(x, "data", x.data.to(torch.int16)), "fp32, bf16 or fp16"),
    "shared": (0, lambda x, lists: setattr(x, "data", lists[1][0].data), "share memory"),
    "shared with a neighbor": (0, lambda x, lists: x.set_(lists[0][2].detach()), "share memory"),
    "expanded": (0, lambda x, lists: setattr(x, "data", torch.zeros(4, 1).expand(4, 4)), "a place in memory"),
}


@pytest.mark.parametrize(("side", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_change_that_is_refused(prepare, side, change, message):
    lists = three(torch.device("cpu"))
    update = prepare(lists)
    x = lists[side][0]
    good = x.detach().clone()
    change(x, lists)
    before = [t.clone() for t in lists[0]]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            update(0.25)
    # what `resize_` adds is NaN in these tests
    torch.testing.assert_close(lists[0], before, rtol=0, atol=0, equal_nan=True)
    x.data = good
    assert_updated(lists, update)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("working_dtype", WORKING, ids=str)
def test_matches_fp64(device, decay, student_dtype, working_dtype):
    teacher, student, working = make(device, student_dtype, working_dtype, SHAPES)
    update = EmaUpdate(teacher, student, working=working)
    for _ in range(2):
        want = expected(teacher, student, decay)
        update(decay)
        for i, (got, right) in enumerate(zip(teacher, want, strict=True)):
            torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)
            assert working is None or torch.equal(working[i], got.to(working_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_on_the_device(device, dtype):
    lists = three(device)
    update = EmaUpdate(lists[0], lists[1], working=lists[2])
    decay = torch.tensor(0.25, dtype=dtype, device=device)
    assert_updated(lists, lambda value: update(decay))
    decay.fill_(1.0)
    before = [t.clone() for t in lists[0]]
    update(decay)
    update(1.0)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], before, strict=True))
    for bad, message in ((1.5, "in"), (torch.zeros(2, device=device), "0-d"), (float("nan"), "in")):
        with pytest.raises(ValueError, match=message):
            update(bad)
    with pytest.raises(TypeError, match="`decay` must be a float or a 0-d tensor, but is None"):
        update(None)


def test_bad_lists_are_refused_when_prepared():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="share memory"):
        EmaUpdate([x], [x])
    with pytest.raises(ValueError, match="as many tensors"):
        EmaUpdate([x], [])
    with pytest.raises(TypeError, match=r"`student\[0\]` must be a tensor, but is NoneType"):
        EmaUpdate([x], [None])
    EmaUpdate([], [])(0.5)


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
def test_operation_checks_by_itself():
    """The operation also checks its arguments when it is called without the Python function."""
    x, flat = torch.zeros(3), torch.zeros(8)
    for arguments, message in (
        (([x], [x], 0.5, None, []), "share memory"),
        (([flat[:5]], [flat[4:9][:4].new_zeros(5)], 0.5, None, [flat[3:8]]), "share memory"),
        (([x], [torch.zeros(4)], 0.5, None, []), "shape"),
        (([x.double()], [x], 0.5, None, []), "fp32"),
        (([torch.zeros(1).expand(3)], [x], 0.5, None, []), "one place"),
        (([x], [torch.zeros(3)], 0.5, None, [x, x]), "1 teacher and 2 working"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.d2v.ema_update_(*arguments)
    with pytest.raises(ValueError, match="no prepared update has number -1"):
        torch.ops.d2v.ema_run(-1, 0.5, None)


def test_nothing_is_kept_alive(checks):
    lists = three(torch.device("cpu"))
    ema_update_(lists[0], lists[1], 0.5, working=lists[2])
    update = EmaUpdate(lists[0], lists[1], working=lists[2])
    update(0.5)
    watched = [weakref.ref(x) for group in lists for x in group]
    gone = weakref.ref(update)
    del lists
    gc.collect()
    assert all(x() is not None for x in watched)
    update(0.5)
    del update
    gc.collect()
    assert gone() is None
    assert all(x() is None for x in watched)


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
def test_handle_is_released():
    lists = three(torch.device("cpu"))
    update = EmaUpdate(lists[0], lists[1])
    first = update._prepared._handle
    assert torch.ops.d2v.ema_is_current(first)
    swap(lists[0][0])
    assert not torch.ops.d2v.ema_is_current(first)
    update(0.5)
    second = update._prepared._handle
    del update
    gc.collect()
    for handle in (first, second):
        with pytest.raises(ValueError, match="no prepared update"):
            torch.ops.d2v.ema_is_current(handle)
        torch.ops.d2v.ema_release(handle)


def test_memory_of_the_next_tensors():
    """Other tensors in the memory that those of the last call have left: another dtype must not be read as the old."""
    for trial in range(40):
        dtype = DTYPES[trial % 3]
        teacher = [torch.randn(64) for _ in range(4)]
        student = [torch.randn(64 * 4 // dtype.itemsize // 4).to(dtype) for _ in range(4)]
        teacher = [t[: s.numel()] for t, s in zip(teacher, student, strict=True)]
        want = expected(teacher, student, 0.75)
        ema_update_(teacher, student, 0.75)
        for got, right in zip(teacher, want, strict=True):
            torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)
        del teacher, student


def test_copied_together_with_its_tensors(device):
    lists = three(device)
    update = EmaUpdate(lists[0], lists[1], working=lists[2])
    update(0.5)
    (teacher, student, working), other = copy.deepcopy((lists, update))
    before = [t.clone() for t in lists[0]]
    assert_updated((teacher, student, working), other)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], before, strict=True))
    del other
    gc.collect()
    assert_updated(lists, update)


def test_module_that_moves(device):
    """`module.to` gives parameters other memory, and keeps the objects."""
    teacher, student = nn.Linear(5, 3, device=device), nn.Linear(5, 3, device=device)
    update = EmaUpdate(teacher.parameters(), student.parameters())
    update(0.5)
    student.to(torch.bfloat16)
    want = expected(list(teacher.parameters()), list(student.parameters()), 0.5)
    update(0.5)
    for got, right in zip(teacher.parameters(), want, strict=True):
        torch.testing.assert_close(got.detach(), right, rtol=1.2e-7, atol=1e-38)
    teacher.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"`teacher\[0\]` must be fp32"):
        update(0.5)


def test_versions_are_raised(device):
    lists = three(device)
    update = EmaUpdate(lists[0], lists[1], working=lists[2])
    for side in (0, 2):
        leaf = torch.randn(4, 4, device=device, requires_grad=True)
        y = (leaf * lists[side][0]).sum()
        update(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    assert [x._version for x in lists[1]] == [0, 0, 0]


def test_dispatch_modes_see_the_operation():
    lists = three(torch.device("cpu"))
    update, before = EmaUpdate(lists[0], lists[1]), [t.clone() for t in lists[0]]
    with FakeTensorMode(allow_non_fake_inputs=True):
        within = EmaUpdate(lists[0], lists[1])
        for decay in (0.5, 1.0):
            update(decay)
            within(decay)
            ema_update_(lists[0], lists[1], decay)
        fake = [torch.zeros(3)], [torch.ones(3)]
        EmaUpdate(*fake)(0.5)
        with pytest.raises(ValueError, match="shape"):
            ema_update_(fake[0], [torch.ones(4)], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], before, strict=True))
    for outside in (update, within):
        assert_updated((lists[0], lists[1], lists[0]), outside)


def test_threads():
    failed: list[object] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        teacher = [torch.randn(50 + i, generator=generator) for i in range(20)]
        student = [torch.randn(50 + i, generator=generator) for i in range(20)]
        update = EmaUpdate(teacher, student)
        for trial in range(60):
            want = expected(teacher, student, 0.5)
            if trial % 2:
                update(0.5)
            else:
                ema_update_(teacher, student, 0.5)
            failed.extend(i for i in range(20) if not torch.allclose(teacher[i], want[i], rtol=1.2e-7, atol=1e-38))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(device, backend):
    lists = three(device)
    update = EmaUpdate(lists[0], lists[1], working=lists[2])
    compiled = torch.compile(lambda decay: update(decay), backend=backend, fullgraph=True)
    for _ in range(2):
        assert_updated(lists, compiled)


def _median_ratio(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> float:
    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    ours()
    theirs()
    return statistics.median(seconds(ours) / seconds(theirs) for _ in range(rounds))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not HAS_CPP, reason="the C++ kernels are not built")
@pytest.mark.parametrize(("way", "limit"), [("lists", 3.0), ("prepared", 3.0), ("dicts", 6.0)])
def test_host_time(one_thread, way, limit):
    """Many small tensors: checks must not cost more than the update. The goals are in bench/goals.json, far below."""
    teacher, student = ([torch.randn(4) for _ in range(367)] for _ in range(2))
    update, named = EmaUpdate(teacher, student), [dict(enumerate(side)) for side in (teacher, student)]
    ours = {
        "lists": lambda: ema_update_(list(teacher), list(student), 0.999),
        "prepared": lambda: update(0.999),
        "dicts": lambda: ema_update_(*named, 0.999),
    }[way]
    assert _median_ratio(ours, lambda: torch._foreach_lerp_(teacher, student, 1e-3), 31) < limit
