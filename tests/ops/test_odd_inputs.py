"""Odd inputs are refused by name or handled correctly; empty ones give 0 and never NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import (
    HAS_CPP,
    attention_with_alibi,
    attention_with_bias,
    data2vec_loss,
    ema_update_,
    layer_norm_gelu,
    masked_smooth_l1,
    topk_target,
)
from d2v_fast.ops.data2vec_loss import data2vec_loss_reference
from d2v_fast.ops.masked_loss import masked_smooth_l1_reference, scale_gradient_reference
from d2v_fast.ops.topk_target import FINAL_NORMS, LAYER_NORMS
from tests.ops.target_reference import plain_loss, plain_target

META = torch.device("meta")


def backends() -> list[tuple[str, Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    """Loss, loss with target, and scaling of the gradient, in each form; the dispatcher takes C++ on a CPU."""
    ops = torch.ops.d2v
    found = [
        ("reference", masked_smooth_l1_reference, data2vec_loss_reference, scale_gradient_reference),
        ("dispatcher", ops.masked_smooth_l1, ops.data2vec_loss, ops.scale_gradient),
    ]
    try:
        from d2v_fast.kernels.data2vec_loss import data2vec_loss as fused
        from d2v_fast.kernels.masked_loss import masked_smooth_l1 as masked
        from d2v_fast.kernels.masked_loss import scale_gradient
    except ImportError:
        return found
    return [*found, ("triton", masked, fused, scale_gradient)]


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("mean", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(
    ("layer_norm", "final_norm"), [("layer", "layer"), ("instance", "none"), ("batch", "instance")]
)
def test_no_masked_row_is_zero_in_every_backend(device, beta, mean, layer_norm, final_norm) -> None:
    layers = [torch.randn(2, 3, 4, device=device) for _ in range(2)]
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    pred, rows = torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    one = torch.ones((), device=device)
    for name, masked, fused, scale_gradient in backends():
        for loss, moments, slope in (
            masked(pred, pred, None, beta, 0.5, mean, True, True),
            fused(pred, layers, *norms, rows, None, 1e-5, None, beta, 0.5, mean, True, True),
        ):
            assert loss == 0, name
            assert moments.shape == (4, 4)
            assert not moments.any(), name
            assert scale_gradient(slope, one, 0.5, mean).shape == (0, 4)


@pytest.mark.parametrize(("layer_norm", "final_norm"), [(first, last) for first in LAYER_NORMS for last in FINAL_NORMS])
def test_every_row_masked_agrees_in_every_backend(device, layer_norm, final_norm) -> None:
    """All positions of one sample and none of the other; constant layers, whose deviation is 0; and all of both."""
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    layers = [torch.randn(2, 3, 4, device=device), torch.full((2, 3, 4), 7.0, device=device)]
    for num_rows in (3, 6):
        rows, pred = torch.arange(num_rows, device=device), torch.randn(num_rows, 4, device=device)
        results = []
        for _, _, fused, _ in backends():
            results.append(fused(pred, layers, *norms, rows, None, 1e-5, None, 1.0, 1.0, True, True, True))
            assert all(value.isfinite().all() for value in results[-1])
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_fp64_stays_fp64(device) -> None:
    """Also on a GPU, whose kernels compute in fp32."""
    layers, pred = [torch.randn(2, 5, 6, device=device).double() for _ in range(2)], torch.randn(4, 6, device=device)
    rows = torch.tensor([1, 3, 8, 2], device=device)
    target = plain_target(layers, "instance", "layer", rows)
    torch.testing.assert_close(
        topk_target(layers, layer_norm="instance", final_norm="layer", rows=rows).double(), target
    )
    got = masked_smooth_l1(pred.double(), target, beta=1.0, reduction="sum").loss
    torch.testing.assert_close(got.double(), plain_loss(pred, target, 1.0, 1.0, "sum"), rtol=1e-12, atol=0)
    weight, bias = torch.rand(2, 6, device=device).double()
    want = torch.nn.functional.gelu(torch.nn.functional.layer_norm(pred.double(), (6,), weight, bias))
    torch.testing.assert_close(layer_norm_gelu(pred.double(), weight, bias), want, rtol=1e-12, atol=1e-12)


def layouts(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the same values in another memory layout."""
    if kind == "plain":
        return x
    if kind == "gaps":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan, dtype=x.dtype)
        view = wide[..., 1::3]
    elif kind == "transposed":
        view = torch.empty(x.shape[::-1], dtype=x.dtype).permute(*reversed(range(x.ndim)))
    elif kind == "shifted":
        view = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape)
    else:
        wide = torch.full((2 * x.shape[0], *x.shape[1:]), torch.nan, dtype=x.dtype)
        view = wide[::2]
    return view.copy_(x)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
kinds = st.sampled_from(["plain", "gaps", "transposed", "shifted", "every second"])


