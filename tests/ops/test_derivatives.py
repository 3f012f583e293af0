"""Derivatives of the operations in every mode of PyTorch, against the same functions of PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from d2v_fast.models import layers as model_layers
from d2v_fast.ops import data2vec_loss, layer_norm_gelu, masked_smooth_l1, topk_target
from d2v_fast.ops.norm_gelu import (
    layer_norm_gelu_,
    layer_norm_gelu_backward,
    layer_norm_gelu_backward_,
    layer_norm_gelu_forward,
)
from tests.ops.target_reference import plain_loss, plain_target

Function = Callable[[Tensor], Tensor]


def pair(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Function, Function, Tensor]:
    """Return a scalar function of an operation, its fp64 form from PyTorch's operations, and the point."""
    x = torch.randn(4, 6, device=device).to(dtype)
    other = torch.randn(4, 6, device=device).to(dtype)
    weight, bias = torch.rand(6, device=device) + 0.5, torch.randn(6, device=device)
    if name.startswith("norm"):
        where = ["x", "weight", "bias"].index(name.split()[1])

        def norm(value: Tensor, wide: bool) -> Tensor:
            arguments = [x, weight, bias]
            arguments[where] = value
            if not wide:
                y = layer_norm_gelu(*arguments)
            else:
                first, *affine = (argument.double() for argument in arguments)
                y = F.gelu(F.layer_norm(first, (6,), *affine))
            return (y * other).square().sum(dtype=y.dtype if wide else torch.float32)

        return lambda v: norm(v, False), lambda v: norm(v, True), [x, weight, bias][where]
    beta = 1.0 if "beta" in name else 0.0
    rows = torch.tensor([0, 2, 2, 1], device=device)
    if name.startswith("masked"):
        target_rows = rows if "rows" in name else None

        def ours(pred: Tensor) -> Tensor:
            loss = masked_smooth_l1(pred, other, beta=beta, scale=0.7, target_rows=target_rows).loss
            return loss * (1 + loss)

        def plain(pred: Tensor) -> Tensor:
            loss = plain_loss(pred, other, beta, 0.7, "mean", target_rows)
            return loss * (1 + loss)

        return ours, plain, x
    layers = [torch.randn(2, 3, 6, device=device).to(dtype) for _ in range(2)]

    def fused(pred: Tensor) -> Tensor:
        return data2vec_loss(pred, layers, rows=rows, final_norm="layer", beta=beta, reduction="sum").loss

    def composed(pred: Tensor) -> Tensor:
        return plain_loss(pred, plain_target(layers, "layer", "layer", rows), beta, 1.0, "sum")

    return fused, composed, x


NAMES = ["masked", "masked beta", "masked rows beta", "data2vec", "data2vec beta", "norm x", "norm weight", "norm bias"]


def dual(function: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def penalty(function: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def third(function: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * x.cos()).sum(), x, create_graph=True)
    return torch.autograd.grad((second * x.sin()).sum(), x)[0]


def batch(x: Tensor) -> Tensor:
    return torch.stack([x, x.roll(1, -1), 1.5 * x])


func = torch.func
MODES: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "dual numbers": dual,
    "jvp": lambda f, x: func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "grad": lambda f, x: func.grad(f)(x),
    "vjp": lambda f, x: func.vjp(f, x)[1](torch.ones((), dtype=f(x).dtype, device=x.device))[0],
    "jacrev": lambda f, x: func.jacrev(f)(x),
    "hessian": lambda f, x: func.hessian(f)(x),
    "jacrev of jacrev": lambda f, x: func.jacrev(func.jacrev(f))(x),
    "vmap": lambda f, x: func.vmap(f)(batch(x)),
    "grad for each sample": lambda f, x: func.vmap(func.grad(f))(batch(x)),
    "linearize": lambda f, x: func.linearize(f, x)[1](x.cos()),
    "gradient penalty": penalty,
    "third derivative": third,
}


