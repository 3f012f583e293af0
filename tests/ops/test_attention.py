"""Attention with a bias or ALiBi: values and gradients against fp64, in the reference and in Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2v_fast.ops import attention as module
from d2v_fast.ops import attention_parts, attention_with_alibi, attention_with_bias
from d2v_fast.ops.attention import attention_with_bias_reference
from tests.helpers.common import assert_within_twice

# B, H, T, D, form of the bias, and whether samples are padded and have positions
CASES = [
    (2, 3, 39, 32, "shared", False, False),
    (3, 1, 70, 80, "own", True, False),
    (1, 5, 33, 16, "shared", True, False),
    (2, 3, 39, 64, "slopes", True, True),
    (3, 2, 9, 7, "slopes", False, False),
]
FORWARD, BACKWARD = (
    getattr(torch.ops.d2v, name).default for name in ("attention_with_bias", "attention_with_bias_backward")
)


def make(device, B, H, T, D, form, padded, placed, dtype=torch.float32):
    """Return q, k, v as a projection gives them, a bias or slopes, an incoming gradient, positions and lengths."""
    q, k, v = torch.randn(B, T, 3, H, D, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    if form == "slopes":
        bias = torch.rand(H, device=device) * 0.2
    else:
        # rows that start at multiples of 8, and undefined columns after T, as `RelativePositionBias` makes them
        whole = torch.full((1 if form == "shared" else B, H, T, T + -T % 8), float("nan"), device=device, dtype=dtype)
        bias = whole[..., :T].normal_()
    positions = torch.rand(B, 3 * T, device=device).argsort(-1)[:, :T].sort(-1).values if placed else None
    lengths = torch.randint(1, T, (B,), device=device) if padded else None
    grad = torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2)
    return (q, k, v, bias), grad, positions, lengths


def composition(q, k, v, bias, positions, lengths, dtype):
    """Compute the operation from PyTorch's own in `dtype`."""
    T = q.shape[2]
    if bias.dim() == 1:
        places = torch.arange(T, device=q.device)[None] if positions is None else positions
        distance = (places[:, None, :, None] - places[:, None, None, :]).abs()
        bias = -bias[None, :, None, None] * distance
    mask = bias.to(dtype)
    if lengths is not None:
        is_key = torch.arange(T, device=q.device) < lengths[:, None]
        mask = mask.masked_fill(~is_key[:, None, None], -torch.inf)
    logits = q.to(dtype) @ k.to(dtype).mT / q.shape[-1] ** 0.5 + mask
    return logits.softmax(-1) @ v.to(dtype)


def gradients(inputs, grad, options, dtype):
    wide = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = composition(*wide, *options, dtype)
    return y, *torch.autograd.grad(y, wide, grad.to(dtype))


NAMES = ("out", "grad_q", "grad_k", "grad_v", "grad_bias")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_functions_match_fp64(device, case):
    inputs, grad, positions, lengths = make(device, *case)
    leaves = [x.detach().requires_grad_() for x in inputs]
    if case[4] == "slopes":
        y = attention_with_alibi(*leaves, positions=positions, lengths=lengths)
    else:
        y = attention_with_bias(*leaves, lengths=lengths)
    got = y, *torch.autograd.grad(y, leaves, grad)
    eager = gradients(inputs, grad, (positions, lengths), torch.float32)
    truth = gradients(inputs, grad, (positions, lengths), torch.float64)
    for name, one, other, right in zip(NAMES, got, eager, truth, strict=True):
        # on a GPU, a product of fp32 is three of tf32
        assert_within_twice(one, other, right, name=name, floor=1e-6 if device.type == "cpu" else 1e-5)


