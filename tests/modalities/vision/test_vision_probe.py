"""The image probe finds the class information in features, and scores only held-out images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from d2v_fast.config import VisionProbeConfig
from d2v_fast.evaluation.classifiers import Task, score
from d2v_fast.modalities.vision.probe import PIXELS, image_features, run_probe


def make_data(informative: bool, strength: float = 2.0, seed: int = 0) -> SimpleNamespace:
    """Return 400 noise images of 4 classes; with `informative`, the quadrant of the class is brighter."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 400)
    images = rng.normal(size=(400, 1, 8, 8)).astype(np.float32)
    if informative:
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += strength
    order = rng.permutation(400)
    return SimpleNamespace(images=images, labels=labels, train_indices=order[:300], test_indices=order[300:])


def task_of(data):
    return Task(data.labels, data.train_indices, data.test_indices)


class Network(nn.Module):
    """A linear map of patches, with features like a `Student`'s."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.map = nn.Linear(64, 12)

    def features(self, pixels, lengths=None, top_k=1):
        assert not self.training
        tokens = self.map(pixels.flatten(1) if self.keep else torch.zeros_like(pixels).flatten(1))
        features = torch.stack([tokens, tokens + 0.1], 1)
        return [features * (k + 1) for k in range(top_k)]


def test_finds_what_is_there():
    data, config = make_data(True), VisionProbeConfig(neighbours=5)
    report = run_probe({"good": Network(True).train(), "blind": Network(False)}, data, config)
    assert list(report.scores) == ["good", "blind", PIXELS]
    assert report.scores["good"].few_labels > 70
    assert report.scores["good"].linear > 85
    assert report.scores["good"].knn > 75
    assert report.scores["blind"].linear < 45
    assert "good" in str(report)
    assert "5-NN" in str(report)
    again = run_probe({"good": Network(True)}, data, config)
    assert again.scores[PIXELS] == report.scores[PIXELS]


def test_scores_only_held_out_images():
    """Random labels can be memorized, and held-out scores still stay at chance."""
    scores = score(make_data(False).images.reshape(400, -1), task_of(make_data(False)), VisionProbeConfig())
    assert scores.linear < 45
    assert scores.knn < 45


def test_features():
    torch.manual_seed(0)
    model, images = Network(True).train(), torch.randn(300, 1, 8, 8)
    got = image_features(model, images)
    with torch.no_grad():
        tokens = model.map(images.flatten(1))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    # the class token (100) is ignored
    want = (norm(tokens) + norm(tokens + 0.1)) / 2
    assert got.shape == (300, 12)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
    assert model.training


@pytest.mark.parametrize("per_class", [1, 10, 10_000])
def test_number_of_labels(per_class):
    data = make_data(True, strength=0.5)
    scores = score(
        data.images.reshape(400, -1), task_of(data), VisionProbeConfig(labels_per_class=per_class, num_draws=3)
    )
    if per_class == 10_000:
        assert scores.few_labels == scores.linear
        assert scores.few_labels_std == 0
    else:
        assert scores.few_labels < scores.linear


class Patches(nn.Module):
    """Tokens of one pixel and a constant, with features like a `Student`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def features(self, pixels, lengths=None, top_k=1):
        return [torch.stack([pixels.flatten(1), -pixels.flatten(1)], -1)]


def test_features_of_a_grid():
    """If one cell is bright, only its average differs."""
    images = torch.full((3, 1, 4, 4), -1.0)
    images[1, 0, :2, 2:] = images[2, 0, 3, 0] = 1.0
    got = image_features(Patches(), images, grid=2).reshape(3, 2, 2, 2)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, 0], [[-1, -1], [-1, -1]], atol=1e-4)
    np.testing.assert_allclose(got[1, 0], [[-1, 1], [-1, -1]], atol=1e-4)
    np.testing.assert_allclose(got[2, 0], [[-1, -1], [-0.5, -1]], atol=1e-4)
    np.testing.assert_allclose(got[:, 1], -got[:, 0], atol=1e-6)
    np.testing.assert_allclose(image_features(Patches(), images), got.mean((2, 3)), atol=1e-6)
