"""ema_update_: against fp64 and torch._foreach_lerp_, in every form: reference, C++ on each instruction set, Triton."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from d2v_fast.ops import ema_update_
from d2v_fast.ops.ema import ema_update_reference
from tests.helpers.common import DTYPES, non_contiguous
from tests.ops.ema_reference import WORKING, expected, make


def assert_copied(copy: Tensor, teacher: Tensor) -> None:
    """Assert the nearest value; Triton's interpreter truncates, while the compiled kernel rounds to nearest even."""
    if copy.device.type == "cpu" and copy.dtype == torch.bfloat16:
        torch.testing.assert_close(copy.float(), teacher, rtol=2**-7, atol=0)
    else:
        assert torch.equal(copy, teacher.to(copy.dtype))


def triton_tolerance(device: torch.device) -> dict[str, float]:
    """Return one unit in the last place for the compiled kernel; the interpreter's fma also rounds the product."""
    return {"rtol": 1.2e-7, "atol": 1e-38} if device.type == "cuda" else {"rtol": 2.4e-7, "atol": 1e-9}


def launcher(device: torch.device):
    """The Triton launcher: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels.ema import ema_update

    return ema_update


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("working_dtype", WORKING, ids=str)
def test_matches_fp64(device, decay, student_dtype, working_dtype):
    teacher, student, working = make(device, student_dtype, working_dtype)
    want = expected(teacher, student, decay)
    ema_update_(teacher, student, decay, working=working)
    for i, (got, right) in enumerate(zip(teacher, want, strict=True)):
        # one unit in the last place: fp64 then fp32 rounds twice
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38, msg=lambda m, i=i: f"tensor {i}: {m}")
        if working is not None:
            assert torch.equal(working[i], got.to(working_dtype)), (
                f"working copy {i} is not the nearest {working_dtype}"
            )


def test_matches_foreach_lerp(device):
    teacher, student, _ = make(device, torch.float32, None)
    other = [t.clone() for t in teacher]
    ema_update_(teacher, student, 0.9998)
    torch._foreach_lerp_(other, student, 1 - 0.9998)
    for got, right in zip(teacher, other, strict=True):
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)


@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("working_dtype", WORKING, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_triton_launcher(device, student_dtype, working_dtype, as_tensor):
    shapes = [(4096,), (5000,), (1,), (0,), (7, 3)]
    teacher, student, working = make(device, student_dtype, working_dtype, shapes)
    want = expected(teacher, student, 0.9999)
    decay = torch.tensor(0.9999, device=device) if as_tensor else None
    launcher(device)(teacher, student, 0.9999, decay, working or [])
    # a decay in fp32 is itself rounded: 1 - 0.9999 then is off by up to 3e-4 of itself
    tolerance = triton_tolerance(device) if not as_tensor else {"rtol": 1e-6, "atol": 4e-7}
    for i, (got, right) in enumerate(zip(teacher, want, strict=True)):
        torch.testing.assert_close(got, right, **tolerance)
        if working is not None:
            assert_copied(working[i], got)


def test_triton_launcher_odd_memory(device):
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16, [(66, 3), (9000,)])
    want = expected(teacher, student, 0.99)
    odd = (
        [non_contiguous(t) for t in teacher],
        [non_contiguous(s) for s in student],
        [non_contiguous(w) for w in working],
    )
    launcher(device)(odd[0], odd[1], 0.99, None, odd[2])
    shifted = torch.randn(8193, device=device)[1:]  # 4-byte aligned only
    before, read = shifted.clone(), torch.randn(8192, device=device)
    launcher(device)([shifted], [read], 0.99, None, [])
    torch.testing.assert_close(shifted, expected([before], [read], 0.99)[0], **triton_tolerance(device))
    for got, copy, right in zip(odd[0], odd[2], want, strict=True):
        torch.testing.assert_close(got, right, **triton_tolerance(device))
        assert_copied(copy, got)


def test_one_launch_for_a_model(device, monkeypatch):
    launch = launcher(device)
    from d2v_fast.kernels import ema

    launches = []

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(ema, "_ema_fwd_kernel", Counting())
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16, [(17,)] * 150)
    launch(teacher, student, 0.9, None, working)
    launch(teacher, student, 0.9, None, working)
    assert len(launches) == 2
    assert len({id(table.addresses) for table in ema._tables.values() if len(table.addresses) == 150}) == 1


def test_table_that_a_graph_has_captured_stays(device, monkeypatch):
    """A replay reads it, so its memory must not go to other tensors when those of later calls replace it."""
    launcher(device)
    from d2v_fast.kernels import ema

    def table(number):
        kept.append(make(device, torch.float32, None, [(8,)])[:2])
        return weakref.ref(ema._table(*kept[number], []).addresses)

    kept = []
    tables = [table(number) for number in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(ema, "_is_captured", lambda device: True)
        ema._table(*kept[0], [])
    tables += [table(number) for number in range(2, 3 + ema._TABLES_KEPT)]
    assert [one() is not None for one in tables[:3]] == [True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_working_copy(dtype):
    """Large enough for a working copy that is stored around the caches, in one piece or not, aligned or not."""
    shapes = [(4_300_000,), (1023,), (70_001,), (3, 5)]
    teacher, student, working = make(torch.device("cpu"), dtype, dtype, shapes)
    working[2] = torch.empty(70_002, dtype=dtype)[1:]
    want = expected(teacher, student, 0.9999)
    ema_update_(teacher, student, 0.9999, working=working)
    for got, copy, right in zip(teacher, working, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-7)
        assert torch.equal(copy, got.to(dtype))


def test_thread_count_does_not_matter():
    teacher, student, _ = make(torch.device("cpu"), torch.float32, None, [(100_003,), (5,), (70_001,)])
    other = [t.clone() for t in teacher]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ema_update_(teacher, student, 0.99)
        torch.set_num_threads(2)
        ema_update_(other, student, 0.99)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(teacher, other, strict=True))


def test_reference_agrees(device):
    teacher, student, working = make(device, torch.bfloat16, torch.float16)
    other, copies = [t.clone() for t in teacher], [torch.empty_like(w) for w in working]
    ema_update_(teacher, student, 0.9997, working=working)
    ema_update_reference(other, student, 0.9997, None, copies)
    for a, b in zip([*teacher, *working], [*other, *copies], strict=True):
        torch.testing.assert_close(a, b, rtol=1.2e-7 if a.dtype == torch.float32 else 1e-3, atol=1e-38)


def test_decay_one_touches_nothing(device):
    teacher, student, working = make(device, torch.float32, torch.bfloat16, [(40,)])
    student[0][3] = float("nan")
    working[0].fill_(7.0)
    before = teacher[0].clone()
    for decay in (1.0, torch.tensor(1.0, device=device)):
        ema_update_(teacher, student, decay, working=working)
        assert torch.equal(teacher[0], before)
        assert (working[0] == 7.0).all()
    launcher(device)(teacher, student, 1.0, torch.tensor(1.0, device=device), working)
    assert torch.equal(teacher[0], before)
    assert (working[0] == 7.0).all()


@pytest.mark.parametrize(("decay", "dtype"), [(0.75, torch.float32), (0.75, torch.float64), (0.9999, torch.float64)])
def test_decay_tensor(device, decay, dtype):
    teacher, student, _ = make(device, torch.float32, None)
    other = [t.clone() for t in teacher]
    ema_update_(teacher, student, torch.tensor(decay, dtype=dtype, device=device))
    ema_update_(other, student, decay)
    assert all(torch.equal(a, b) for a, b in zip(teacher, other, strict=True))


def test_closed_form(device):
    """With a constant student, n updates give student + decay^n (teacher - student)."""
    teacher, student = [torch.ones(64, device=device)], [torch.full((64,), 3.0, device=device)]
    for _ in range(50):
        ema_update_(teacher, student, 0.9)
    torch.testing.assert_close(teacher[0], torch.full((64,), 3.0 - 2.0 * 0.9**50, device=device), rtol=1e-6, atol=0)


def test_non_contiguous(device):
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16, [(66, 40), (9, 3, 5)])
    want = expected(teacher, student, 0.99)
    teacher, student, working = ([non_contiguous(x) for x in group] for group in (teacher, student, working))
    teacher.append(torch.randn(6, 8, device=device).t())
    student.append(torch.randn(8, 6, device=device).bfloat16())
    working.append(torch.empty(8, 6, device=device, dtype=torch.bfloat16))
    want.append(expected(teacher[-1:], student[-1:], 0.99)[0])
    ema_update_(teacher, student, 0.99, working=working)
    for got, copy, right in zip(teacher, working, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)
        assert torch.equal(copy, got.bfloat16())


def test_model_parameters_are_left_differentiable(device):
    model = torch.nn.Linear(4, 4).to(device)
    teacher = [p.detach().clone().float() for p in model.parameters()]
    ema_update_(teacher, list(model.parameters()), 0.5)
    model(torch.ones(1, 4, device=device)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("with_working", [False, True])
def test_opcheck(device, as_tensor, with_working):
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16 if with_working else None, [(5, 3), (7,)])
    decay = torch.tensor(0.9, device=device) if as_tensor else None
    torch.library.opcheck(torch.ops.d2v.ema_update_.default, (teacher, student, 0.9, decay, working or []))


def test_compile_fullgraph(device):
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16, [(5, 3), (7,)])
    want = expected(teacher, student, 0.9)
    compiled = torch.compile(lambda t, s, w: ema_update_(t, s, 0.9, working=w), fullgraph=True, backend="aot_eager")
    compiled(teacher, student, working)
    for got, copy, right in zip(teacher, working, want, strict=True):
        torch.testing.assert_close(got, right, rtol=1.2e-7, atol=1e-38)
        assert torch.equal(copy, got.bfloat16())


def test_empty_list(device):
    ema_update_([], [], 0.9)
    ema_update_([], [], torch.tensor(0.9, device=device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": []}, "as many tensors"),
        ({"student": [torch.zeros(4)]}, "shape of `teacher"),
        ({"student": [torch.zeros(3, dtype=torch.int64)]}, "fp32, bf16 or fp16"),
        ({"student": [torch.zeros(3, device="meta")]}, "must be on cpu"),
        ({"teacher": [torch.zeros(3, dtype=torch.bfloat16)]}, "must be fp32"),
        ({"working": [torch.zeros(2)]}, "shape of `teacher"),
        ({"decay": 1.5}, r"in \[0, 1\]"),
        ({"decay": float("nan")}, r"in \[0, 1\]"),
        ({"decay": torch.zeros(2)}, "0-d fp32"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "teacher": [torch.zeros(3)],
        "student": [torch.zeros(3)],
        "decay": 0.9,
        "working": None,
    } | change
    with pytest.raises(ValueError, match=message):
        ema_update_(arguments["teacher"], arguments["student"], arguments["decay"], working=arguments["working"])


def test_shared_memory_is_refused():
    x, flat = torch.zeros(4), torch.zeros(10)
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([x], [x], 0.9)
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([flat[:6]], [flat[4:]], 0.9)
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([x], [torch.zeros(4)], 0.9, working=[x])
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([flat[:5], flat[4:9]], [torch.zeros(5), torch.zeros(5)], 0.9)
    ema_update_([flat[:5]], [flat[5:]], 0.9)  # neighbors in one buffer are fine
    ema_update_([torch.zeros(4), torch.zeros(4)], [x, x], 0.9)  # a tied student parameter is only read


@pytest.mark.gpu
def test_cuda_graph(device):
    teacher, student, working = make(device, torch.bfloat16, torch.bfloat16, [(5000,), (7,)])
    decay = torch.tensor(0.9, device=device)
    ema_update_(teacher, student, decay, working=working)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(teacher, student, decay, working=working)
    before = [t.clone() for t in teacher]
    decay.fill_(0.25)
    graph.replay()
    for got, right in zip(teacher, expected(before, student, 0.25), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)
