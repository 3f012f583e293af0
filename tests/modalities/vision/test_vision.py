"""The vision embedding: patches, mask token, class token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_fast.config import VisionModelConfig
from d2v_fast.modalities.vision.encoder import VisionEmbedding
from tests.helpers import vision_reference as reference

GEOMETRIES = [(9, 3, 1), (10, 2, 3), (5, 5, 3), (7, 1, 1), (28, 4, 2)]


def build(image_size: int = 10, patch_size: int = 2, channels: int = 3) -> tuple[VisionModelConfig, VisionEmbedding]:
    config = VisionModelConfig(image_size=image_size, patch_size=patch_size, channels=channels, width=12, heads=2)
    embedding = VisionEmbedding(config)
    reference.randomize_(embedding)
    return config, embedding


def images(config: VisionModelConfig, batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, config.channels, config.image_size, config.image_size)


def ragged_rows(config: VisionModelConfig, batch_size: int = 3) -> tuple[Tensor, Tensor]:
    """Return flat rows of a random mask with a different count in every image, and the mask, bool `[B, P]`."""
    masked = torch.rand(batch_size, config.num_patches) < torch.linspace(0.2, 0.9, batch_size)[:, None]
    return masked.flatten().nonzero()[:, 0], masked


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_the_definition(geometry: tuple[int, int, int]) -> None:
    config, embedding = build(*geometry)
    pixels, (rows, masked) = images(config), ragged_rows(config)
    weights = {f"embedding.{name}": parameter for name, parameter in embedding.named_parameters()}
    torch.testing.assert_close(embedding(pixels), reference.embed(weights, config, pixels, None))

    actual, expected = embedding(pixels, rows), reference.embed(weights, config, pixels, masked)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    # if all patches are masked, or none, the reference has no gradient for a parameter
    actual_grads, expected_grads = (
        torch.autograd.grad(tokens, list(weights.values()), direction, materialize_grads=True)
        for tokens in (actual, expected)
    )
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-5, atol=1e-5)


def test_is_the_published_convolution() -> None:
    config, embedding = build()
    pixels = images(config)
    kernel = embedding.projection.weight.view(config.width, config.channels, config.patch_size, config.patch_size)
    convolved = F.conv2d(pixels, kernel, embedding.projection.bias, stride=config.patch_size)
    torch.testing.assert_close(embedding(pixels)[:, 1:], convolved.flatten(2).transpose(1, 2))


def test_masked_pixels_do_not_reach_the_tokens() -> None:
    config, embedding = build()
    pixels, (rows, masked) = images(config), ragged_rows(config)
    hidden = masked.view(3, 1, config.grid_size, config.grid_size)
    hidden = hidden.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)
    assert torch.equal(embedding(pixels, rows), embedding(pixels.masked_fill(hidden, 99.0), rows))
    assert not torch.equal(embedding(pixels, rows), embedding(pixels.masked_fill(~hidden, 99.0), rows))


def test_edge_cases() -> None:
    config, embedding = build()
    pixels = images(config)
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(embedding(pixels, nothing), embedding(pixels))
    everything = torch.arange(3 * config.num_patches)
    assert torch.equal(embedding(pixels, everything)[2, 5], embedding.mask_token[0])
    assert embedding(pixels[:0]).shape == (0, 1 + config.num_patches, config.width)
    assert torch.equal(embedding(pixels.to(memory_format=torch.channels_last)), embedding(pixels))


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 7, 40])], ids=["unmasked", "masked"])
def test_low_precision(rows: Tensor | None) -> None:
    config, embedding = build()
    pixels = images(config)
    expected = embedding(pixels, rows)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedding(pixels, rows), expected, rtol=0.02, atol=0.05)
    working_copy = embedding.to(torch.bfloat16)
    assert working_copy(pixels, rows).dtype == torch.bfloat16
    torch.testing.assert_close(working_copy(pixels, rows).float(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 1, 10, 10), (2, 3, 10, 12), (3, 10, 10)], ids=str)
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    _, embedding = build()
    with pytest.raises(ValueError, match=r"`pixels` must be \[B, 3, 10, 10\], but is \[.*\] instead"):
        embedding(torch.randn(shape))


def test_published_initialization() -> None:
    embedding = VisionEmbedding(VisionModelConfig())
    assert not embedding.projection.bias.any()
    for parameter in (embedding.projection.weight, embedding.cls_token, embedding.mask_token):
        assert parameter.abs().max() <= 0.02
        assert parameter.std().item() == pytest.approx(0.02 * 0.5396, rel=0.1)
    # 1-D parameters have no weight decay: that exempts the class token but not the mask token
    assert embedding.cls_token.dim() == 1
    assert embedding.mask_token.dim() == 2