@settings(max_examples=80, deadline=None)
@given(shape=st.tuples(*[st.integers(0, 5)] * 3), pred_dtype=dtypes, layer_dtype=dtypes, kinds=st.tuples(*[kinds] * 4))
def test_mixed_dtypes_and_layouts(shape, pred_dtype, layer_dtype, kinds) -> None:
    """The loss does not depend on how the tensors lie, also of sizes 0 and 1; fp32 and half precision mix."""
    B, T, D = shape
    rows = torch.randperm(B * T)[: B * T // 2 + 1]
    pred, layers = torch.randn(len(rows), D).to(pred_dtype), [torch.randn(B, T, D).to(layer_dtype) for _ in range(2)]
    want = data2vec_loss(pred, layers, rows=rows, final_norm="layer", beta=1.0)
    odd = [layouts(x, kind) for x, kind in zip(layers, kinds[:2], strict=True)]
    stretched = torch.stack((rows, rows + 100), 1)[:, 0]
    got = data2vec_loss(layouts(pred, kinds[2]), odd, rows=stretched, final_norm="layer", beta=1.0)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.moments, want.moments)
    assert got.loss.isfinite()
    target = topk_target(odd, rows=stretched, final_norm="layer")
    parts = masked_smooth_l1(layouts(pred, kinds[3]), layouts(target, kinds[2]), beta=1.0)
    torch.testing.assert_close(parts.loss, want.loss, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=3), dtype=dtypes, working=dtypes, kinds=st.tuples(*[kinds] * 3))
def test_ema_of_any_layout(shape, dtype, working, kinds) -> None:
    if not shape:
        kinds = ("plain",) * 3
    teacher, student = torch.randn(shape), torch.randn(shape).to(dtype)
    copy = torch.empty(shape, dtype=working)
    expected = torch.lerp(teacher, student.float(), torch.tensor(0.25))
    odd, odd_copy = layouts(teacher, kinds[0]), layouts(copy, kinds[1])
    ema_update_([odd], [layouts(student, kinds[2])], 0.75, working=[odd_copy])
    torch.testing.assert_close(odd, expected, rtol=2.4e-7, atol=1e-7)
    assert torch.equal(odd_copy, odd.to(working))


def test_every_fp16_number() -> None:
    """Read as what it is, and written by rounding to the nearest: every number, every middle of two, and their
    neighbors in fp32."""
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    read = topk_target([half.view(1, 128, 512)], layer_norm="none", final_norm="none").flatten()
    assert torch.equal(read.nan_to_num(1.5), half.float().nan_to_num(1.5))
    finite = half[half.isfinite()].float().sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    values = torch.cat([finite, middle, middle.nextafter(finite[1:]), middle.nextafter(finite[:-1])])
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])])
    # the slope of half a squared error is the error
    zeros = torch.zeros(1, len(values), dtype=torch.float16)
    slope = torch.ops.d2v.masked_smooth_l1(zeros, -values[None], None, 0.0, 0.5, False, True, False)[2]
    assert torch.equal(slope[0].nan_to_num(1.5), values.half().nan_to_num(1.5))


def test_teacher_that_lies_on_itself_is_refused() -> None:
    student = [torch.ones(3, 2)]
    overlapping = [torch.zeros(1).expand(3, 2), torch.zeros(6).as_strided((3, 2), (1, 1)), torch.zeros(2).expand(3, 2)]
    for x in overlapping:
        with pytest.raises(ValueError, match=r"`teacher\[0\]` must have a place in memory for each"):
            ema_update_([x], student, 0.5)
        with pytest.raises(ValueError, match=r"`working\[0\]` must have a place in memory for each"):
            ema_update_([torch.zeros(3, 2)], student, 0.5, working=[x])
        # what is only read may lie as it likes
        teacher = torch.ones(3, 2)
        ema_update_([teacher], [x], 0.5)
        assert (teacher == 0.5).all()