@pytest.mark.parametrize(
    ("case", "dropout"), [(CASES[0], 0.0), (CASES[1], 0.3), (CASES[3], 0.0), (CASES[4], 0.3)], ids=str
)
def test_gradcheck(device, case, dropout):
    _, _, _, _, form, padded, placed = case
    inputs, _, positions, lengths = make(device, 2, 2, 3, 2, form, padded, placed, torch.float64)
    seed = torch.tensor([77], device=device) if dropout else None
    leaves = [x.double().detach().requires_grad_() for x in inputs]
    run = lambda *x: FORWARD(*x, positions, lengths, seed, dropout)[0]  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=dropout == 0.0, check_batched_grad=False)
    if case is CASES[0]:
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("padded", [False, True])
def test_fp64(device, padded):
    inputs, grad, _, lengths = make(device, 2, 2, 5, 4, "shared", padded, False, torch.float64)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = attention_with_bias(*leaves, lengths=lengths)
    want = gradients(inputs, grad, (None, lengths), torch.float64)
    for one, other in zip((y, *torch.autograd.grad(y, leaves, grad)), want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("logits", [1, 200, 2**20])
def test_alibi_in_parts_on_a_cpu(logits, monkeypatch):
    """Of any number of heads, with padding, a sample without tokens, and dropout that the backward pass repeats."""
    monkeypatch.setattr(attention_parts, "_PART", logits)
    inputs, grad, positions, _ = make(torch.device("cpu"), 3, 4, 9, 6, "slopes", False, True, torch.float64)
    leaves, lengths = [x.double().requires_grad_() for x in inputs], torch.tensor([9, 0, 4])
    grad = grad.double() * (torch.arange(9) < lengths[:, None])[:, None, :, None]
    y = attention_with_alibi(*leaves, positions=positions, lengths=lengths)
    want, _ = attention_with_bias_reference(*leaves, positions, lengths, None, 0.0)
    torch.testing.assert_close(y, want)
    for one, other in zip(*(torch.autograd.grad(x, leaves, grad) for x in (y, want)), strict=True):
        torch.testing.assert_close(one, other)

    def dropping(*leaves):
        torch.manual_seed(3)
        return attention_with_alibi(*leaves, positions=positions, lengths=lengths, dropout=0.3)

    assert not torch.equal(dropping(*leaves), y)
    assert torch.autograd.gradcheck(dropping, leaves, fast_mode=True)
    with pytest.raises(RuntimeError, match="with dropout has no derivative on a CPU"):
        torch.autograd.grad(dropping(*leaves).sum(), leaves, create_graph=True)


def test_learned_scale_of_alibi(device):
    """The scale multiplies the slopes, and its gradient is theirs times the slopes."""
    (q, k, v, slopes), grad, positions, _ = make(device, 2, 3, 11, 8, "slopes", False, True)
    scale = torch.tensor([0.5, 0.0, 2.0], device=device, requires_grad=True)
    leaf = (slopes * scale.detach()).requires_grad_()
    y = attention_with_alibi(q, k, v, slopes, scale, positions=positions)
    want = attention_with_alibi(q, k, v, leaf, positions=positions)
    assert torch.equal(y, want)
    (got,) = torch.autograd.grad(y, scale, grad)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaf, grad)[0] * slopes)


def test_paths_of_plain_operations(device):
    """Without a gradient of the bias, PyTorch's attention runs; the output has the layout that it gives."""
    (q, k, v, bias), _, _, _ = make(device, 2, 3, 24, 16, "shared", False, False)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.equal(attention_with_bias(q, k, v, bias), want)
    with torch.no_grad():
        assert torch.equal(attention_with_bias(q, k, v, bias.detach().requires_grad_()), want)