# `torch.func.linearize` warns of how it writes its own graph
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in NAMES for m in MODES if m != "linearize" or n in ("masked rows beta", "norm x")],
)
def test_every_mode_matches_fp64(device, name, mode):
    ours, plain, x = pair(name, device)
    got = MODES[mode](ours, x)
    want = MODES[mode](plain, x.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["masked", "masked beta", "data2vec beta", "norm x"])
@pytest.mark.parametrize("mode", ["dual numbers", "grad", "gradient penalty", "vmap"])
def test_half_precision(device, name, mode, dtype):
    ours, plain, x = pair(name, device, dtype)
    got, want = MODES[mode](ours, x).double(), MODES[mode](plain, x.double())
    # elements whose error lies within the rounding of beta are on either side of it
    differs = (got - want).abs() > 2**-5 * want.abs() + 2e-2 * want.abs().max()
    assert differs.double().mean() <= (0.1 if "beta" in name else 0)


def test_scaled_loss_penalty_in_fp16(device):
    """The factor that a backward pass multiplies with is outside of what the slope holds; a loss scale is as well."""
    pred = torch.randn(200, 100, device=device, dtype=torch.float16, requires_grad=True)
    target = torch.randn(200, 100, device=device)
    loss = masked_smooth_l1(pred, target, beta=1.0).loss * 4096.0
    (first,) = torch.autograd.grad(loss, pred, create_graph=True)
    (got,) = torch.autograd.grad(first.float().sum(), pred)
    inside = (pred - target).abs() < 0.99
    torch.testing.assert_close(
        got[inside].float(), torch.full_like(got[inside].float(), 4096.0 / 20000), rtol=2e-3, atol=0
    )
    assert not got[(pred - target).abs() > 1.01].any()


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [-2.0, 0.0, 3.0])
def test_penalty_trains_the_parameters_before_it(device, beta, scale):
    """The loss keeps no predictions, yet the second-order term reaches what computed them."""
    torch.manual_seed(1)
    x, target = torch.randn(5, 4, device=device), torch.randn(5, 3, device=device)
    grads = []
    for wide in (False, True):
        torch.manual_seed(2)
        head = torch.nn.Linear(4, 3, device=device)
        head, value = (head.double(), x.double()) if wide else (head, x)
        pred = head(value).tanh()
        if wide:
            loss = plain_loss(pred, target, beta, scale, "mean")
        else:
            loss = masked_smooth_l1(pred, target, beta=beta, scale=scale).loss
        (first,) = torch.autograd.grad(loss, head.weight, create_graph=True)
        (loss + first.square().sum()).backward()
        grads.append(head.weight.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["masked beta", "data2vec", "norm x"])
def test_checkpoint_retained_graph_and_autocast(device, name):
    ours, plain, x = pair(name, device)
    want = func.grad(plain)(x.double())
    for reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        checkpoint(ours, leaf, use_reentrant=reentrant).backward()
        torch.testing.assert_close(leaf.grad.double(), want, rtol=2e-4, atol=2e-5)
    leaf = x.clone().requires_grad_()
    loss = ours(leaf)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad.double(), 2 * want, rtol=2e-4, atol=2e-5)
    with torch.autocast(device.type, torch.bfloat16):
        for mode in ("grad", "dual numbers"):
            MODES[mode](ours, x)
        (got,) = torch.autograd.grad(ours(leaf), leaf)
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)
    with torch.no_grad():
        assert not ours(leaf).requires_grad
        torch.testing.assert_close(dual(ours, x).double(), dual(plain, x.double()), rtol=2e-4, atol=2e-5)
    with torch.inference_mode():
        assert ours(x).is_inference()


