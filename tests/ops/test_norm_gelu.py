"""layer_norm_gelu: values and gradients against fp64, in the reference, C++ and Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2v_fast.ops import layer_norm_gelu
from d2v_fast.ops.norm_gelu import (
    layer_norm_gelu_,
    layer_norm_gelu_backward,
    layer_norm_gelu_backward_,
    layer_norm_gelu_backward_reference,
    layer_norm_gelu_forward,
    layer_norm_gelu_reference,
)
from tests.helpers.common import (
    DTYPES,
    assert_within_twice,
    non_contiguous,
)
from tests.ops.norm_inputs import make

WIDTHS = [1, 7, 96, 512, 1000]


def launchers():
    """The Triton launchers of both passes: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels import norm_gelu

    return norm_gelu.layer_norm_gelu, norm_gelu.layer_norm_gelu_backward


def assert_same(got, want):
    """Assert equality, bit for bit on a CPU; on a GPU the strides decide which channels a thread adds up."""
    for one, other in zip(got, want, strict=True):
        if one.device.type == "cpu":
            assert torch.equal(one, other)
        else:
            rtol = 1e-5 if one.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)


def composition(x, weight, bias, eps=1e-5, dtype=torch.float32):
    """Compute the operation from PyTorch's own in `dtype`."""
    return F.gelu(F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps))


def truth(x, weight, bias, grad, eps=1e-5):
    """Return value and gradients in fp64."""
    wide = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    y = composition(*wide, eps, torch.float64)
    return y, *torch.autograd.grad(y, wide, grad.double())


