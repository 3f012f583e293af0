"""Linear maps by oneDNN against formulas in fp64, and the cases that are left to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from d2v_fast.models import layers
from d2v_fast.models.layers import GeluLinear, Linear, Norm, drop, linear
from tests.helpers.saved_tensors import Saved

IN, OUT = 512, 640


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that went to oneDNN."""
    if layers._ONEDNN_LINEAR is None:
        pytest.skip("torch has no oneDNN")
    seen: list[tuple[int, ...]] = []
    original = layers._ONEDNN_LINEAR

    def count(x: Tensor, *rest: Any) -> Tensor:
        assert x.is_contiguous()
        seen.append(tuple(x.shape))
        return original(x, *rest)

    monkeypatch.setattr(layers, "_ONEDNN_LINEAR", count)
    return seen


def tensors(*shape: int, with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = torch.randn(*shape, IN), torch.randn(OUT, IN)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(OUT).requires_grad_() if with_bias else None


def assert_like_fp64(inputs: list[Any], grad: Tensor) -> None:
    """Values and gradients of `linear`, against `F.linear` in fp64."""
    y = linear(*inputs, *([] if len(inputs) == 3 else [None]))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(y, inputs, grad)
    for actual, wanted in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 33), (2, 3, 5), (1,), ()], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], with_bias: bool, calls: list[tuple[int, ...]]) -> None:
    inputs = [tensor for tensor in tensors(*shape, with_bias=with_bias) if tensor is not None]
    assert_like_fp64(inputs, torch.randn(*shape, OUT))
    assert len(calls) == 2, "forward, and the gradient of the input"


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("num_rows", [1, 33, 700])
def test_narrow_output(num_rows: int, strided: bool, calls: list[tuple[int, ...]]) -> None:
    """There the gradient of the weight is a product of oneDNN, too."""
    x, grad = torch.randn(num_rows, 2 * 1024), torch.randn(num_rows, 2 * 256)
    x, grad = (x[:, ::2], grad[:, 1::2]) if strided else (x[:, :1024].contiguous(), grad[:, :256].contiguous())
    assert_like_fp64([x.requires_grad_(), torch.randn(256, 1024).requires_grad_()], grad)
    assert calls == [(num_rows, 1024), (num_rows, 256), (256, num_rows)]


def test_only_wanted_gradients_are_computed(calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors(9)
    assert bias is not None
    linear(x.detach(), weight, bias).sum().backward()
    assert len(calls) == 1
    assert x.grad is None
    torch.testing.assert_close(bias.grad, torch.full((OUT,), 9.0))
    weight.grad = bias.grad = None
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("what", ["columns", "transposed", "expanded"])
def test_strided_input_and_gradient(what: str, calls: list[tuple[int, ...]]) -> None:
    _, weight, bias = tensors(1)
    assert bias is not None
    x, grad = {
        "columns": (torch.randn(6, 2 * IN)[:, ::2], torch.randn(6, 2 * OUT)[:, 1::2]),
        "transposed": (torch.randn(IN, 6).t(), torch.randn(OUT, 6).t()),
        "expanded": (torch.randn(1, IN).expand(6, IN), torch.randn(()).expand(6, OUT)),
    }[what]
    weight = weight.detach().t().contiguous().t().requires_grad_()
    assert_like_fp64([x.requires_grad_(), weight, bias], grad)
    assert len(calls) == 2


@pytest.mark.parametrize("what", ["strided", "expanded", "scalar", "one", "a row each"])
def test_bias_of_other_layout_is_left_to_torch(what: str, calls: list[tuple[int, ...]]) -> None:
    x, weight, _ = tensors(4)
    bias = {
        "strided": torch.randn(2 * OUT)[::2],
        "expanded": torch.randn(1).expand(OUT),
        "scalar": torch.randn(()),
        "one": torch.randn(1),
        "a row each": torch.randn(4, OUT),
    }[what]
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=0)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (5,)], ids=str)
def test_linear_map_of_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Same bits as torch's operations, and the GELU is not saved."""
    module = GeluLinear(IN, OUT)
    x, grad = torch.randn(*shape, IN, dtype=dtype, requires_grad=True), torch.randn(*shape, OUT, dtype=dtype)
    weight, bias = (p.to(dtype) for p in (module.weight, module.bias))
    saved = Saved(module)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        y = module(x)
    copies = 0 if dtype == torch.float32 else weight.nbytes
    assert saved.bytes == x.nbytes + copies
    want = linear(F.gelu(x), weight, bias)
    leaves = [x, module.weight, module.bias]
    for one, other in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(y, want, rtol=0, atol=0)


