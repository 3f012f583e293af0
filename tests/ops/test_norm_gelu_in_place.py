"""The forms of layer_norm_gelu that overwrite what they are given: the bits of the forms that do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from d2v_fast.ops.norm_gelu import (
    layer_norm_gelu_,
    layer_norm_gelu_backward,
    layer_norm_gelu_backward_,
    layer_norm_gelu_backward_inplace_reference,
    layer_norm_gelu_forward,
    layer_norm_gelu_inplace_reference,
)
from tests.helpers.common import DTYPES
from tests.ops.norm_inputs import make


# the last one is large enough to be stored around the caches
@pytest.mark.parametrize("shape", [(0, 3), (2, 9, 33), (70, 5), (3001, 130), (17000, 129), (17000, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(device, dtype, shape):
    """The bits of the form that makes a new gradient, where the old one was."""
    x, weight, bias, grad = (value.detach() for value in make(device, shape, dtype, dtype))
    if len(shape) > 2:
        x = F.pad(x, (0, 0, 0, 2))[:, : shape[1]]
    _, mean, rstd = layer_norm_gelu_forward(x, weight, bias)
    want = layer_norm_gelu_backward(grad, x, weight, bias, mean, rstd)
    by_reference = grad.clone()
    reference = layer_norm_gelu_backward_inplace_reference(by_reference, x, weight, bias, mean, rstd)
    got = grad, *layer_norm_gelu_backward_(grad, x, weight, bias, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for a, b in zip((by_reference, *reference), want, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


@pytest.mark.parametrize("shape", [(0, 3), (2, 9, 33), (70, 5), (17000, 129), (17000, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_in_place(device, dtype, shape):
    """The bits of the form that makes a new tensor, where `x` was."""
    x, weight, bias, _ = (value.detach() for value in make(device, shape, dtype, dtype))
    want = layer_norm_gelu_forward(x, weight, bias, eps=1e-4)
    by_reference = x.clone()
    reference = by_reference, *layer_norm_gelu_inplace_reference(by_reference, weight, bias, 1e-4)
    got = x, *layer_norm_gelu_(x, weight, bias, eps=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for a, b in zip(reference, want, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


def test_in_place_by_triton(device):
    pytest.importorskip("triton")
    from d2v_fast.kernels import norm_gelu

    x, weight, bias, grad = (value.detach() for value in make(device, (3, 50, 96), torch.float32))
    forward = norm_gelu.layer_norm_gelu(x, weight, bias, 1e-5)
    backward = norm_gelu.layer_norm_gelu_backward(grad, x, weight, bias, *forward[1:])
    got = grad, *norm_gelu.layer_norm_gelu_backward_(grad, x, weight, bias, *forward[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, backward, strict=True))
    got = x, *norm_gelu.layer_norm_gelu_(x, weight, bias, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(got, forward, strict=True))


def test_what_cannot_be_overwritten():
    strided, rest = torch.zeros(3, 4).t(), [torch.ones(3), torch.zeros(3)]
    of_rows = [torch.zeros(4), torch.ones(4)]
    with pytest.raises(ValueError, match=r"`grad` must be contiguous to be overwritten, but has strides \(1, 4\)"):
        layer_norm_gelu_backward_(strided, torch.zeros(4, 3), *rest, *of_rows)
    with pytest.raises(ValueError, match=r"`x` must be contiguous to be overwritten, but has strides \(1, 4\)"):
        layer_norm_gelu_(strided, *rest)
    wanted = torch.zeros(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"`x` must not require a gradient to be overwritten: `x.detach\(\)` does not"):
        layer_norm_gelu_(wanted, *rest)
    with pytest.raises(ValueError, match="`grad` must not require a gradient"):
        layer_norm_gelu_backward_(wanted, torch.zeros(4, 3), *rest, *of_rows)


def test_autograd_knows_what_is_overwritten():
    for overwrite in (
        lambda x: layer_norm_gelu_(x, torch.ones(3), torch.zeros(3)),
        lambda x: layer_norm_gelu_backward_(x, torch.zeros(4, 3), torch.ones(3), torch.zeros(3), *torch.ones(2, 4)),
    ):
        saved = torch.zeros(4, 3, requires_grad=True).exp()
        overwrite(saved.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()
    with torch.inference_mode():
        layer_norm_gelu_(torch.zeros(4, 3), torch.ones(3), torch.zeros(3))