def test_more_than_two_billion_elements_have_shapes() -> None:
    """On the meta device, sizes beyond 32 bits keep their shapes."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    num_rows, width = 2**22, 2**10
    pred = meta(num_rows, width, dtype=torch.bfloat16).requires_grad_()
    layers, rows = [meta(2**12, 2**10, width)] * 2, meta(num_rows, dtype=torch.int64)
    assert pred.numel() == 2**32
    fused = data2vec_loss(pred, layers, rows=rows)
    assert (fused.loss.shape, fused.moments.shape) == ((), (4, width))
    assert torch.autograd.grad(fused.loss, pred)[0].shape == pred.shape
    assert topk_target(layers, rows=rows).shape == pred.shape
    parts = masked_smooth_l1(pred, meta(num_rows, width))
    assert torch.autograd.grad(parts.loss, pred)[0].shape == pred.shape
    ema_update_([meta(2**32)], [meta(2**32)], 0.5, working=[meta(2**32, dtype=torch.bfloat16)])
    y = layer_norm_gelu(pred, meta(width), meta(width))
    assert torch.autograd.grad(y, pred, torch.empty_like(y))[0].shape == y.shape == pred.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 4, device=META)}, "`rows` must be on meta"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device=META)}, "`rows` must be on cpu"),
        ({"rows": torch.ones(2, 3, dtype=torch.bool)}, "`rows` must be a 1-d int64 tensor, but is torch.bool"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "`rows` must be a 1-d int64 tensor"),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, r"`rows` must be a 1-d int64 .* of shape \(2, 1\)"),
        ({"layers": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bfloat16)]}, r"`layers\[1\]` must be as"),
        ({"layers": [torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)]}, r"`layers\[1\]` must be as"),
        ({"layers": [torch.zeros(2, 3, 4, dtype=torch.int64)]}, r"`layers\[0\]` must be fp32"),
        ({"layers": [torch.zeros(6, 4)]}, r"`layers\[0\]` must have shape \[B, T, D\]"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"one entry per sample \(2\), but has 3"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"pred": torch.zeros(2, 4), "layers": [torch.zeros(2, 3, 4)], "rows": torch.zeros(2, dtype=torch.int64)}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        data2vec_loss(arguments.pop("pred"), arguments.pop("layers"), **arguments)


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: masked_smooth_l1(torch.zeros(2, 3), torch.zeros(5, 3), target_rows=indices(0, 7)),
            "`target_rows` must be in [0, 4], but holds 7.",
        ),
        (
            lambda: masked_smooth_l1(torch.zeros(1, 3).requires_grad_(), torch.zeros(5, 3), target_rows=indices(-6)),
            "`target_rows` must be in [0, 4], but holds -6.",
        ),
        (
            lambda: masked_smooth_l1(torch.zeros(1, 3), torch.zeros(0, 3), target_rows=indices(2)),
            "`target_rows` must be empty, as there is nothing to index, but holds 2.",
        ),
        (
            lambda: topk_target([torch.zeros(2, 3, 4)], rows=indices(5, 6)),
            "`rows` must be in [0, 5], but holds 6.",
        ),
        (
            lambda: topk_target([torch.zeros(0, 3, 4)], rows=indices(0)),
            "`rows` must be empty, as there is nothing to index, but holds 0.",
        ),
        (
            lambda: topk_target([torch.zeros(2, 3, 4)], rows=indices(0, 5), lengths=indices(3, 2)),
            "`rows` must lie within `lengths`, but 5 is a position past its sample's length.",
        ),
        (
            lambda: topk_target([torch.zeros(2, 3, 4)], lengths=indices(0, 4)),
            "`lengths` must be in [0, 3], but holds 4.",
        ),
        (
            lambda: data2vec_loss(torch.zeros(1, 4), [torch.zeros(2, 3, 4)], rows=indices(-1)),
            "`rows` must be in [0, 5], but holds -1.",
        ),
        (
            lambda: data2vec_loss(
                torch.zeros(2, 4).requires_grad_(),
                [torch.zeros(2, 3, 4)],
                rows=indices(1),
                target_rows=indices(0, 2**40),
            ),
            "`target_rows` must be in [0, 0], but holds 1099511627776.",
        ),
    ],
)
def test_index_out_of_range_is_an_index_error_in_one_sentence(call, message) -> None:
    """The message contains neither a path of the build machine nor the name of a C++ function."""
    with pytest.raises(IndexError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.skipif(not HAS_CPP, reason="the kernels are not built")
@pytest.mark.parametrize(
    "call",
    [
        lambda ops, x: ops.masked_smooth_l1(x.double(), x, None, 1.0, 1.0, True, True, True),
        lambda ops, x: ops.masked_smooth_l1(x, x[:1], None, 1.0, 1.0, True, True, True),
        lambda ops, x: ops.scale_gradient(x, x, 1.0, True),
        lambda ops, x: ops.data2vec_loss(x, [x], 1, 0, indices(0), None, 1e-5, None, 1.0, 1.0, True, True, True),
        lambda ops, x: ops.layer_norm_gelu(x, x[0, :1], x[0], 1e-5),
        lambda ops, x: ops.layer_norm_gelu_(x.t(), x[:, 0], x[:, 0], 1e-5),
        lambda ops, x: ops.ema_update_([x], [x, x], 0.5, None, []),
        lambda ops, x: ops.ema_update_([x.double()], [x], 0.5, None, []),
    ],
)
def test_what_the_kernels_refuse_is_a_value_error_without_a_path(call) -> None:
    with pytest.raises(ValueError, match=r"^[^/]+$"):
        call(torch.ops.d2v, torch.zeros(2, 3))


X = torch.zeros(2, 4)
Q = torch.zeros(1, 1, 2, 4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pred", lambda: masked_smooth_l1(None, X)),
        ("target", lambda: masked_smooth_l1(X, X.numpy())),
        ("pred", lambda: data2vec_loss(X.tolist(), [X[None]], rows=torch.zeros(2, dtype=torch.int64))),
        ("x", lambda: layer_norm_gelu(X.numpy(), X[0], X[0])),
        ("weight", lambda: layer_norm_gelu(X, None, X[0])),
        ("v", lambda: attention_with_bias(Q, Q, None, Q[..., :2])),
        ("bias", lambda: attention_with_bias(Q, Q, Q, None)),
        ("slopes", lambda: attention_with_alibi(Q, Q, Q, [1.0])),
    ],
)
def test_what_is_no_tensor_is_named(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be a tensor, but is "):
        call()