def test_a_sample_without_keys_gives_zeros(device):
    (q, k, v, bias), grad, _, _ = make(device, 2, 2, 5, 4, "shared", False, False)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    y = attention_with_bias(*leaves, lengths=torch.tensor([5, 0], device=device))
    assert not y[1].any()
    grads = torch.autograd.grad(y, leaves, grad)
    assert all(x.isfinite().all() for x in grads)
    assert not any(x[1].any() for x in grads[:3])


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_is_a_function_of_the_seed(device, rate):
    """Weights are dropped at the rate, independently over heads, queries and keys, and the rest is scaled up."""
    B, H, T = 2, 3, 64
    q = torch.zeros(B, H, T, T, device=device)
    eye = torch.eye(T, device=device).expand(B, H, T, T).contiguous()
    bias = torch.zeros(1, H, T, T, device=device)
    draw = lambda seed: attention_with_bias(q, q, eye, bias, dropout=rate, seed=torch.tensor([seed], device=device))  # noqa: E731
    weights = draw(5)
    assert torch.equal(draw(5), weights)
    assert not torch.equal(draw(6), weights)
    assert not torch.equal(draw(5 + 2**32), weights)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (T * (1 - rate))))
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs((~kept).double().mean() - rate) < 5 * deviation / kept.numel() ** 0.5
    for dims in ((0, 1, 2), (0, 1, 3)):
        share = (~kept).double().mean(dims)
        assert (share - rate).abs().max() < 5 * deviation / (B * H * T) ** 0.5
    # correlation of neighbors, and of the same place in two heads
    centered = (kept.double() - kept.double().mean()) / deviation
    pairs = (centered[..., 1:] * centered[..., :-1], centered[..., 1:, :] * centered[..., :-1, :])
    for pair in (*pairs, centered[:, 1:] * centered[:, :-1], centered[1:] * centered[:-1]):
        assert pair.mean().abs() < 5 / pair.numel() ** 0.5
    torch.manual_seed(3)
    one = attention_with_bias(q, q, eye, bias, dropout=rate)
    assert not torch.equal(attention_with_bias(q, q, eye, bias, dropout=rate), one)
    torch.manual_seed(3)
    assert torch.equal(attention_with_bias(q, q, eye, bias, dropout=rate), one)


# slow: as the first, with other arguments
@pytest.mark.parametrize("form", ["shared", pytest.param("slopes", marks=pytest.mark.slow)])
def test_opcheck(device, form):
    inputs, grad, positions, lengths = make(device, 2, 3, 5, 4, form, True, form == "slopes", torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in inputs]
    options = positions, lengths, torch.tensor([9], device=device), 0.2
    torch.library.opcheck(FORWARD, (*leaves, *options))
    out, lse = FORWARD(*inputs, *options)
    torch.library.opcheck(BACKWARD, (grad, *inputs, out, lse, *options, form == "shared"))


