"""Tests of the inputs of a decoder's convolutions that the backward pass computes again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2v_fast.config.data2vec2 import DecoderConfig
from d2v_fast.models import recomputed_sums
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.visible import Places
from tests.helpers.saved_tensors import Saved

R, T, V = 4, 9, 4


def gradients(decoder: ConvDecoder, places: Places, encoded: Tensor, noise: Tensor) -> tuple[list[Tensor], int]:
    """Return gradients of first and second order, and the bytes that the forward pass saves."""
    saved = Saved(decoder)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        loss = decoder(encoded, places, noise).square().sum()
    wanted = [encoded, *decoder.parameters()]
    first = torch.autograd.grad(loss, wanted)
    loss = decoder(encoded, places, noise).square().sum()
    [grad] = torch.autograd.grad(loss, encoded, create_graph=True)
    return [*first, *torch.autograd.grad(grad.square().sum(), wanted[:-1])], saved.bytes


@pytest.mark.parametrize(
    ("changes", "recomputed"),
    [
        # of six inputs, the first and the fourth are kept
        ({}, 4),
        # no sums: the first is kept
        ({"residual": False}, 5),
        # the second is no sum, since the first has another width
        ({"width": 16}, 4),
    ],
)
@pytest.mark.parametrize("is_grid", [False, True])
def test_gradients_are_those_of_kept_inputs(
    is_grid: bool, changes: dict[str, object], recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**{"width": 8, "depth": 6, "kernel": 3, "groups": 2, **changes})
    decoder = ConvDecoder(8, config, 3 if is_grid else None)
    order = torch.rand(R, T).argsort(1) + torch.arange(R)[:, None] * T
    lengths = None if is_grid else torch.tensor([9, 7, 9, 8])
    places = Places(order[:, :V].sort(1).values, order[:, V:].flatten().sort().values, T, lengths)
    encoded, noise = torch.randn(R, V, 8, requires_grad=True), torch.randn(R * (T - V), 8)
    found, num_bytes = gradients(decoder, places, encoded, noise)
    monkeypatch.setattr(recomputed_sums, "can_recompute", lambda x, weight: False)
    expected, num_bytes_kept = gradients(decoder, places, encoded, noise)
    assert num_bytes_kept - num_bytes == recomputed * R * T * config.width * 4
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
