"""masked_smooth_l1: values, gradients and moments against fp64, in the reference, C++ and Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import masked_smooth_l1
from d2v_fast.ops.masked_loss import masked_smooth_l1_reference, scale_gradient_reference
from tests.helpers.common import (
    DTYPES,
    assert_within_twice,
    non_contiguous,
)
from tests.ops.target_reference import plain_loss, plain_moments

BETAS = [0.0, 0.25, 2.0]


def launchers():
    """The Triton launchers of the loss and of the backward's scaling: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels.masked_loss import masked_smooth_l1 as launch
    from d2v_fast.kernels.masked_loss import scale_gradient, scale_gradient_

    return launch, scale_gradient, scale_gradient_


def make(device, num_rows, width, pred_dtype, target_dtype=torch.float32, num_targets=None):
    """Return predictions, targets, and a row map if there are fewer or more targets."""
    pred = torch.randn(num_rows, width, device=device).to(pred_dtype).requires_grad_()
    target = (torch.randn(num_targets or num_rows, width, device=device) + 0.5).to(target_dtype)
    rows = None if num_targets is None else torch.randint(0, num_targets, (num_rows,), device=device)
    return pred, target, rows


def gradient(loss, pred):
    return torch.autograd.grad(loss, pred)[0]


def check(pred, target, target_rows, beta, scale, reduction):
    """Assert that loss, gradient and moments are as close to fp64 as PyTorch's own loss in fp32."""
    loss, moments = masked_smooth_l1(pred, target, beta=beta, scale=scale, reduction=reduction, target_rows=target_rows)
    wide = pred.detach().double().requires_grad_()
    truth = plain_loss(wide, target, beta, scale, reduction, target_rows)
    eager = plain_loss(pred, target, beta, scale, reduction, target_rows, dtype=torch.float32)
    assert loss.dtype == moments.dtype == torch.float32
    assert loss.shape == ()
    assert_within_twice(loss, eager, truth, name="loss")
    got = gradient(loss, pred)
    assert got.dtype == pred.dtype
    assert_within_twice(got, gradient(eager, pred), gradient(truth, wide), name="gradient")
    used = target if target_rows is None else target[target_rows]
    assert not moments.requires_grad
    assert_within_twice(moments, plain_moments(pred, used, torch.float32), plain_moments(pred, used), name="moments")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_matches_fp64(device, beta, reduction, pred_dtype, target_dtype):
    for num_targets in (None, 31):
        check(*make(device, 203, 70, pred_dtype, target_dtype, num_targets), beta, 0.7, reduction)


@pytest.mark.parametrize("width", [1, 7, 768])
@pytest.mark.parametrize("num_rows", [1, 63, 1023])
def test_odd_sizes(device, num_rows, width):
    for beta in (0.0, 1.0):
        check(*make(device, num_rows, width, torch.float32), beta, 1.0, "mean")


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_stride(data):
    num_rows, width = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    cpu = torch.device("cpu")
    dtypes = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    pred, target, rows = make(cpu, num_rows, width, *dtypes, data.draw(st.none() | st.integers(1, 400)))
    if data.draw(st.booleans()):
        pred = non_contiguous(pred.detach()).requires_grad_()
        target = target.t().contiguous().t()
    beta = data.draw(st.just(0.0) | st.floats(1e-3, 1e3))
    check(pred, target, rows, beta, data.draw(st.floats(-10, 10)), data.draw(st.sampled_from(["sum", "mean"])))


def test_where_the_error_is_exactly_beta(device):
    pred = torch.tensor([[2.0, -2.0, 0.0, 2.0000002, 1.9999999]], device=device, requires_grad=True)
    loss, _ = masked_smooth_l1(pred, torch.zeros(1, 5, device=device), beta=2.0, reduction="sum")
    torch.testing.assert_close(loss.detach(), torch.tensor(4.0, device=device))
    right = torch.tensor([[1.0, -1.0, 0.0, 1.0, 1.0]], device=device)
    torch.testing.assert_close(gradient(loss, pred), right)