def test_compile_fullgraph(device):
    def step(q, k, v, bias, lengths):
        return attention_with_bias(q * 2, k, v, bias, lengths=lengths).sum(-1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (6, 9):
        inputs, _, _, lengths = make(device, 2, 3, T, 4, "shared", True, False)
        leaves = [x.detach().requires_grad_() for x in inputs]
        got, want = compiled(*leaves, lengths), step(*leaves, lengths)
        torch.testing.assert_close(got, want)
        grads = (torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (got, want))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_transforms(device):
    """`torch.func` and forward mode run PyTorch's operations, and the backward pass refuses its own derivative."""
    inputs, grad, _, _ = make(device, 2, 2, 5, 4, "shared", False, False)

    def loss(bias):
        return (attention_with_bias(*inputs[:3], bias) * grad).sum()

    want = gradients(inputs, grad, (None, None), torch.float32)[4]
    torch.testing.assert_close(torch.func.grad(loss)(inputs[3]), want)
    tangent = torch.randn_like(inputs[3])
    value = torch.func.jvp(loss, (inputs[3],), (tangent,))[1]
    torch.testing.assert_close(value, (want * tangent).sum(), rtol=1e-4, atol=1e-5)
    many = torch.func.vmap(loss)(torch.stack([inputs[3], inputs[3] * 2]))
    torch.testing.assert_close(many, torch.stack([loss(inputs[3]), loss(inputs[3] * 2)]))
    out, lse = FORWARD(*inputs, None, None, None, 0.0)
    leaf = inputs[0].detach().requires_grad_()
    result = BACKWARD(grad, leaf, *inputs[1:], out, lse, None, None, None, 0.0, True)[0]
    with pytest.raises(RuntimeError, match="`attention_with_bias_backward` has no derivative"):
        result.sum().backward()


# the interpreter's products of bf16 are wrong, so that bf16 is compiled below and not run
@pytest.mark.parametrize(
    ("case", "dtype", "dropout"),
    [
        (CASES[0], torch.float32, 0.0),
        (CASES[1], torch.float16, 0.2),
        (CASES[2], torch.float16, 0.0),
        pytest.param(CASES[3], torch.float32, 0.2, marks=pytest.mark.slow),
        pytest.param(CASES[4], torch.float16, 0.0, marks=pytest.mark.slow),
        # two passes over 64 dimensions; slow: the interpreter takes over 10 s
        pytest.param((2, 2, 70, 64, "shared", False, False), torch.float32, 0.05, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_triton_launchers(device, dtype, case, dropout):
    kernels = launchers()
    inputs, grad, positions, lengths = make(device, *case, dtype)
    seed = torch.tensor([-5], device=device) if dropout else None
    options = None if positions is None else positions.to(torch.int32), lengths, seed, dropout
    wide = [x.double() for x in inputs]
    out, lse = module.attention_with_bias_reference(*wide, *options)
    want = module.attention_with_bias_backward_reference(grad.double(), *wide, out, lse, *options, True)
    got_out, got_lse = kernels[0](*inputs, *options)
    got = kernels[1](grad, *inputs, got_out, got_lse, *options, True)
    assert got_out.transpose(1, 2).is_contiguous()
    error = 1e-5 if dtype == torch.float32 else 8e-3
    names = ("out", "lse", *NAMES[1:])
    for name, one, right in zip(names, (got_out, got_lse, *got), (out, lse, *want), strict=True):
        assert one.shape == right.shape, name
        difference = (one.double() - right).abs().max() / right.abs().max()
        assert difference <= error, (name, difference)
    *same, empty = kernels[1](grad, *inputs, got_out, got_lse, *options, False)
    assert empty.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(same, got[:3], strict=True))


def assert_same(got, want):
    """Assert equality, bit for bit on a CPU; a GPU's compiler may fuse other products for another alignment."""
    for one, other in zip(got, want, strict=True):
        tolerance = 0.0 if one.device.type == "cpu" else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def launchers():
    """The Triton launchers of both passes: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels import attention, attention_backward

    return attention.attention_with_bias, attention_backward.attention_with_bias_backward


@pytest.mark.parametrize("programs", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_triton_parts_of_a_batch(device, monkeypatch, programs):
    """The gradient of a shared bias is complete however the batch is divided, here into 1 and 2 parts."""
    forward, backward = launchers()
    from d2v_fast.kernels import attention_backward

    monkeypatch.setattr(attention_backward, "BIAS_PROGRAMS", programs)
    inputs, grad, _, lengths = make(device, 5, 3, 33, 16, "shared", True, False)
    options = None, lengths, None, 0.0
    out, lse = forward(*inputs, *options)
    got = backward(grad, *inputs, out, lse, *options, True)[3]
    want = module.attention_with_bias_backward_reference(grad, *inputs, out, lse, *options, True)[3]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["shared", "slopes"])
def test_triton_lengths_out_of_range(device, form):
    """More tokens than there are count as all, fewer than none as none, in both passes and in every form."""
    forward, backward = launchers()
    inputs, grad, positions, _ = make(device, 2, 2, 9, 8, form, False, form == "slopes")
    results = []
    for numbers in ([9, 0], [20, -3]):
        lengths = torch.tensor(numbers, device=device)
        options = None if positions is None else positions.int(), lengths, None, 0.0
        out, lse = forward(*inputs, *options)
        results.append((out, lse, *backward(grad, *inputs, out, lse, *options, True)))
        plain = attention_with_alibi if form == "slopes" else attention_with_bias
        placed = {"positions": positions} if form == "slopes" else {}
        assert_same_shares(plain(*inputs, lengths=lengths, **placed), out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def assert_same_shares(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_triton_odd_inputs(device):
    """Layouts with gaps, a bias without room after its rows, a sample without keys, and an empty batch."""
    forward, backward = launchers()
    from d2v_fast.kernels.attention import aligned

    inputs, grad, _, _ = make(device, 2, 2, 9, 8, "shared", False, False)
    lengths = torch.tensor([9, 0], device=device)
    options = None, lengths, None, 0.0
    assert aligned(inputs[3])[1] == 8
    assert aligned(inputs[3].contiguous())[1] == 1
    # memory ends with the last row
    short = torch.zeros(1 * 2 * 9 * 16 - 7, device=device).as_strided((1, 2, 9, 9), (288, 144, 16, 1))
    assert aligned(short)[1] == 1
    out, lse = forward(*inputs, *options)
    want = backward(grad, *inputs, out, lse, *options, True)
    assert not out[1].any()
    assert all(x.isfinite().all() for x in want)
    odd = [x.mT.contiguous().mT for x in inputs]
    assert_same([forward(*odd, *options)[0]], [out])
    expanded = inputs[3].contiguous()
    for form in (odd, [*inputs[:3], expanded]):
        got = backward(grad.mT.contiguous().mT, *form, out.contiguous(), lse, *options, True)
        assert_same(got, want)
    none = [x[:0] for x in inputs[:3]]
    out, lse = forward(*none, inputs[3], None, None, None, 0.0)
    assert out.shape == (0, 2, 9, 8)
    grads = backward(out, *none, inputs[3], out, lse, None, None, None, 0.0, True)
    assert not grads[3].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"`q` must have shape \[B, H, T, D\] with H, T, D >= 1, but has \[2, 3, 4\]"),
        ({"q": torch.zeros(2, 3, 0, 5)}, r"`q` must have shape"),
        ({"q": torch.zeros(2, 3, 4, 5).int()}, "`q` must be fp32, bf16, fp16 or fp64, but is torch.int32 instead"),
        ({"k": torch.zeros(2, 3, 4, 6)}, r"`k` must be torch.float32 of shape \[2, 3, 4, 5\] as `q` is, but is"),
        ({"v": torch.zeros(2, 3, 4, 5).half()}, "`v` must be torch.float32 of shape"),
        ({"bias": torch.zeros(3, 3, 4, 4)}, r"`bias` must have shape \[1, 3, 4, 4\] or \[2, 3, 4, 4\], but has \[3, "),
        ({"bias": torch.zeros(1, 3, 4, 4).half()}, "`bias` must be fp32 or torch.float32 as `q` is, but is"),
        ({"bias": torch.zeros(1, 3, 4, 4, device="meta")}, "`bias` must be on cpu as `q` is, but is on meta instead"),
        ({"k": torch.zeros(2, 3, 4, 5, device="meta")}, "`k` must be on cpu as `q` is, but is on meta instead"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"`lengths` must be integers of shape \[2\], one for each"),
        ({"lengths": torch.ones(2)}, "`lengths` must be integers of shape"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), but is 1.0 instead"),
        ({"seed": torch.zeros(1)}, r"`seed` must be int64 of shape \[1\], but is"),
        ({"slopes": torch.ones(2)}, r"`slopes` must have shape \[3\], one for each head, but has \[2\] instead"),
        ({"slopes": torch.ones(3), "scale": torch.ones(3).double()}, "`scale` must be fp32 or torch.float32 as `q` is"),
        ({"slopes": torch.ones(3, device="meta")}, "`slopes` must be on cpu as `q` is, but is on meta instead"),
        ({"slopes": torch.ones(3), "positions": torch.ones(2, 4)}, r"`positions` must be integers of shape \[2, 4\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {name: torch.zeros(2, 3, 4, 5) for name in "qkv"} | change
    operation = attention_with_bias
    if "slopes" in change:
        operation = attention_with_alibi
    else:
        arguments.setdefault("bias", torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=message):
        operation(**arguments)
