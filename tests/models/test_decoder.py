"""The decoder's convolutions on a grid, which save less than autograd would, against the same with plain modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.visible import Places
from tests.helpers.masked_models import masked_config
from tests.helpers.saved_tensors import Saved


def made(kernel: int = 3) -> tuple[ConvDecoder, Places, Tensor, Tensor]:
    sections = {"width": 32, "kernel": kernel, "groups": 4, "depth": 4}
    decoder = ConvDecoder(32, masked_config("vision", model={"width": 32, "decoder": sections}).model.decoder, 4)
    visible = torch.stack([torch.randperm(16)[:5].sort().values + 16 * row for row in range(3)])
    masked = torch.ones(48, dtype=torch.bool).index_fill_(0, visible.flatten(), False)
    places = Places(visible, masked.nonzero().flatten(), 16)
    return decoder, places, torch.randn(3, 5, 32, requires_grad=True), torch.randn(len(places.rows), 32)


@pytest.mark.parametrize("kernel", [3, 4, 5])
def test_less_is_saved_and_the_gradients_are_the_same(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, places, encoded, noise = made(kernel)
    leaves = [encoded, *decoder.parameters()]

    def run() -> tuple[list[Tensor], int]:
        saved = Saved(decoder)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
            y = decoder(encoded, places, noise)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)], saved.bytes

    got, few = run()
    monkeypatch.setattr(ConvDecoder, "_recomputes", lambda *_: False)
    want, many = run()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())
    # the inputs of all convolutions but the first
    assert many - few == (0 if kernel % 2 == 0 else 3 * 3 * 16 * 32 * 4)


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, places, encoded, noise = made()
    leaves, results = [encoded, *decoder.parameters()], []
    for recomputes in (True, False):
        if not recomputes:
            monkeypatch.setattr(ConvDecoder, "_recomputes", lambda *_: False)
        first = torch.autograd.grad(decoder(encoded, places, noise).square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