def test_compiled_modes(device):
    """A graph holds the operation itself; only transformed functions are made of PyTorch's operations."""
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    # torch compiles no forward mode of its own layer norm
    cases = (("masked beta", "masked_smooth_l1", ("jvp", "grad")), ("norm x", "layer_norm_gelu", ("vmap",)))
    for name, operation, modes in cases:
        ours, plain, x = pair(name, device)
        compiled = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward()
        torch.testing.assert_close(leaf.grad.double(), func.grad(plain)(x.double()), rtol=2e-4, atol=2e-5)
        assert f"d2v.{operation}.default" in "".join(graph.code for graph in graphs)
        for mode in modes:
            transformed = torch.compile(lambda v, m=mode, f=ours: MODES[m](f, v), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(
                transformed(x).double(), MODES[mode](plain, x.double()).double(), rtol=2e-4, atol=2e-5
            )


def test_constants_are_constants_in_every_mode(device):
    """Target, layers and moments have no derivative: none of them pretends to have one that is 0 for a reason."""
    x = torch.randn(4, 6, device=device)
    rows = torch.arange(4, device=device)
    constants: list[Function] = [
        lambda v: masked_smooth_l1(x, v).loss,
        lambda v: data2vec_loss(x, [v[None]], rows=rows).loss,
        lambda v: topk_target([v[None]], layer_norm="instance").square().sum(),
        lambda v: masked_smooth_l1(v, x).moments.sum(),
        lambda v: data2vec_loss(v, [x[None]], rows=rows).moments.sum(),
    ]
    for constant in constants:
        assert not constant(x.clone().requires_grad_()).requires_grad
        assert dual(constant, x) is None
        assert not func.grad(constant)(x).any()
        assert func.vmap(constant)(batch(x)).shape == (3,)


def test_batched_rows_are_checked_or_nan(device):
    """Under vmap a row out of range cannot raise, so it gives NaN, as on a GPU."""
    pred, target = torch.zeros(2, 3, device=device), torch.ones(4, 3, device=device)
    rows = torch.tensor([[0, 3], [1, 4], [-1, 0]], device=device)
    losses = func.vmap(lambda r: masked_smooth_l1(pred, target, target_rows=r).loss)(rows)
    assert losses.isnan().tolist() == [False, True, True]
    layers, lengths = [torch.randn(2, 4, 3, device=device)], torch.tensor([[4, 1], [2, 3], [0, 4]], device=device)
    got = func.vmap(lambda n: topk_target(layers, layer_norm="instance", lengths=n))(lengths)
    want = torch.stack([topk_target(layers, layer_norm="instance", lengths=n) for n in lengths])
    torch.testing.assert_close(got, want)


def test_backward_of_the_norm_is_refused_in_words(device):
    """The backward pass by itself is for hand-written ones: its own derivative is not what anybody would get right."""
    x, grad = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    weight, bias = torch.ones(6, device=device), torch.zeros(6, device=device)
    _, mean, rstd = layer_norm_gelu_forward(x, weight, bias)
    for where in range(4):

        def penalized(value: Tensor, where: int = where) -> Tensor:
            arguments = [grad, x, weight, bias]
            arguments[where] = value
            return layer_norm_gelu_backward(*arguments, mean, rstd)[0].sum()

        leaf = [grad, x, weight, bias][where].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="`layer_norm_gelu_backward` has no derivative"):
            penalized(leaf).backward()
        for mode in ("dual numbers", "jvp", "grad"):
            with pytest.raises(RuntimeError, match="`layer_norm_gelu_backward` has no derivative"):
                MODES[mode](penalized, leaf.detach())


def test_operations_in_place_are_refused_in_words(device):
    x, grad = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    weight, bias = torch.ones(6, device=device), torch.zeros(6, device=device)
    _, mean, rstd = layer_norm_gelu_forward(x, weight, bias)
    of_weight: list[Function] = [
        lambda w: layer_norm_gelu_(x.clone(), w, bias)[0].sum(),
        lambda w: layer_norm_gelu_backward_(grad.clone(), x, w, bias, mean, rstd)[0].sum(),
    ]
    of_values: list[Function] = [
        lambda v: layer_norm_gelu_(v.clone(), weight, bias)[0].sum(),
        lambda v: layer_norm_gelu_backward_(v.clone(), x, weight, bias, mean, rstd)[0].sum(),
    ]
    for functions, value in ((of_weight, weight), (of_values, x)):
        for function in functions:
            for mode in ("dual numbers", "jvp", "grad", "vmap", "gradient penalty"):
                with pytest.raises(ValueError, match=r"has no derivative in any mode|must not require a gradient"):
                    MODES[mode](function, value)
            with torch.no_grad():
                function(value.clone().requires_grad_())
    operation = torch.ops.d2v.layer_norm_gelu_
    with pytest.raises(RuntimeError, match=r"`layer_norm_gelu_` writes in place and cannot run under torch.vmap"):
        func.vmap(lambda v: operation(v, weight, bias, 1e-5)[0].sum())(batch(x))


