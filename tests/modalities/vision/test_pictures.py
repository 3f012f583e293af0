"""Figures of images: projection to colors, choice of images, and their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from d2v_fast.evaluation.features import patch_features
from d2v_fast.figures.sheet import save_figure
from d2v_fast.masking import several_image_masks
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.pictures import MASK_COLOR, choose_images, principal_colors, vision_figure
from d2v_fast.objectives.build import build_model
from tests.helpers.masked_models import masked_config
from tests.helpers.written_runs import vision_config

CONFIG = vision_config(width=24, depth=3)


def test_colors_are_the_principal_components() -> None:
    features = torch.randn(20, 9, 7) * torch.tensor([27.0, 9.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    colors = principal_colors(features)
    assert colors.shape == (20, 9, 3)
    assert colors.dtype == np.float32
    for channel in range(3):
        values = colors[..., channel].ravel()
        assert (values.min(), values.max()) == (0.0, 1.0)
        # up to sign, center and scale, a component is almost the coordinate of that variance
        coordinate = features[..., channel].flatten().numpy()
        assert abs(np.corrcoef(values, coordinate)[0, 1]) > 0.9


def test_colors_do_not_depend_on_the_basis() -> None:
    features = torch.randn(4, 6, 9, dtype=torch.float64) * torch.linspace(5, 1, 9)
    rotation, _ = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))
    turned = features @ rotation * 3 + 7
    np.testing.assert_allclose(principal_colors(turned), principal_colors(features), atol=1e-5)


def test_colors_of_degenerate_features() -> None:
    np.testing.assert_array_equal(principal_colors(torch.full((2, 4, 5), 3.7)), 0.5)
    assert principal_colors(torch.randn(1, 2, 5)).shape == (1, 2, 3)
    assert principal_colors(torch.randn(2, 4, 1)).shape == (2, 4, 3)
    two = torch.randn(2, 5)[torch.tensor([[0, 1, 1], [1, 0, 0]])]
    colors = principal_colors(two)
    assert np.unique(colors.reshape(-1, 3).round(4), axis=0).shape == (2, 3)


def test_features_are_those_of_the_target() -> None:
    model = build_model(CONFIG).student
    pixels = torch.randn(2, 1, 8, 8)
    outputs = model.eval()(pixels, top_k=2).features
    expected = (F.layer_norm(outputs[0], (24,)) + F.layer_norm(outputs[1], (24,)))[:, 1:] / 2
    torch.testing.assert_close(patch_features(model, pixels, top_k=2), expected)


def photograph(path: Path, seed: int, size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_no_image_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No image is shown twice, as a replacement or as a copy, and a shortage is reported."""
    folder = tmp_path / "photographs"
    for index in range(4):
        photograph(folder / f"{index}.png", index)
    (folder / "1a.png").write_bytes(b"no image")
    (folder / "2a.png").write_bytes((folder / "2.png").read_bytes())
    found = choose_images(CONFIG, folder, 6)
    assert found.names == ["0.png", "1.png", "2.png", "3.png"]
    assert len({image.numpy().tobytes() for image in found.pixels}) == 4
    # a name stands under its own image
    for name, image in zip(found.names, found.pixels, strict=True):
        alone = image_dataset(
            CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"kind": "images", "path": str(folder)})})
        )
        index = [Path(alone.path(i)).name for i in range(len(alone))].index(name)  # type: ignore[union-attr]
        assert torch.equal(alone[index], image)
    assert "4 images are drawn" in capsys.readouterr().err


def test_names_stand_under_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    for seed, name in enumerate(("one.png", "deep/er/$a$ and $b.png", "deep/er/" + 60 * "x" + "7.png")):
        photograph(folder / name, seed)
    found = choose_images(CONFIG, folder, 3)
    figure = vision_figure({}, found, CONFIG, "t")
    labels = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]
    assert labels[0] == "er\n$a$ and $b.png"
    assert labels[2] == "one.png"
    assert labels[1].startswith("er\nxxx")
    assert labels[1].endswith("x7.png")
    assert max(map(len, labels[1].splitlines())) <= 20
    save_figure(figure, tmp_path / "out.png")


def test_several_masks_of_an_image_are_drawn() -> None:
    """Three of data2vec 2.0's masks of an image, each a row: patches of one color where the run's first epoch masks."""
    config = masked_config("vision", mask={"num_masks": 5})
    found = choose_images(config, None, 2)
    figure = vision_figure({"a model": build_model(config).student}, found, config, "t")
    rows = [text.get_text() for text in figure.texts]
    assert rows[:5] == ["input", "mask 1 of 5", "mask 2 of 5", "mask 3 of 5", "a model"]
    masks = several_image_masks(config.run.seed, 0, found.ids, 4, 0.6, 2, 0.1, num_masks=5)
    expected = np.zeros((2, 5, 16), dtype=bool)
    expected.flat[masks.rows] = True
    for index, axes in enumerate((figure.axes[:5], figure.axes[5:])):
        for number, axis in enumerate(axes[1:4]):
            # the middle of each patch of 2 x 2 pixels
            picture = axis.images[0].get_array()[::2, ::2]
            hidden = (abs(picture - np.array(MASK_COLOR)) < 1e-6).all(-1)
            assert (hidden.ravel() == expected[index, number]).all()