@pytest.mark.parametrize("beta", [1e-42, 1e-46])
def test_tiny_beta_is_absolute_error(device, beta):
    pred = torch.tensor([[0.0, 3.0, -1.0]], device=device, requires_grad=True)
    loss, _ = masked_smooth_l1(pred, torch.zeros(1, 3, device=device), beta=beta, reduction="sum")
    assert loss == 4.0
    assert gradient(loss, pred).tolist() == [[0.0, 1.0, -1.0]]
    answer = masked_smooth_l1_reference(
        pred.detach(), torch.zeros(1, 3, device=device), None, beta, 1.0, False, True, True
    )
    assert answer[0] == 4.0
    assert answer[2].tolist() == [[0.0, 1.0, -1.0]]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_rows(device, beta, reduction):
    for shape in ((0, 5), (3, 0), (0, 0)):
        pred = torch.zeros(shape, device=device, requires_grad=True)
        loss, moments = masked_smooth_l1(pred, torch.zeros(shape, device=device), beta=beta, reduction=reduction)
        assert loss == 0
        assert moments.shape == (4, shape[1])
        assert (moments == 0).all()
        assert gradient(loss, pred).shape == shape
    rows = torch.zeros(0, dtype=torch.int64, device=device)
    empty = torch.zeros(0, 5, device=device, requires_grad=True)
    assert masked_smooth_l1(empty, torch.zeros(7, 5, device=device), target_rows=rows).loss == 0


@pytest.mark.parametrize("beta", BETAS)
def test_nan_is_seen(device, beta):
    pred, target, _ = make(device, 5, 6, torch.float32)
    with torch.no_grad():
        pred[2, 3] = float("nan")
    loss, moments = masked_smooth_l1(pred, target, beta=beta)
    assert loss.isnan()
    assert moments[0].isnan().tolist() == [False, False, False, True, False, False]
    got = gradient(loss, pred)
    assert got.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incoming_gradients(device, dtype):
    """Expanded, scaled, of another dtype, and twice through a kept graph."""
    pred, target, _ = make(device, 9, 5, dtype)
    base = gradient(masked_smooth_l1(pred, target, beta=1.0).loss, pred)
    tolerance = {"rtol": 2**-7, "atol": 1e-9} if dtype != torch.float32 else {}
    loss = masked_smooth_l1(pred, target, beta=1.0).loss
    expanded = torch.autograd.grad(loss.expand(6).sum(), pred, retain_graph=True)[0]
    torch.testing.assert_close(expanded.float(), base.float() * 6, **tolerance)
    wide = torch.autograd.grad(loss.double() * 3, pred, retain_graph=True)[0]
    torch.testing.assert_close(wide.float(), base.float() * 3, **tolerance)
    assert torch.equal(torch.autograd.grad(loss, pred)[0], base)
    wanted = torch.full((1,), 0.5, device=device).expand(4)[1]
    halved = torch.autograd.grad(masked_smooth_l1(pred, target, beta=1.0).loss, pred, grad_outputs=wanted)[0]
    torch.testing.assert_close(halved.float(), base.float() / 2, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_gradient_becomes_the_gradient(device, dtype):
    """Backward takes no second tensor of its size, unless the graph is kept; the values are the same."""
    pred, target, _ = make(device, 9, 5, dtype)
    for factor in (1.0, 0.5):
        loss = masked_smooth_l1(pred, target, beta=1.0).loss * factor
        (slope,) = loss.grad_fn.next_functions[0][0].saved_tensors
        kept = torch.autograd.grad(loss, pred, retain_graph=True)[0]
        assert kept.data_ptr() != slope.data_ptr()
        got = torch.autograd.grad(loss, pred)[0]
        assert got.data_ptr() == slope.data_ptr()
        assert torch.equal(got, kept)


def test_backward_that_is_not_plain(device):
    """Several gradients at once, a backward that is differentiated without keeping the graph, and none at all."""
    pred, target, _ = make(device, 9, 5, torch.float32)
    base = gradient(masked_smooth_l1(pred, target, beta=1.0).loss, pred)
    loss = masked_smooth_l1(pred, target, beta=1.0).loss
    several = torch.tensor([1.0, 2.0, 0.5], device=device)
    (batched,) = torch.autograd.grad(loss, pred, grad_outputs=several, is_grads_batched=True)
    torch.testing.assert_close(batched, base * several[:, None, None])

    factor = torch.tensor(2.0, device=device, requires_grad=True)
    loss = masked_smooth_l1(pred, target, beta=1.0).loss
    (first,) = torch.autograd.grad(loss * factor, pred, create_graph=True, retain_graph=False)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), factor)[0], base.sum())

    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    loss = Blocks.apply(masked_smooth_l1(pred, target, beta=1.0).loss)
    assert torch.autograd.grad(loss, pred, allow_unused=True)[0] is None