def check(x, weight, bias, grad, eps=1e-5):
    """Assert that value and gradients are as close to fp64 as PyTorch's own two operations in fp32."""
    y = layer_norm_gelu(x, weight, bias, eps=eps)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    got = y, *torch.autograd.grad(y, (x, weight, bias), grad)
    plain = composition(x, weight, bias, eps).to(x.dtype)
    eager = plain, *torch.autograd.grad(plain, (x, weight, bias), grad)
    names = ("y", "grad_x", "grad_weight", "grad_bias")
    for name, one, other, right in zip(names, got, eager, truth(x, weight, bias, grad, eps), strict=True):
        assert one.dtype == other.dtype, name
        if x.shape[-1] == 1 and name in ("grad_x", "grad_weight"):
            # nothing is left of one channel: zero, and on a GPU the rounding of a product that a fused one leaves out,
            # times 1 / sqrt(eps)
            atol = 1e-6 if x.device.type == "cpu" else 2**-24 * 20 / eps**0.5
            torch.testing.assert_close(one.double(), right, rtol=0, atol=atol)
        else:
            assert_within_twice(one, other, right, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_matches_fp64(device, dtype, width):
    for weight_dtype in {torch.float32, dtype}:
        check(*make(device, (3, 41, width), dtype, weight_dtype))


@pytest.mark.parametrize("shape", [(512,), (1, 512), (700, 40), (2, 3, 4, 5, 6), (1, 1, 16)], ids=str)
def test_shapes(device, shape):
    for eps in (1e-5, 0.1):
        check(*make(device, shape, torch.float32), eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(device, dtype):
    """Rows in groups, rows with gaps, channels that lie apart, and gradients that are stretched."""
    x, weight, bias, grad = make(device, (4, 6, 24), dtype)
    plain = x.detach()
    padded = torch.full((4, 9, 24), float("nan"), device=device, dtype=dtype)
    padded[:, :6] = plain
    wide = torch.full((4, 6, 40), float("nan"), device=device, dtype=dtype)
    wide[..., 8:32] = plain
    forms = [
        padded[:, :6],
        wide[..., 8:32],
        non_contiguous(plain),
        plain.transpose(0, 1).contiguous().transpose(0, 1),
        plain.transpose(1, 2).contiguous().transpose(1, 2),
        plain.unsqueeze(1).expand(4, 1, 6, 24).squeeze(1),
    ]
    want = layer_norm_gelu(x, weight, bias)
    want_grads = torch.autograd.grad(want, (x, weight, bias), grad)
    gappy = torch.stack((weight.detach(), bias.detach()), 1)
    for form in forms:
        odd = form.detach().requires_grad_()
        y = layer_norm_gelu(odd, gappy[:, 0].requires_grad_(), gappy[:, 1].requires_grad_())
        assert y.is_contiguous()
        assert_same([y], [want])
        for strange in (grad, padded.clone()[:, :6].copy_(grad), grad.mT.contiguous().mT):
            got = layer_norm_gelu_backward(strange, odd, weight, bias, *layer_norm_gelu_forward(odd, weight, bias)[1:])
            assert_same(got, want_grads)
    y = layer_norm_gelu(x, weight, bias)
    stretched = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert_same(stretched, torch.autograd.grad(layer_norm_gelu(x, weight, bias), (x, weight, bias), torch.ones_like(y)))


def test_gelu_alone(device):
    """A weight of 0 leaves the GELU of the bias, whose gradient is the slope: both to the rounding of fp32."""
    z = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 1e-30, 40.0, -40.0, 1e30, -1e30])])
    z = z.to(device)
    x, weight = torch.randn(1, len(z), device=device), torch.zeros(len(z), device=device)
    bias = z.clone().requires_grad_()
    y = layer_norm_gelu(x, weight, bias)
    (slope,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    wide = z.double().requires_grad_()
    right = F.gelu(wide)
    (right_slope,) = torch.autograd.grad(right.sum(), wide)
    assert ((y[0].double() - right).abs() <= 2e-7 * right.abs().clamp_min(1.0)).all()
    # PyTorch's own slope of -1e30 is NaN
    # the exponential of a GPU is approximate
    assert ((slope.double() - right_slope.nan_to_num()).abs() <= (2e-7 if device.type == "cpu" else 4e-7)).all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_far_from_zero(device, scale):
    x, weight, bias, grad = make(device, (31, 96), torch.float32, scale=scale)
    check(x, weight, bias, grad)
    check((x.detach() + 30 * scale).requires_grad_(), weight, bias, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows(device, dtype):
    """No deviation: the bias alone is left, and gradients stay finite."""
    _, weight, bias, grad = make(device, (5, 70), dtype)
    for value in (0.0, 7.0, -6e4):
        x = torch.full((5, 70), value, dtype=dtype, device=device, requires_grad=True)
        y = layer_norm_gelu(x, weight, bias)
        want = F.gelu(bias).to(dtype).expand(5, 70)
        torch.testing.assert_close(y, want, **({} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-6}))
        for got in torch.autograd.grad(y, (x, weight, bias), grad):
            assert got.isfinite().all()


@pytest.mark.parametrize("width", [24, 7])
def test_nan_is_seen(device, width):
    x, weight, bias, grad = make(device, (6, width), torch.float32)
    with torch.no_grad():
        x[2, 3] = float("nan")
    y = layer_norm_gelu(x, weight, bias)
    assert y.isnan().any(1).tolist() == y.isnan().all(1).tolist() == [row == 2 for row in range(6)]
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, weight, bias), grad)
    assert grad_x.isnan().all(1).nonzero().tolist() == [[2]]
    assert grad_weight.isnan().all()
    assert grad_bias.isnan().all()
    x, weight, bias, grad = make(device, (6, width), torch.float32)
    with torch.no_grad():
        bias[4] = float("nan")
    y = layer_norm_gelu(x, weight, bias)
    assert y.isnan().all(0).nonzero().tolist() == [[4]]
    assert torch.autograd.grad(y, bias, grad)[0].isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 8), (4, 0), (0, 0)], ids=str)
def test_nothing(device, shape):
    x, weight, bias, grad = make(device, shape, torch.float32)
    y = layer_norm_gelu(x, weight, bias)
    assert y.shape == shape
    grads = torch.autograd.grad(y, (x, weight, bias), grad)
    assert [value.shape for value in grads] == [x.shape, weight.shape, bias.shape]
    assert not any(value.any() for value in grads)


@pytest.mark.parametrize("width", [512, 771])
def test_large(device, width):
    """Large enough to be stored around the caches, or not, where rows are not aligned; several hundred blocks."""
    check(*make(device, (5003, width), torch.float32))