def test_second_derivatives_of_a_linear_map_of_gelu() -> None:
    module = GeluLinear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, module.weight, module.bias))
    tangent = torch.func.jvp(module, (x.detach(),), (torch.ones(4, 3, dtype=torch.float64),))[1]
    torch.testing.assert_close(
        tangent,
        torch.func.jvp(
            lambda x: F.linear(F.gelu(x), module.weight, module.bias),
            (x.detach(),),
            (torch.ones(4, 3, dtype=torch.float64),),
        )[1],
    )


@pytest.mark.parametrize("recomputes", [False, True], ids=["saved", "checkpoint"])
def test_norm_before_a_linear_map(recomputes: bool) -> None:
    """Same bits as torch's norm, and the linear map saves no output of it."""
    norm, plain, inner = Norm(IN), nn.LayerNorm(IN), Linear(IN, OUT)
    for value in norm.parameters():
        nn.init.normal_(value)
    plain.load_state_dict(norm.state_dict())
    x, grad = torch.randn(3, 5, IN, requires_grad=True), torch.randn(3, 5, OUT)

    def run(first: nn.Module) -> tuple[list[Tensor], int]:
        saved, leaves = Saved(nn.ModuleList((first, inner))), [x, *first.parameters(), *inner.parameters()]
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            # twice: the residual stream reads the norm as well
            def both(x: Tensor) -> Tensor:
                y = first(x)
                return inner(y) + y.sum()

            y = checkpoint(both, x, use_reentrant=False) if recomputes else both(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)], saved.bytes

    (got, few), (want, many) = run(norm), run(plain)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert many - few == (0 if recomputes else x.nbytes)


def test_second_derivatives_of_a_norm_before_a_linear_map() -> None:
    norm, plain, inner = Norm(IN), nn.LayerNorm(IN), Linear(IN, OUT)
    x = torch.randn(3, IN, requires_grad=True)
    results = []
    for first in (norm, plain):
        leaves = [x, first.weight, inner.weight]
        grads = torch.autograd.grad(inner(first(x)).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_sizes_that_do_not_fit_are_told_by_torch() -> None:
    x, weight, bias = tensors(4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, 1:], weight, bias)


def test_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors(4)
    small = weight.detach()[: layers._LARGE // IN - 1]
    torch.testing.assert_close(linear(x, small, None), F.linear(x, small), rtol=0, atol=0)
    assert linear(x[:0], weight, bias).shape == (0, OUT)
    assert linear(x.double(), weight.double(), None).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta"), None).shape == (4, OUT)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(weight), None).shape == (4, OUT)
    assert calls == []


def test_compiles_to_one_graph() -> None:
    module, graphs = Linear(IN, OUT), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, chosen: module(x[chosen]), fullgraph=True, backend=keep)
    x, chosen = torch.randn(5, IN), torch.tensor([True, False, True, True, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(x, chosen), module(x[chosen]))
    assert len(graphs) == 1
    called = str(graphs[0].graph)
    assert "linear" in called
    assert "mkldnn" not in called


def test_transformed_functions_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors(2, 4)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight, bias))(x), expected)
    grad = torch.func.grad(lambda w: linear(x, w, bias).sum())(weight)
    torch.testing.assert_close(grad, x.detach().sum((0, 1)).expand(OUT, IN), rtol=1e-4, atol=1e-4)
    assert calls == []


def test_can_be_switched_off(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    linear(*tensors(2))
    assert calls == []


@pytest.mark.parametrize("threads", [1, 2])
def test_twice_gives_the_same_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = tensors(100)
        grads = [torch.autograd.grad(linear(x, weight, bias).square().sum(), (x, weight, bias)) for _ in range(2)]
        for first, second in zip(*grads, strict=True):
            assert torch.equal(first, second)
        assert_like_fp64([x, weight, bias], torch.randn(100, OUT))
    finally:
        torch.set_num_threads(before)


def test_dropout() -> None:
    """Elements are dropped at the rate; a compiler gets one graph."""
    x = torch.ones(100, 101, requires_grad=True)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for function in (drop, torch.compile(drop, backend=record, fullgraph=True)):
        y = function(x, 0.25)
        kept = y != 0
        assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4 / 3))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] != 0, kept)
    assert len(graphs) == 1
