"""topk_target against fp64 for every pair of norms, in the reference, C++ and Triton."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.ops import topk_target
from d2v_fast.ops.topk_target import topk_target_reference
from tests.helpers.common import DTYPES, assert_within_twice
from tests.ops.target_reference import FINAL_NORMS, LAYER_NORMS, make_layers, plain_target

every_pair = pytest.mark.parametrize(
    ("layer_norm", "final_norm"), [(first, final) for first in LAYER_NORMS for final in FINAL_NORMS]
)


def launcher():
    """The Triton launcher: interpreted on CPU, compiled on CUDA."""
    pytest.importorskip("triton")
    from d2v_fast.kernels.topk_target import topk_target as launch

    return launch


def check(layers, layer_norm, final_norm, rows=None, lengths=None, got=None):
    """Assert that `got`, or the operation's result, is as close to fp64 as the plain arithmetic in fp32."""
    if got is None:
        got = topk_target(layers, layer_norm=layer_norm, final_norm=final_norm, rows=rows, lengths=lengths)
    truth = plain_target(layers, layer_norm, final_norm, rows, lengths)
    eager = plain_target(layers, layer_norm, final_norm, rows, lengths, dtype=torch.float32)
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    name = f"{layer_norm} then {final_norm}"
    has_few = layers[0].shape[1] <= 2 or (lengths is not None and bool(((lengths > 0) & (lengths <= 2)).any()))
    on_gpu = got.device.type == "cuda"
    if on_gpu and final_norm == "instance" and has_few:
        # of one position, or of two that are nearly alike, little is left but how two kernels round their average,
        # times 1 / sqrt(eps)
        largest = max(x.nan_to_num().abs().max().item() for x in layers)
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=2**-22 * largest / 1e-5**0.5, msg=name)
        return
    # a GPU draws other numbers, and the largest of few errors is a matter of chance
    assert_within_twice(got, eager, truth, times=4.0 if on_gpu and got.numel() < 1000 else 2.0, name=name)


@every_pair
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_matches_fp64(device, layer_norm, final_norm, dtype, offset):
    layers = make_layers((3, 150, 133), 4, dtype, device, offset)
    rows = torch.randint(0, 450, (70,), device=device)
    check(layers, layer_norm, final_norm, rows)
    check(layers, layer_norm, final_norm)


@every_pair
def test_lengths_leave_out_the_padding(device, layer_norm, final_norm):
    lengths = torch.tensor([23, 1, 0, 70], device=device)
    layers = make_layers((4, 70, 19), 3, torch.float32, device, 10.0)
    for x in layers:
        for b, n in enumerate(lengths.tolist()):
            x[b, n:] = float("nan")
    rows = torch.tensor([0, 22, 70, 70, 279, 210, 215], device=device)
    for wanted in (rows, None):
        check(layers, layer_norm, final_norm, wanted, lengths)
    full = topk_target(layers, layer_norm=layer_norm, final_norm=final_norm, lengths=lengths)
    assert (full[0, 23:] == 0).all()
    assert (full[2] == 0).all()


@pytest.mark.parametrize("num_rows", [1, 63, 1023])
@pytest.mark.parametrize(("num_positions", "width"), [(1, 768), (63, 1), (63, 768), (1023, 7), (9, 2100)])
def test_odd_sizes(device, num_positions, width, num_rows):
    layers = make_layers((2, num_positions, width), 2, torch.float32, device)
    rows = torch.randint(0, 2 * num_positions, (num_rows,), device=device)
    for layer_norm, final_norm in (("layer", "layer"), ("instance", "none"), ("layer", "instance")):
        check(layers, layer_norm, final_norm, rows)