@pytest.mark.parametrize("width", [768, 771])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_large_gradient(device, beta, width):
    """Large enough to be stored around the caches, or not, where rows are not aligned."""
    pred, target, rows = make(device, 3001, width, torch.float32, num_targets=700)
    got = gradient(masked_smooth_l1(pred, target, beta=beta, reduction="sum", target_rows=rows).loss, pred)
    wide = pred.detach().double().requires_grad_()
    right = gradient(plain_loss(wide, target[rows], beta, 1.0, "sum"), wide)
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


def test_fp16_does_not_underflow(device):
    """Under a mean over many elements the gradient of one is below fp16; a loss scale must bring it back."""
    pred, target, _ = make(device, 1000, 100, torch.float16)
    got = gradient(masked_smooth_l1(pred, target, beta=2.0).loss * 65536.0, pred)
    wide = pred.detach().double().requires_grad_()
    right = gradient(plain_loss(wide, target, 2.0, 65536.0, "mean"), wide)
    assert ((got.double() - right).abs() <= 1.5e-3 * right.abs() + 1e-7).all()


def test_target_is_a_constant(device):
    pred, target, _ = make(device, 4, 3, torch.float32)
    target.requires_grad_()
    loss = masked_smooth_l1(pred, target).loss
    assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None
    assert not masked_smooth_l1(pred.detach(), target).loss.requires_grad


def test_no_slope_without_gradient(device):
    pred, target, _ = make(device, 4, 3, torch.bfloat16)
    operation = torch.ops.d2v.masked_smooth_l1
    assert operation(pred.detach(), target, None, 0.0, 1.0, True, False, True)[2].numel() == 0
    with torch.no_grad():
        assert not masked_smooth_l1(pred, target).loss.requires_grad
    with pytest.raises(RuntimeError, match="need_grad"):
        operation(pred, target, None, 0.0, 1.0, True, False, True)[0].backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_moments(device, dtype):
    """Without them, loss and gradient are the same bit for bit, in the reference, too."""
    pred, target, rows = make(device, 300, 33, dtype, num_targets=9)
    for beta in BETAS:
        with_moments, without = (masked_smooth_l1(pred, target, beta=beta, target_rows=rows, moments=m) for m in (1, 0))
        assert without.moments is None
        # a GPU adds the losses in another order
        torch.testing.assert_close(without.loss, with_moments.loss, rtol=0 if device.type == "cpu" else 1e-6, atol=0)
        assert torch.equal(gradient(without.loss, pred), gradient(with_moments.loss, pred))
        found, none = (
            masked_smooth_l1_reference(pred.detach(), target, rows, beta, 0.3, True, True, m) for m in (True, False)
        )
        assert none[1].shape == (0,)
        assert torch.equal(none[0], found[0])
        assert torch.equal(none[2], found[2])


def test_reference_agrees(device):
    for dtype in DTYPES:
        pred, target, rows = make(device, 70, 33, dtype, torch.bfloat16, 9)
        pred = pred.detach()
        for beta in BETAS:
            got = torch.ops.d2v.masked_smooth_l1(pred, target, rows, beta, 0.3, True, True, True)
            want = masked_smooth_l1_reference(pred, target, rows, beta, 0.3, True, True, True)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 2**-7, atol=1e-5)
            factor = torch.tensor(0.37, device=device)
            torch.testing.assert_close(
                torch.ops.d2v.scale_gradient(got[2], factor, 0.3, True),
                scale_gradient_reference(got[2], factor, 0.3, True),
            )


