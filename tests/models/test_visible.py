"""The parts of the encoder of visible places and of the decoder, each against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from d2v_fast.config.data2vec2 import DecoderConfig
from d2v_fast.models.decoder import ConvDecoder
from d2v_fast.models.noise import normal_noise
from d2v_fast.models.visible import Alibi, Places, alibi_slopes, sine_positions


def places_of(masked: torch.Tensor) -> Places:
    """Places of a mask, bool `[R, T]`, without padding."""
    R, T = masked.shape
    visible = (~masked).flatten().nonzero()[:, 0].view(R, -1)
    return Places(visible, masked.flatten().nonzero()[:, 0], T)


def random_places(num_rows: int, num_places: int, num_masked: int) -> Places:
    order = torch.rand(num_rows, num_places).argsort(1)
    return places_of(torch.zeros(num_rows, num_places, dtype=torch.bool).scatter(1, order[:, :num_masked], True))


def test_gather_and_scatter_are_inverse_and_differentiable() -> None:
    torch.manual_seed(0)
    places = random_places(2 * 3, 7, 4)
    tokens = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    repeated = tokens.repeat_interleave(3, dim=0)
    mask = torch.zeros(6 * 7, dtype=torch.bool)
    mask[places.rows] = True
    mask = mask.view(6, 7)
    expected = repeated[~mask].view(6, 3, 5)
    gathered = places.gather(tokens)
    torch.testing.assert_close(gathered, expected, rtol=0, atol=0)
    weights = torch.randn(6, 3, 5, dtype=torch.float64)
    [grad] = torch.autograd.grad((gathered * weights).sum(), tokens)
    [expected_grad] = torch.autograd.grad((expected * weights).sum(), tokens)
    torch.testing.assert_close(grad, expected_grad)
    scattered = places.scatter(gathered, torch.full((24, 5), 9.0, dtype=torch.float64))
    torch.testing.assert_close(scattered, torch.where(mask[:, :, None], 9.0, repeated), rtol=0, atol=0)


def test_slopes_of_any_number_of_heads() -> None:
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(12) == pytest.approx(
        [*(2.0**-n for n in range(1, 9)), *(2.0 ** -(n - 0.5) for n in range(1, 5))]
    )
    assert alibi_slopes(1) == [2.0**-8]
    assert len(alibi_slopes(20)) == 20


def test_alibi_clamps_its_scale() -> None:
    alibi = Alibi(3)
    with torch.no_grad():
        alibi.scale.copy_(torch.tensor([0.5, -2.0, 3.0]))
    bias = alibi(torch.tensor([[0, 2, 7]]))
    distances = torch.tensor([[0.0, 2, 7], [2, 0, 5], [7, 5, 0]])
    for head, factor in enumerate((0.5, 0.0, 3.0)):
        torch.testing.assert_close(bias[0, head], -distances * factor * alibi_slopes(3)[head])
    bias.sum().backward()
    assert alibi.scale.grad is not None
    assert alibi.scale.grad[1] == 0
    assert (alibi.scale.grad[[0, 2]] < 0).all()


def test_positions_are_sine_and_cosine_of_column_and_row() -> None:
    found = sine_positions(8, 3).view(3, 3, 8).double()
    for row in range(3):
        for column in range(3):
            parts = [
                function(place * frequency)
                for place in (column, row)
                for function in (math.sin, math.cos)
                for frequency in (1.0, 10000.0**-0.5)
            ]
            torch.testing.assert_close(found[row, column], torch.tensor(parts, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("is_grid", [False, True])
@pytest.mark.parametrize(
    ("changes"),
    [
        {"width": 8},
        {"width": 4, "projection": 2},
        {"width": 8, "residual": False, "groups": 1},
        {"width": 8, "kernel": 4},
    ],
)
def test_decoder_is_its_formula(is_grid: bool, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(**{"depth": 2, "kernel": 3, "groups": 2, **changes})
    decoder = ConvDecoder(8, config, 3 if is_grid else None).double()
    places = random_places(4, 9, 5)
    encoded, noise = torch.randn(4, 4, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    x = torch.zeros(36, 8, dtype=torch.float64)
    x[places.rows], x[places.visible.flatten()] = noise, encoded.flatten(0, 1)
    x = x.view(4, 9, 8).transpose(1, 2)
    x = x.unflatten(2, (3, 3)) if is_grid else x
    convolve = F.conv2d if is_grid else F.conv1d
    for layer in decoder.convolutions:
        y = convolve(x, layer.weight, layer.bias, padding=config.kernel // 2, groups=config.groups)
        # what an even kernel adds at the end is cut off
        y = y[..., :3, :3] if is_grid else y[..., :9]
        y = F.gelu(F.layer_norm(y.movedim(1, -1), (config.width,)).movedim(-1, 1))
        x = x + y if config.residual and x.shape[1] == y.shape[1] else y
    expected = decoder.projection(x.flatten(2).transpose(1, 2).flatten(0, 1)[places.rows])
    torch.testing.assert_close(decoder(encoded, places, noise), expected)


def test_noise_is_normal_and_depends_on_key_and_place_only() -> None:
    keys = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 50))
    rows = torch.arange(50 * 40)
    noise = normal_noise(keys, rows, 40, 33)
    assert noise.dtype == torch.float32
    sample = noise.double().flatten()
    assert abs(sample.mean()) < 5 / sample.numel() ** 0.5
    assert abs(sample.var() - 1) < 5 * (2 / sample.numel()) ** 0.5
    # of a normal distribution: the fourth moment, and shares beyond one and two deviations
    assert abs(sample.pow(4).mean() - 3) < 5 * (96 / sample.numel()) ** 0.5
    assert abs((sample.abs() > 2).double().mean() - 0.0455) < 5 * (0.0455 / sample.numel()) ** 0.5
    correlation = torch.corrcoef(noise[:, [0, 1, 16, 17, 32]].double().T) - torch.eye(5, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 2000**0.5
    chosen = torch.tensor([3 * 40 + 7, 3 * 40 + 39, 41 * 40])
    some = normal_noise(keys[[3, 41]], torch.tensor([7, 39, 40]), 40, 33)
    torch.testing.assert_close(some, noise[chosen])