@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_stride(data):
    num_samples, num_positions, width = (data.draw(st.integers(1, 40), label=letter) for letter in "BTD")
    dtype = data.draw(st.sampled_from(DTYPES))
    skip, gap = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    num_layers = data.draw(st.integers(1, 6))
    whole = make_layers((num_samples, skip + num_positions, width + gap), num_layers, dtype, torch.device("cpu"))
    layers = [x[:, skip:, :width] for x in whole]
    lengths = None
    if data.draw(st.booleans()):
        lengths = torch.randint(1, num_positions + 1, (num_samples,))
    rows = torch.randint(0, num_samples * num_positions, (data.draw(st.integers(0, 50)),))
    if lengths is not None:
        rows = rows[rows % num_positions < lengths[rows // num_positions]]
    pair = data.draw(st.sampled_from(LAYER_NORMS)), data.draw(st.sampled_from(FINAL_NORMS))
    # a norm of few and close values magnifies rounding by up to 1 / sqrt(eps), so eps is not small here
    got = topk_target(layers, layer_norm=pair[0], final_norm=pair[1], rows=rows, lengths=lengths, eps=1e-2)
    truth = plain_target(layers, *pair, rows, lengths, eps=1e-2)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=2e-5)


def test_memory_layouts(device):
    base = make_layers((3, 12, 20), 2, torch.bfloat16, device)
    layouts = [
        [x[:, 1:] for x in base],
        [x.transpose(1, 2) for x in base],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in base],
        [base[0], base[1].transpose(0, 1).contiguous().transpose(0, 1)],
        [x[:1].expand(3, -1, -1) for x in base],
        [x[:, :, ::2] for x in base],
        [x[:, :, :1] for x in base],
    ]
    for layers in layouts:
        rows = torch.arange(0, layers[0].shape[0] * layers[0].shape[1], 2, device=device)
        check(layers, "layer", "none", rows.flip(0))
        check(layers, "instance", "layer", torch.stack([rows, rows], 1)[:, 0])


def test_a_view_costs_no_copy():
    layers = [x[:, 1:] for x in make_layers((3, 12, 20), 4, torch.bfloat16, torch.device("cpu"))]
    with torch.profiler.profile(profile_memory=True) as profile:
        for final_norm in FINAL_NORMS:
            topk_target(layers, layer_norm="instance", final_norm=final_norm, rows=torch.arange(5))
    names = {event.name for event in profile.events()}
    assert "d2v::topk_target" in names
    assert not names & {"aten::clone", "aten::copy_"}


@every_pair
def test_nothing_is_fine(device, layer_norm, final_norm):
    def target(shape, rows=None):
        layers = [torch.zeros(shape, device=device)] * 2
        rows = None if rows is None else torch.zeros(rows, dtype=torch.int64, device=device)
        return topk_target(layers, layer_norm=layer_norm, final_norm=final_norm, rows=rows)

    assert target((2, 3, 4), rows=0).shape == (0, 4)
    assert target((0, 3, 4)).shape == (0, 3, 4)
    assert target((0, 3, 4), rows=0).shape == (0, 4)
    assert target((2, 0, 4)).shape == (2, 0, 4)
    assert target((2, 3, 0)).shape == (2, 3, 0)
    assert target((2, 3, 0), rows=5).shape == (5, 0)
    assert (target((2, 3, 4)) == 0).all()


def test_no_gradient(device):
    layers = [torch.randn(2, 3, 4, device=device, requires_grad=True)]
    assert not topk_target(layers).requires_grad


@every_pair
def test_reference_agrees(device, layer_norm, final_norm):
    layers = make_layers((3, 20, 18), 3, torch.bfloat16, device)
    lengths = torch.tensor([20, 3, 11], device=device)
    rows = torch.tensor([5, 0, 22, 50], device=device)
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    for wanted, valid in ((rows, lengths), (None, lengths), (rows, None), (None, None)):
        check(layers, layer_norm, final_norm, wanted, valid, topk_target_reference(layers, *norms, wanted, valid, 1e-5))