def test_thread_count_does_not_matter():
    pred, target, rows = make(torch.device("cpu"), 1500, 130, torch.float32, num_targets=40)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss, moments = masked_smooth_l1(pred, target, beta=0.5, target_rows=rows)
            results.append((loss.detach(), moments, gradient(loss, pred)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("with_map", [False, True])
def test_opcheck(device, need_grad, with_map):
    pred, target, rows = make(device, 6, 5, torch.float32, num_targets=3 if with_map else None)
    pred = pred if need_grad else pred.detach()
    check = torch.library.opcheck
    check(torch.ops.d2v.masked_smooth_l1.default, (pred, target, rows, 2.0, 1.0, True, need_grad, not need_grad))
    check(torch.ops.d2v.scale_gradient.default, (pred.detach(), torch.tensor(0.3, device=device), 2.0, True))
    check(torch.ops.d2v.scale_gradient_.default, (pred.detach(), torch.tensor(0.3, device=device), 2.0, True))


def test_compile_fullgraph(device):
    def step(p, t):
        return masked_smooth_l1(p * 2, t, beta=1.0).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (4, 9, 31):
        pred, target, _ = make(device, num_rows, 6, torch.float32)
        got, want = compiled(pred, target), step(pred, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient(got, pred), gradient(want, pred))


# every shape, and every pair of dtype and beta with one of them
@pytest.mark.parametrize(
    ("shape", "dtype", "beta"),
    [
        *((shape, torch.float32, 1.5) for shape in ((1, 1), (63, 7), (300, 3), (5, 300))),
        ((63, 7), torch.float32, 0.0),
        *(((63, 7), dtype, beta) for dtype in DTYPES[1:] for beta in (0.0, 1.5)),
    ],
    ids=str,
)
def test_triton_launcher(device, shape, dtype, beta):
    launch, scale_gradient, scale_gradient_ = launchers()
    for num_targets in (None, 4):
        pred, target, rows = make(device, *shape, dtype, num_targets=num_targets)
        pred = pred.detach()
        loss, moments, slope = launch(non_contiguous(pred), target, rows, beta, 0.7, True, True, True)
        used = target if rows is None else target[rows]
        torch.testing.assert_close(loss.double(), plain_loss(pred, used, beta, 0.7, "mean"), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(moments.double(), plain_moments(pred, used), rtol=1e-5, atol=1e-5)
        _, _, right = masked_smooth_l1_reference(pred, used, None, beta, 0.7, True, True, True)
        # the interpreter truncates to bf16 where the compiled kernel rounds to nearest
        tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-6}
        torch.testing.assert_close(slope, right, **({} if dtype == torch.float32 else tolerance))
        assert launch(pred, target, rows, beta, 0.7, True, False, False)[2].numel() == 0
        without = launch(non_contiguous(pred), target, rows, beta, 0.7, True, True, False)
        assert without[1].numel() == 0
        # summed in another order
        torch.testing.assert_close(without[0], loss, rtol=1e-6, atol=0)
        assert torch.equal(without[2], slope)
        factor = torch.tensor(0.3, device=device)
        scaled = scale_gradient(right, factor, 0.7, True)
        want = scale_gradient_reference(right, factor, 0.7, True)
        torch.testing.assert_close(scaled, want, **({} if dtype == torch.float32 else tolerance))
        for value in (0.3, 1.0):
            factor, in_place = torch.tensor(value, device=device), right.clone()
            scale_gradient_(in_place, factor, 0.7, True)
            want = scale_gradient_reference(right, factor, 0.7, True)
            torch.testing.assert_close(in_place, want, **({} if dtype == torch.float32 else tolerance))


@pytest.mark.parametrize("need_moments", [False, True])
@pytest.mark.parametrize(("num_rows", "width"), [(50, 520), (300, 40)])
def test_triton_groups_of_rows(device, monkeypatch, num_rows, width, need_moments):
    """Several groups of rows and tiles of channels, the last of both not full, and sums in several steps."""
    launch, *_ = launchers()
    from d2v_fast.kernels import masked_loss as module

    form = module.WITH_MOMENTS if need_moments else module.WITHOUT_MOMENTS
    monkeypatch.setattr(module, "WITH_MOMENTS" if need_moments else "WITHOUT_MOMENTS", form._replace(max_blocks=3))
    pred, target, rows = make(device, num_rows, width, torch.float32, num_targets=9)
    pred = pred.detach()
    loss, moments, slope = launch(pred, target, rows, 1.5, 0.7, False, True, need_moments)
    wide = pred.double().requires_grad_()
    truth = plain_loss(wide, target[rows], 1.5, 0.7, "sum")
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), gradient(truth, wide), rtol=1e-5, atol=1e-6)
    if need_moments:
        torch.testing.assert_close(moments.double(), plain_moments(pred, target[rows]), rtol=1e-5, atol=1e-4)


