"""Convolutions over sequences against `F.conv1d` in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.models import sequence_convolution
from d2v_fast.models.sequence_convolution import convolve_sequence


def plain(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    y = F.conv1d(
        x.transpose(1, 2), convolution.weight, convolution.bias, padding=convolution.padding, groups=convolution.groups
    )
    return y[:, :, : x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("sizes", [(2, 7, 4, 6, 9, 2), (1, 1, 6, 3, 3, 3), (3, 10, 4, 4, 4, 2)], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_values_and_gradients(sizes: tuple[int, ...], wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, places, inputs, outputs, taps, groups = sizes
    monkeypatch.setattr(sequence_convolution, "_is_wide", lambda x, weight: wide and weight.shape[2] % 2 == 1)
    convolution = nn.Conv1d(inputs, outputs, taps, padding=taps // 2, groups=groups).double()
    x = torch.randn(rows, places, inputs, dtype=torch.float64, requires_grad=True)
    got, want = convolve_sequence(convolution, x), plain(convolution, x)
    torch.testing.assert_close(got, want)
    leaves, grad = [x, *convolution.parameters()], torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(one, other)
    small = [torch.randn_like(leaf[:2, :2] if leaf is x else leaf).requires_grad_() for leaf in leaves]
    if wide and taps % 2 == 1:
        assert torch.autograd.gradgradcheck(
            lambda x, weight, bias: sequence_convolution._WideConvolution.apply(x, weight, bias, groups), small
        )


def test_published_positions_take_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, x = nn.Conv1d(64, 64, 19, padding=9, groups=2), torch.randn(2, 30, 64, requires_grad=True)
    leaves, grad = [x, *convolution.parameters()], torch.randn(2, 30, 64)
    calls: list[int] = []
    original = sequence_convolution._weight_gradient

    def count(x: Tensor, grad: Tensor, taps: int, groups: int) -> Tensor:
        calls.append(taps)
        return original(x, grad, taps, groups)

    monkeypatch.setattr(sequence_convolution, "_weight_gradient", count)
    results = (torch.autograd.grad(y, leaves, grad) for y in (convolve_sequence(convolution, x), plain(convolution, x)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert calls == [19]