def test_thread_count_does_not_matter():
    layers = make_layers((3, 300, 70), 3, torch.float32, torch.device("cpu"))
    rows = torch.randint(0, 900, (500,))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [
                    topk_target(layers, layer_norm=first, final_norm=final, rows=rows)
                    for first in LAYER_NORMS
                    for final in FINAL_NORMS
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_opcheck(device, with_rows, with_lengths):
    layers = make_layers((2, 5, 6), 3, torch.bfloat16, device)
    rows = torch.tensor([1, 7], device=device) if with_rows else None
    lengths = torch.tensor([4, 5], device=device) if with_lengths else None
    torch.library.opcheck(torch.ops.d2v.topk_target.default, (layers, 2, 1, rows, lengths, 1e-5))


def test_compile_fullgraph(device):
    compiled = torch.compile(
        lambda x, r: topk_target([y * 2 for y in x], final_norm="layer", rows=r) + 1,
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for num_rows in (3, 8, 17):
        layers = make_layers((2, 9, 12), 3, torch.float32, device)
        rows = torch.randint(0, 18, (num_rows,), device=device)
        torch.testing.assert_close(
            compiled(layers, rows), topk_target([x * 2 for x in layers], final_norm="layer", rows=rows) + 1
        )


@every_pair
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_triton_launcher(device, layer_norm, final_norm, dtype):
    layers = [x[:, 1:] for x in make_layers((2, 6, 7), 3, dtype, device, 100.0)]
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    rows = torch.tensor([9, 0, 3, 3], device=device)
    lengths = torch.tensor([4, 5], device=device)
    for wanted, valid in ((rows, None), (None, lengths)):
        got = launcher()(layers, *norms, wanted, valid, 1e-5)
        check(layers, layer_norm, final_norm, wanted, valid, got)


@pytest.mark.parametrize(
    ("shape", "layer_norm", "final_norm"),
    [
        ((1, 70, 65), "instance", "none"),
        ((2, 300, 3), "instance", "none"),
        ((1, 256, 2), "instance", "layer"),
        ((3, 66, 3), "batch", "layer"),
        ((1, 2, 1030), "layer", "instance"),
        ((1, 67, 1), "layer", "instance"),
        ((2, 1, 5), "instance", "instance"),
        ((1, 2, 768), "layer", "layer"),
    ],
    ids=str,
)
def test_triton_launcher_odd_sizes(device, shape, layer_norm, final_norm):
    layers = make_layers(shape, 2, torch.float32, device, 100.0)
    norms = LAYER_NORMS.index(layer_norm), FINAL_NORMS.index(final_norm)
    rows = torch.tensor([0, shape[0] * shape[1] - 1], device=device)
    check(layers, layer_norm, final_norm, rows, got=launcher()(layers, *norms, rows, None, 1e-5))


@pytest.mark.parametrize(("shape", "norms"), [((5, 2, 3), ("batch", "none")), ((2, 37, 2), ("none", "instance"))])
def test_triton_puts_many_parts_together(device, monkeypatch, shape, norms):
    launch = launcher()
    from d2v_fast.kernels import target_statistics

    monkeypatch.setattr(target_statistics, "PARTS_PER_TILE", 2)
    layers = make_layers(shape, 2, torch.float32, device, 100.0)
    indices = LAYER_NORMS.index(norms[0]), FINAL_NORMS.index(norms[1])
    check(layers, *norms, got=launch(layers, *indices, None, None, 1e-5))
    lengths = torch.tensor([shape[1] - 1, 0, shape[1], 0, 1][: shape[0]], device=device)
    check(layers, *norms, lengths=lengths, got=launch(layers, *indices, None, lengths, 1e-5))


@pytest.mark.parametrize("num_positions", [200, 300])
def test_triton_statistics_of_padded_samples(device, num_positions):
    """Lengths on both sides of whole tiles, NaN in the padding, and an outlier in the first position."""
    lengths = torch.tensor([num_positions, 129, 64, 31, 1, 0], device=device)
    layers = make_layers((6, num_positions, 3), 2, torch.float32, device, 100.0)
    for x in layers:
        x[0, 0] = 1e4
        for b, n in enumerate(lengths.tolist()):
            x[b, n:] = float("nan")
    mean, scale, *_ = launcher_of_statistics()(tuple(layers), LAYER_NORMS.index("instance"), 0, lengths, 1e-5)
    for k, x in enumerate(layers):
        for b, n in enumerate(lengths.tolist()):
            wide = x[b, : max(n, 1)].double() if n else torch.zeros(1, 3, dtype=torch.float64, device=device)
            torch.testing.assert_close(mean[k, b].double(), wide.mean(0), rtol=1e-6, atol=0)
            right = (wide.var(0, correction=0) + 1e-5).rsqrt() / 2
            torch.testing.assert_close(scale[k, b].double(), right, rtol=2e-5, atol=0)


def launcher_of_statistics():
    """The Triton launcher of statistics over positions."""
    pytest.importorskip("triton")
    from d2v_fast.kernels.target_statistics import statistics

    return statistics


def test_triton_rows_out_of_range_are_nan(device):
    layers = make_layers((2, 5, 6), 2, torch.float32, device)
    rows = torch.tensor([3, -1, 10, 2**40], device=device)
    got = launcher()(layers, 1, 1, rows, None, 1e-5)
    assert not got[0].isnan().any()
    assert got[1:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "at least one"),
        ({"layers": [torch.zeros(3, 4)]}, r"shape \[B, T, D\]"),
        ({"layers": [torch.zeros(2, 3, 4, dtype=torch.int32)]}, "fp32, bf16, fp16 or fp64"),
        ({"layers": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)]}, r"layers\[1\]"),
        ({"layers": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).half()]}, r"layers\[1\]"),
        ({"layers": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, device="meta")]}, r"layers\[1\]"),
        ({"layer_norm": "group"}, "none, layer, instance, batch, but is 'group'"),
        ({"final_norm": "batch"}, "none, layer, instance, but is 'batch'"),
        ({"eps": 0.0}, "`eps` must be finite and > 0"),
        ({"eps": float("nan")}, "`eps`"),
        ({"eps": float("inf")}, "`eps`"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "`rows` must be a 1-d int64"),
        ({"rows": torch.zeros(2, 2, dtype=torch.int64)}, "`rows` must be a 1-d int64"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "`rows` must be on cpu"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, "one entry per sample"),
        ({"lengths": torch.zeros(2)}, "`lengths` must be a 1-d int64"),
    ],
)
def test_bad_input(change, message):
    arguments = {"layers": [torch.zeros(2, 3, 4)]} | change
    with pytest.raises(ValueError, match=message):
        topk_target(**arguments)