def test_triton_odd_inputs(device):
    launch, scale_gradient, _ = launchers()
    target = torch.randn(3, 5, device=device)
    rows = torch.tensor([0, -1, 3, 2], device=device)
    loss, _, slope = launch(torch.zeros(4, 5, device=device), target, rows, 1.0, 1.0, True, True, True)
    assert loss.isnan()
    assert slope.isnan().all(1).tolist() == [False, True, True, False]
    for shape in ((0, 5), (4, 0)):
        empty = torch.zeros(shape, device=device)
        loss, moments, slope = launch(empty, empty, None, 1.0, 1.0, True, True, True)
        assert loss == 0
        assert (moments == 0).all()
        assert slope.shape == shape
        assert launch(empty, empty, None, 1.0, 1.0, True, True, False)[1].shape == (0,)
        assert scale_gradient(slope, loss, 1.0, True).shape == shape
    tiny = torch.tensor([[0.0, 3.0, -1.0]], device=device)
    assert launch(tiny, torch.zeros_like(tiny), None, 1e-42, 1.0, False, True, True)[0] == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(4)}, r"`pred` must have shape \[N, D\]"),
        ({"pred": torch.zeros(4, 3, dtype=torch.int64)}, "`pred` must be fp32, bf16, fp16 or fp64"),
        ({"target": torch.zeros(4, 2)}, r"`target` must have shape \[M, 3\]"),
        ({"target": torch.zeros(4, 3, dtype=torch.int64)}, "`target` must be fp32, bf16, fp16 or fp64"),
        ({"target": torch.zeros(4, 3, device="meta")}, "`target` must be on cpu"),
        ({"target": torch.zeros(5, 3)}, r"as many rows as `pred` \(4\), but has 5"),
        ({"beta": -1.0}, "`beta` must be finite and >= 0, but is -1.0"),
        ({"beta": float("nan")}, "`beta`"),
        ({"beta": float("inf")}, "`beta`"),
        ({"scale": float("nan")}, "`scale`"),
        ({"reduction": "none"}, "sum, mean, but is 'none'"),
        ({"target_rows": torch.zeros(4)}, "`target_rows` must be a 1-d int64"),
        ({"target_rows": torch.zeros(3, dtype=torch.int64)}, r"one entry per row of `pred` \(4\), but has 3"),
        ({"target_rows": torch.zeros(4, dtype=torch.int64, device="meta")}, "must be on cpu"),
    ],
)
def test_bad_input(change, message):
    arguments = {"pred": torch.zeros(4, 3), "target": torch.zeros(4, 3)} | change
    with pytest.raises(ValueError, match=message):
        masked_smooth_l1(**arguments)


@pytest.mark.parametrize("operation", [torch.ops.d2v.masked_smooth_l1, masked_smooth_l1_reference])
@pytest.mark.parametrize("bad", [-1, 5])
def test_target_rows_out_of_range(operation, bad):
    rows = torch.tensor([0, bad])
    with pytest.raises(IndexError, match=rf"`target_rows` must be in \[0, 4\], but holds {bad}"):
        operation(torch.zeros(2, 3), torch.zeros(5, 3), rows, 0.0, 1.0, True, True, True)