def test_forward_and_backward_by_hand(device):
    """The parts that a hand-written stack calls give what autograd gives, and the same call gives y again."""
    x, weight, bias, grad = make(device, (2, 9, 33), torch.bfloat16)
    y, mean, rstd = layer_norm_gelu_forward(x, weight, bias)
    assert mean.shape == rstd.shape == (2, 9)
    assert not mean.requires_grad
    torch.testing.assert_close(mean, x.detach().float().mean(-1))
    torch.testing.assert_close(rstd, (x.detach().float().var(-1, correction=0) + 1e-5).rsqrt())
    want = torch.autograd.grad(y, (x, weight, bias), grad)
    with torch.no_grad():
        got = layer_norm_gelu_backward(grad, x, weight, bias, mean, rstd)
        assert torch.equal(layer_norm_gelu_forward(x, weight, bias)[0], y)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_needs_no_gradient(device):
    x, weight, bias, grad = make(device, (4, 6), torch.float32)
    want = torch.autograd.grad(layer_norm_gelu(x, weight, bias), (x, weight, bias), grad)
    for i in range(3):
        inputs = [value if i == j else value.detach() for j, value in enumerate((x, weight, bias))]
        (got,) = torch.autograd.grad(layer_norm_gelu(*inputs), inputs[i], grad)
        assert torch.equal(got, want[i])
    assert not layer_norm_gelu(x.detach(), weight.detach(), bias.detach()).requires_grad


def test_reference_agrees(device):
    for dtype in DTYPES:
        x, weight, bias, grad = (value.detach() for value in make(device, (70, 33), dtype, dtype))
        y, mean, rstd = torch.ops.d2v.layer_norm_gelu(x, weight, bias, 1e-3)
        want = layer_norm_gelu_reference(x, weight, bias, 1e-3)
        grads = torch.ops.d2v.layer_norm_gelu_backward(grad, x, weight, bias, mean, rstd)
        want_grads = layer_norm_gelu_backward_reference(grad, x, weight, bias, *want[1:])
        for a, b in zip((y, mean, rstd, *grads), (*want, *want_grads), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=2e-5)


def test_thread_count_does_not_matter():
    x, weight, bias, grad = make(torch.device("cpu"), (3001, 130), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = layer_norm_gelu(x, weight, bias)
            results.append((y, *torch.autograd.grad(y, (x, weight, bias), grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in DTYPES[::2])], ids=str
)
def test_opcheck(device, dtype):
    x, weight, bias, grad = make(device, (2, 5, 6), dtype)
    torch.library.opcheck(torch.ops.d2v.layer_norm_gelu.default, (x, weight, bias, 1e-5))
    inputs = (x.detach().clone(), weight.detach(), bias.detach(), 1e-5)
    torch.library.opcheck(torch.ops.d2v.layer_norm_gelu_.default, inputs)
    _, mean, rstd = layer_norm_gelu_forward(x, weight, bias)
    inputs = (grad, x.detach().mT.contiguous().mT, weight.detach(), bias.detach(), mean, rstd)
    torch.library.opcheck(torch.ops.d2v.layer_norm_gelu_backward.default, inputs)
    torch.library.opcheck(torch.ops.d2v.layer_norm_gelu_backward_.default, inputs)


def test_compile_fullgraph(device):
    def step(x, weight, bias):
        return layer_norm_gelu(x * 2, weight, bias).sum(-1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (4, 9, 31):
        x, weight, bias, _ = make(device, (num_rows, 6), torch.float32)
        got, want = compiled(x, weight, bias), step(x, weight, bias)
        torch.testing.assert_close(got, want)
        ones = torch.ones_like(want)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), ones) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