@pytest.mark.parametrize("operation", [torch.ops.d2v.topk_target, topk_target_reference])
@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        ([0, 6], None, r"`rows` must be in \[0, 5\], but holds 6"),
        ([-1], None, "holds -1"),
        ([0, 2], [2, 3], "`rows` must lie within `lengths`, but 2 "),
        ([0], [4, 3], r"`lengths` must be in \[0, 3\], but holds 4"),
        ([0], [3, -1], "holds -1"),
    ],
)
def test_indices_out_of_range(operation, rows, lengths, message):
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(IndexError, match=message):
        operation([torch.zeros(2, 3, 4)], 1, 0, torch.tensor(rows), lengths, 1e-5)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_outlier_in_the_first_position(device, norm):
    """Statistics over positions must not depend on which position the outlier is in."""
    layers = [torch.randn(2, 4000, 9, device=device) for _ in range(2)]
    for x in layers:
        x[:, 0] = 1e4
    got = topk_target(layers, layer_norm=norm)
    dims = (1,) if norm == "instance" else (0, 1)
    wide = [x.double() for x in layers]
    truth = [(x - x.mean(dims, True)) / (x.var(dims, correction=0, keepdim=True) + 1e-5).sqrt() for x in wide]
    torch.testing.assert_close(got.double(), sum(truth) / 2, rtol=5e-6, atol=5e-6)
