"""data2vec_loss equals the loss of the target for every pair of norms, in the reference, C++ and Triton."""

from __future__ import annotations

import pytest
import torch

from d2v_fast.ops import data2vec_loss, masked_smooth_l1, topk_target
from d2v_fast.ops.data2vec_loss import data2vec_loss_reference
from tests.helpers.common import (
    DTYPES,
    assert_within_twice,
    non_contiguous,
)
from tests.ops.target_reference import FINAL_NORMS, LAYER_NORMS, make_layers, plain_loss, plain_moments, plain_target

every_pair = pytest.mark.parametrize(
    ("layer_norm", "final_norm"), [(first, final) for first in LAYER_NORMS for final in FINAL_NORMS]
)


def launcher():
    """The Triton launcher: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels.data2vec_loss import data2vec_loss as launch

    return launch


def make(device, shape, num_layers, num_rows, layer_dtype, pred_dtype, num_preds=None):
    """Return predictions, layers, rows, and a row map if there are more predictions than rows."""
    layers = [x[:, 1:] for x in make_layers((shape[0], shape[1] + 1, shape[2]), num_layers, layer_dtype, device)]
    rows = torch.randint(0, shape[0] * shape[1], (num_rows,), device=device)
    target_rows = None if num_preds is None else torch.randint(0, num_rows, (num_preds,), device=device)
    pred = torch.randn(num_preds or num_rows, shape[2], device=device).to(pred_dtype).requires_grad_()
    return pred, layers, rows, target_rows


def assert_same(one, other):
    """Assert equality, bit for bit on a CPU; on a GPU these are two kernels, which may reduce a row in two orders."""
    rtol = 0.0 if one.device.type == "cpu" else 1e-5 if one.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 10)


def gradient(loss, pred):
    return torch.autograd.grad(loss, pred)[0]


@every_pair
@pytest.mark.parametrize("layer_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_fp64(device, layer_norm, final_norm, layer_dtype, pred_dtype):
    pred, layers, rows, _ = make(device, (3, 50, 70), 3, 90, layer_dtype, pred_dtype)
    norms = {"layer_norm": layer_norm, "final_norm": final_norm}
    for beta, reduction in ((0.0, "mean"), (2.0, "sum")):
        loss, moments = data2vec_loss(pred, layers, rows=rows, beta=beta, scale=0.3, reduction=reduction, **norms)
        target = plain_target(layers, rows=rows, **norms)
        close = plain_target(layers, rows=rows, dtype=torch.float32, **norms)
        wide = pred.detach().double().requires_grad_()
        truth = plain_loss(wide, target, beta, 0.3, reduction)
        eager = plain_loss(pred, close, beta, 0.3, reduction, dtype=torch.float32)
        assert_within_twice(loss, eager, truth, name="loss")
        got = gradient(loss, pred)
        assert got.dtype == pred_dtype
        assert_within_twice(got, gradient(eager, pred), gradient(truth, wide), name="gradient")
        assert not moments.requires_grad
        assert_within_twice(
            moments, plain_moments(pred, close, torch.float32), plain_moments(pred, target), name="moments"
        )


@every_pair
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_equals_the_composition(device, layer_norm, final_norm, with_map, with_lengths):
    pred, layers, rows, target_rows = make(
        device, (2, 33, 20), 4, 30, torch.float32, torch.bfloat16, 101 if with_map else None
    )
    lengths = None
    if with_lengths:
        lengths = torch.tensor([33, 17], device=device)
        rows[rows >= 50] = 3
        for x in layers:
            x[1, 17:] = float("nan")
    shared = {"layer_norm": layer_norm, "final_norm": final_norm, "rows": rows, "lengths": lengths, "eps": 1e-3}
    fused = data2vec_loss(pred, layers, beta=0.7, target_rows=target_rows, **shared)
    parts = masked_smooth_l1(pred, topk_target(layers, **shared), beta=0.7, target_rows=target_rows)
    # a GPU adds in another order
    torch.testing.assert_close(fused.loss, parts.loss, rtol=1e-6 if device.type == "cpu" else 1e-5, atol=0)
    torch.testing.assert_close(fused.moments, parts.moments, rtol=1e-5, atol=1e-5)
    # a target that rounds the other way may move a gradient by one bf16 unit
    torch.testing.assert_close(gradient(fused.loss, pred), gradient(parts.loss, pred), rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("width", [1, 7, 768])
@pytest.mark.parametrize("num_rows", [1, 63, 1023])
def test_odd_sizes(device, num_rows, width):
    pred, layers, rows, _ = make(device, (2, 5, width), 2, num_rows, torch.bfloat16, torch.float32)
    for layer_norm in ("layer", "instance"):
        fused = data2vec_loss(pred, layers, rows=rows, layer_norm=layer_norm)
        parts = masked_smooth_l1(pred, topk_target(layers, rows=rows, layer_norm=layer_norm))
        # a target that rounds the other way moves a loss of few elements by more than that
        torch.testing.assert_close(fused.loss, parts.loss, rtol=1e-6, atol=0 if device.type == "cpu" else 1e-6)
        torch.testing.assert_close(gradient(fused.loss, pred), gradient(parts.loss, pred))


def test_memory_layouts(device):
    pred, layers, rows, target_rows = make(device, (3, 8, 20), 2, 12, torch.float32, torch.float32, 30)
    want = data2vec_loss(pred, layers, rows=rows, target_rows=target_rows)
    odd = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in layers]
    got = data2vec_loss(
        non_contiguous(pred.detach()),
        [odd[0], layers[1]],
        rows=non_contiguous(rows),
        target_rows=non_contiguous(target_rows),
    )
    torch.testing.assert_close(got.loss, want.loss.detach())
    torch.testing.assert_close(got.moments, want.moments)


@every_pair
def test_no_rows(device, layer_norm, final_norm):
    for shape, num_rows in (((2, 3, 4), 0), ((0, 3, 4), 0), ((2, 3, 0), 5), ((2, 0, 4), 0)):
        layers = [torch.zeros(shape, device=device)] * 2
        pred = torch.zeros(num_rows, shape[2], device=device, requires_grad=True)
        rows = torch.zeros(num_rows, dtype=torch.int64, device=device)
        loss, moments = data2vec_loss(pred, layers, layer_norm=layer_norm, final_norm=final_norm, rows=rows)
        assert loss == 0
        assert (moments == 0).all()
        assert gradient(loss, pred).shape == pred.shape


@pytest.mark.parametrize("with_map", [False, True])
def test_without_moments(device, with_map):
    pred, layers, rows, target_rows = make(
        device, (3, 50, 70), 2, 90, torch.bfloat16, torch.float32, 300 if with_map else None
    )
    for beta in (0.0, 1.5):
        with_moments, without = (
            data2vec_loss(pred, layers, final_norm="layer", rows=rows, target_rows=target_rows, beta=beta, moments=m)
            for m in (True, False)
        )
        assert without.moments is None
        # a GPU adds the losses in another order
        torch.testing.assert_close(without.loss, with_moments.loss, rtol=0 if device.type == "cpu" else 1e-6, atol=0)
        assert_same(gradient(without.loss, pred), gradient(with_moments.loss, pred))


def test_the_target_is_never_written():
    """No tensor of the size of the rows is allocated except the gradient."""
    pred, layers, rows, _ = make(torch.device("cpu"), (2, 300, 64), 2, 500, torch.bfloat16, torch.float32)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        data2vec_loss(pred, layers, rows=rows, final_norm="layer")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < pred.numel()


def test_incoming_gradients(device):
    pred, layers, rows, _ = make(device, (2, 6, 5), 2, 8, torch.float32, torch.float32)
    loss = data2vec_loss(pred, layers, rows=rows).loss
    base = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    expanded = torch.autograd.grad(loss.expand(4).sum(), pred, retain_graph=True)[0]
    torch.testing.assert_close(expanded, base * 4)
    (first,) = torch.autograd.grad(loss * pred.sum(), pred, create_graph=True)
    first.sum().backward()
    plain = pred.detach().requires_grad_()
    target = topk_target(layers, rows=rows)
    (first,) = torch.autograd.grad((plain - target).square().mean() * plain.sum(), plain, create_graph=True)
    first.sum().backward()
    torch.testing.assert_close(pred.grad, plain.grad)


def test_layers_get_no_gradient(device):
    pred, layers, rows, _ = make(device, (2, 6, 5), 2, 8, torch.float32, torch.float32)
    layers = [x.clone().requires_grad_() for x in layers]
    loss = data2vec_loss(pred, layers, rows=rows).loss
    assert torch.autograd.grad(loss, layers[0], allow_unused=True)[0] is None


def test_reference_agrees(device):
    pred, layers, rows, target_rows = make(device, (2, 9, 30), 3, 12, torch.bfloat16, torch.float32, 40)
    pred = pred.detach()
    for first in range(4):
        for final in range(3):
            arguments = (pred, layers, first, final, rows, None, 1e-5, target_rows, 1.5, 2.0, True, True, True)
            got, want = torch.ops.d2v.data2vec_loss(*arguments), data2vec_loss_reference(*arguments)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_thread_count_does_not_matter():
    pred, layers, rows, target_rows = make(torch.device("cpu"), (2, 90, 130), 3, 300, torch.float32, torch.float32, 700)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for first, final in (("layer", "layer"), ("instance", "instance"), ("batch", "none")):
                loss, moments = data2vec_loss(
                    pred, layers, layer_norm=first, final_norm=final, rows=rows, target_rows=target_rows
                )
                results.append((loss.detach(), moments, gradient(loss, pred)))
    finally:
        torch.set_num_threads(threads)
    for i, other in enumerate(results[3:]):
        assert all(torch.equal(a, b) for a, b in zip(results[i % 3], other, strict=True))


@pytest.mark.parametrize("need_grad", [False, True])
@pytest.mark.parametrize("with_map", [False, True])
def test_opcheck(device, need_grad, with_map):
    pred, layers, rows, target_rows = make(
        device, (2, 5, 6), 2, 4, torch.float32, torch.float32, 7 if with_map else None
    )
    pred = pred if need_grad else pred.detach()
    lengths = torch.tensor([5, 5], device=device)
    torch.library.opcheck(
        torch.ops.d2v.data2vec_loss.default,
        (pred, layers, 2, 1, rows, lengths, 1e-5, target_rows, 2.0, 1.0, True, need_grad, not need_grad),
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(device, backend):
    def step(p, x, r):
        shared = {"final_norm": "layer", "rows": r, "beta": 2.0}
        loss, moments = data2vec_loss(p * 2, [y + 1 for y in x], **shared)
        loss_alone, none = data2vec_loss(p * 2, [y + 1 for y in x], moments=False, **shared)
        assert none is None
        return loss + loss_alone + moments.sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=True)
    for num_rows in (4, 9, 31):
        pred, layers, rows, _ = make(device, (2, 8, 6), 2, num_rows, torch.float32, torch.float32)
        got, want = compiled(pred, layers, rows), step(pred, layers, rows)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient(got, pred), gradient(want, pred))


@every_pair
def test_triton_launcher(device, layer_norm, final_norm):
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    for beta, with_map in ((0.0, False), (1.5, True)):
        pred, layers, rows, target_rows = make(
            device, (2, 5, 7), 3, 4, torch.bfloat16, torch.float32, 6 if with_map else None
        )
        pred = pred.detach()
        lengths = torch.tensor([5, 4], device=device) if with_map else None
        rows[rows == 9] = 0
        target = plain_target(layers, layer_norm, final_norm, rows, lengths)
        target = target if target_rows is None else target[target_rows]
        arguments = (pred, layers, *norms, rows, lengths, 1e-5, target_rows, beta, 0.7, True)
        loss, moments, slope = launcher()(*arguments, True, True)
        wide = pred.double().requires_grad_()
        truth = plain_loss(wide, target, beta, 0.7, "mean")
        torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.double(), plain_moments(pred, target), rtol=1e-5, atol=1e-5)
        one = torch.tensor(1.0, device=device)
        got = torch.ops.d2v.scale_gradient(slope, one, 0.7, True).double()
        torch.testing.assert_close(got, gradient(truth, wide), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_map", [False, True])
def test_triton_launcher_computes_only_what_is_wanted(device, with_map):
    pred, layers, rows, target_rows = make(
        device, (2, 5, 7), 3, 4, torch.bfloat16, torch.float32, 6 if with_map else None
    )
    arguments = (pred.detach(), layers, 1, 1, rows, None, 1e-5, target_rows, 1.5, 0.7, True)
    loss, _, slope = launcher()(*arguments, True, True)
    without = launcher()(*arguments, True, False)
    assert without[1].numel() == 0
    # added in another order
    torch.testing.assert_close(without[0], loss, rtol=1e-6, atol=0)
    assert_same(without[2], slope)
    assert launcher()(*arguments, False, True)[2].numel() == 0


@pytest.mark.parametrize(
    ("num_rows", "width", "need_moments"), [(1, 5, True), (21, 3, True), (21, 3, False), (17, 1030, True)]
)
def test_triton_groups_of_rows(device, num_rows, width, need_moments):
    """Whole groups of rows, a last one that is not full, and wide rows; the same bits at every call."""
    pred, layers, rows, _ = make(device, (2, 7, width), 2, num_rows, torch.float32, torch.float32)
    pred = pred.detach()
    target = plain_target(layers, "layer", "layer", rows)
    arguments = (pred, layers, 1, 1, rows, None, 1e-5, None, 1.5, 0.7, True, True, need_moments)
    loss, moments, slope = launcher()(*arguments)
    wide = pred.double().requires_grad_()
    truth = plain_loss(wide, target, 1.5, 0.7, "mean")
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), gradient(truth, wide), rtol=1e-5, atol=1e-6)
    if need_moments:
        torch.testing.assert_close(moments.double(), plain_moments(pred, target), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(launcher()(*arguments), (loss, moments, slope), strict=True))


def test_triton_makes_a_shared_target_once(device, monkeypatch):
    """The loss gets one row of the target for each entry of `rows`, and no copy for each prediction."""
    launch = launcher()
    from d2v_fast.kernels import data2vec_loss as module

    sizes = []

    def compared(pred, target, target_rows, *others):
        sizes.append((pred.shape, target.shape, target_rows.shape))
        return masked(pred, target, target_rows, *others)

    masked = module.masked_smooth_l1
    monkeypatch.setattr(module, "masked_smooth_l1", compared)
    pred, layers, rows, target_rows = make(device, (2, 5, 7), 2, 4, torch.float32, torch.float32, 12)
    launch(pred.detach(), layers, 1, 0, rows, None, 1e-5, target_rows, 0.0, 1.0, True, True, False)
    assert sizes == [((12, 7), (4, 7), (12,))]


def test_triton_odd_inputs(device):
    layers = make_layers((2, 3, 5), 2, torch.float32, device)
    rows = torch.tensor([0, 6, -1, 5], device=device)
    pred = torch.zeros(6, 5, device=device)
    target_rows = torch.tensor([0, 1, 2, 3, 4, -1], device=device)
    loss, _, slope = launcher()(pred, layers, 1, 0, rows, None, 1e-5, target_rows, 1.0, 1.0, True, True, True)
    assert loss.isnan()
    assert slope.isnan().all(1).tolist() == [False, True, True, False, True, True]
    empty = pred[:0]
    loss, moments, slope = launcher()(empty, layers, 2, 2, rows[:0], None, 1e-5, None, 1.0, 1.0, True, True, True)
    assert loss == 0
    assert (moments == 0).all()
    assert slope.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(2, 5)}, r"`pred` must have shape \[N, 4\]"),
        ({"pred": torch.zeros(2)}, r"`pred` must have shape \[N, D\]"),
        ({"pred": torch.zeros(2, 4, dtype=torch.int64)}, "`pred` must be fp32"),
        ({"layers": []}, "at least one"),
        ({"layer_norm": "rms"}, "`layer_norm` must be one of"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"one entry per row of `pred` \(2\), but has 3"),
        ({"rows": torch.zeros(2)}, "`rows` must be a 1-d int64"),
        ({"target_rows": torch.zeros(3, dtype=torch.int64)}, r"one entry per row of `pred` \(2\), but has 3"),
        ({"beta": -1.0}, "`beta`"),
        ({"reduction": "max"}, "`reduction`"),
        ({"eps": -1.0}, "`eps`"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "pred": torch.zeros(2, 4),
        "layers": [torch.zeros(2, 3, 4)],
        "rows": torch.zeros(2, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=message):
        data2vec_loss(**arguments)


@pytest.mark.parametrize("operation", [torch.ops.d2v.data2vec_loss, data2vec_loss_reference])
@pytest.mark.parametrize(
    ("rows", "target_rows", "message"),
    [
        ([0, 6], None, "`rows`.*holds 6"),
        ([0, -1], None, "`rows`.*holds -1"),
        ([0, 1], [2, 0], "`target_rows`.*holds 2"),
    ],
)
def test_indices_out_of_range(operation, rows, target_rows, message):
    target_rows = None if target_rows is None else torch.tensor(target_rows)
    arguments = (torch.zeros(2, 4), [torch.zeros(2, 3, 4)], 1, 0, torch.tensor(rows), None, 1e-5, target_rows)
    with pytest.raises(IndexError, match=message):
        operation(*arguments, 0.0, 1.0, True, True, True)