def test_several_gradients_at_once(device):
    ours, plain, x = pair("norm x", device)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    several = torch.tensor([1.0, -2.0, 0.5], device=device)
    (got,) = torch.autograd.grad(ours(leaf), leaf, several, is_grads_batched=True)
    (want,) = torch.autograd.grad(plain(wide), wide, several.double(), is_grads_batched=True)
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


def test_hooks_run_once_in_a_differentiable_backward(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    calls: list[None] = []
    x.register_hook(lambda _: calls.append(None))
    y = layer_norm_gelu(x, torch.ones(6, device=device), torch.zeros(6, device=device)).sum()
    torch.autograd.grad(y, x, create_graph=True)
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["dual numbers", "jvp", "grad", "hessian", "gradient penalty", "third derivative"])
@pytest.mark.parametrize("of", ["x", "weight"])
def test_large_linear_map(monkeypatch, mode, of):
    """Where oneDNN's product is used, its derivatives equal those of torch's own."""
    monkeypatch.setattr(model_layers, "_LARGE", 1)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)

    def function(value: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        x_, weight_ = (value, weight.to(value.dtype)) if of == "x" else (x.to(value.dtype), value)
        return linear(x_, weight_, None).sin().sum()

    value = x if of == "x" else weight
    got = MODES[mode](lambda v: function(v, model_layers.linear), value)
    want = MODES[mode](lambda v: function(v, F.linear), value.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_penalty_on_inputs_reaches_the_weight_of_a_linear_map(monkeypatch):
    """The gradient that arrives has no graph, but the one that leaves depends on the weight."""
    monkeypatch.setattr(model_layers, "_LARGE", 1)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    grads = []
    for linear in (model_layers.linear, F.linear):
        (first,) = torch.autograd.grad(linear(x, weight, None).sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), weight)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_convolutions(num_layers):
    """Transforms give what PyTorch's convolutions give; a second derivative by backward is refused, not left out."""
    kernels, strides = (10, 3, 3)[:num_layers], (5, 2, 2)[:num_layers]
    stack = pytest.importorskip("d2v_fast.modalities.speech.conv_stack").ConvStack(8, kernels, strides)
    for i, value in enumerate(stack.parameters()):
        torch.nn.init.normal_(value, mean=0.1 * i, std=0.5)
    waveforms = torch.randn(2, 90)

    def function(value: Tensor) -> Tensor:
        return stack(value).square().sum()

    leaf = waveforms.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    for mode in ("grad", "vjp", "jacfwd"):
        torch.testing.assert_close(MODES[mode](function, waveforms), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dual(function, waveforms), (want * waveforms.cos()).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(func.vmap(stack)(batch(waveforms)), torch.stack([stack(v) for v in batch(waveforms)]))

    # the gradient that arrives has a graph, or none
    for y in (stack(leaf).square().sum(), stack(leaf).sum()):
        grads = torch.autograd.grad(y, (leaf, *stack.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="the gradient of `ConvStack` has no derivative"):
            sum(g.square().sum() for g in grads[:2]).backward()


def test_tensor_that_outlived_a_transform() -> None:
    outlived = []

    def see(x: torch.Tensor) -> torch.Tensor:
        outlived.append(x * 2)
        return outlived[0].sum()

    func.grad(see)(torch.randn(3, 4))
    target, weight = torch.zeros(3, 4), torch.ones(4, requires_grad=True)
    (found,) = torch.autograd.grad(masked_smooth_l1(outlived[0], target, reduction="sum").loss, outlived[0])
    torch.testing.assert_close(found, 2 * outlived[0].detach())
    (found,) = torch.autograd.grad(layer_norm_gelu(outlived[0], weight, torch.zeros(4)).sum(), weight)
    assert found.isfinite().all()
