"""Dense convolutions against `F.conv1d` in fp64, and the cases that are left to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.models import decoder
from d2v_fast.models.dense_convolution import convolve_dense, is_dense
from tests.helpers.masked_models import masked_config, random_masked_batch, random_masked_pair


def tensors(rows: int, places: int, inputs: int, outputs: int, taps: int) -> list[Tensor]:
    shapes = (rows, places, inputs), (outputs, inputs, taps), (outputs,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2).transpose(1, 2)


@pytest.mark.parametrize("sizes", [(2, 7, 5, 4, 9), (1, 1, 3, 2, 9), (3, 10, 4, 6, 9), (2, 6, 1, 1, 9)], ids=str)
def test_values_and_gradients(sizes: tuple[int, ...]) -> None:
    leaves = tensors(*sizes)
    got, want = convolve_dense(*leaves), plain(*leaves)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_and_missing_gradients() -> None:
    x, weight, bias = tensors(2, 5, 3, 2, 9)
    assert torch.autograd.gradgradcheck(convolve_dense, (x, weight, bias))
    convolve_dense(x.detach(), weight, None).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_as_exact_in_fp32_as_torch() -> None:
    leaves = tensors(2, 33, 256, 256, 9)
    truth = plain(*leaves)
    small = [x.detach().float() for x in leaves]
    # sums of random numbers: torch's own error differs by a factor with the order in which it adds
    error, other = ((y - truth).norm().item() for y in (convolve_dense(*small), plain(*small)))
    assert error < 4 * other


def test_which_convolutions() -> None:
    x, weight = torch.zeros(1, 4, 256), torch.zeros(256, 256, 9)
    assert is_dense(x, weight)
    for other_x, other in [
        (x, torch.zeros(256, 128, 9)),
        (x, torch.zeros(256, 256, 7)),
        (x, torch.zeros(256, 256, 3)),
        (x, torch.zeros(128, 256, 9)),
        (x.double(), weight.double()),
        (x.bfloat16(), weight.bfloat16()),
    ]:
        assert not is_dense(other_x, other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_dense(x, weight)


def test_the_decoder_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"width": 256, "kernel": 9, "groups": 1, "depth": 2, "residual": False, "projection": 2}
    config = masked_config("text", model={"width": 256, "decoder": sections})
    model, teacher = random_masked_pair(config)
    batch = random_masked_batch(config, [16, 16])

    def step() -> list[Tensor]:
        model.zero_grad()
        model(batch, teacher).loss_sum.backward()
        return [p.grad for p in model.head.parameters() if p.grad is not None]

    fast = step()
    monkeypatch.setattr(decoder, "is_dense", lambda x, weight: False)
    for one, other in zip(fast, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
        assert one.data_ptr() != other.data_ptr()