# every shape, and every dtype with one of them
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in ((1,), (63, 7), (300, 96), (2, 37, 512), (5, 1000))),
        *(((63, 7), dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_triton_launcher(device, shape, dtype):
    forward, backward = launchers()
    x, weight, bias, grad = (value.detach() for value in make(device, shape, dtype))
    y, mean, rstd = forward(x, weight, bias, 1e-5)
    want, want_mean, want_rstd = layer_norm_gelu_reference(x, weight, bias, 1e-5)
    # the interpreter truncates to bf16 where the compiled kernel rounds to nearest
    tolerance = {"rtol": 2e-5, "atol": 5e-6}
    if dtype != torch.float32:
        tolerance = {"rtol": 2**-7 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-4}
    torch.testing.assert_close(y, want, **tolerance)
    torch.testing.assert_close(mean, want_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, want_rstd, rtol=1e-5, atol=1e-6)
    got = backward(grad, x, weight, bias, mean, rstd)
    right = truth(x, weight, bias, grad)[1:]
    if shape[-1] == 1 and device.type == "cuda":
        # see `check`
        tolerance["atol"] = 2**-24 * 20 / 1e-5**0.5
    torch.testing.assert_close(got[0], right[0].to(dtype), **tolerance)
    for a, b in zip(got[1:], right[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_triton_odd_inputs(device):
    forward, backward = launchers()
    x, weight, bias, grad = (value.detach() for value in make(device, (3, 5, 6), torch.float32))
    want = forward(x, weight, bias, 1e-5)
    want_grads = backward(grad, x, weight, bias, *want[1:])
    padded = torch.full((3, 9, 6), float("nan"), device=device)
    padded[:, :5] = x
    for odd in (padded[:, :5], non_contiguous(x), x.mT.contiguous().mT):
        assert_same(forward(odd, weight, bias, 1e-5)[:1], want[:1])
        strange = torch.empty_strided(odd.shape, odd.stride(), device=device).copy_(grad)
        for a, b in zip(backward(strange, odd, weight, bias, *want[1:]), want_grads, strict=True):
            torch.testing.assert_close(a, b)
    for shape in ((0, 6), (4, 0)):
        empty, none = torch.zeros(shape, device=device), torch.ones(shape[1], device=device)
        y, mean, rstd = forward(empty, none, none, 1e-5)
        assert (y.shape, mean.shape) == (shape, shape[:1])
        grads = backward(empty, empty, none, none, mean, rstd)
        assert not any(value.any() for value in grads)
    x[1, 2, 3] = float("nan")
    y, mean, rstd = forward(x, weight, bias, 1e-5)
    assert y.isnan().all(-1).nonzero().tolist() == [[1, 2]]
    grad_x, grad_weight, _ = backward(grad, x, weight, bias, mean, rstd)
    assert grad_x.isnan().all(-1).nonzero().tolist() == [[1, 2]]
    assert grad_weight.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"`x` must have shape \[..., C\], but has \(\) instead"),
        (
            {"x": torch.zeros(4, 3, dtype=torch.int64)},
            "`x` must be fp32, bf16(, fp16 or fp64| or fp16), but is torch.int64 instead",
        ),
        ({"weight": torch.zeros(4)}, r"`weight` must have shape \[3\] as the channels of `x`, but has \(4,\) instead"),
        ({"bias": torch.zeros(1, 3)}, r"`bias` must have shape \[3\]"),
        ({"weight": torch.zeros(3, dtype=torch.float16)}, "`weight` must be fp32 or torch.float32 as `x` is, but is"),
        ({"bias": torch.zeros(3, device="meta")}, "`bias` must be on cpu as `x` is, but is on meta instead"),
        ({"eps": -1.0}, "`eps` must be finite and >= 0, but is -1.0 instead"),
        ({"eps": float("nan")}, "`eps`"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": torch.zeros(4, 3), "weight": torch.ones(3), "bias": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        layer_norm_gelu(arguments["x"], arguments["weight"], arguments["bias"], eps=arguments.get("eps", 1e-5))
    with pytest.raises(ValueError, match=message):
        layer_norm_gelu_(arguments["x"], arguments["weight"], arguments["bias"], eps=arguments.get("eps", 1e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4, 2)}, r"`grad` must be torch.float32 of shape \(4, 3\) as `x` is"),
        ({"grad": torch.zeros(4, 3, dtype=torch.bfloat16)}, "`grad` must be torch.float32 of shape"),
        ({"weight": torch.zeros(4)}, r"`weight` must have shape \[3\] as the channels of `x`"),
        ({"mean": torch.zeros(3)}, r"`mean` must be fp32 of shape \(4,\), one number for each row of `x`, but is"),
        ({"rstd": torch.zeros(4, dtype=torch.float64)}, "`rstd` must be fp32 of shape"),
    ],
)
def test_bad_input_of_backward(change, message):
    arguments = {"grad": torch.zeros(4, 3), "x": torch.zeros(4, 3), "weight": torch.ones(3), "bias": torch.zeros(3)}
    arguments |= {"mean": torch.zeros(4), "rstd": torch.ones(4)} | change
    with pytest.raises(ValueError, match=message):
        layer_norm_gelu_backward(**arguments)
    with pytest.raises(ValueError, match=message):
        layer_norm_gelu_backward_(**arguments)
