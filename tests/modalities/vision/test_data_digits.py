from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast.config import VisionConfig
from d2v_fast.errors import DataError
from d2v_fast.modalities.vision.affine import warp
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.digits import DigitsDataset, digits_for_probe


def make_config(image_size: int = 8, **data: object) -> VisionConfig:
    return VisionConfig.model_validate(
        {
            "model": {"image_size": image_size, "patch_size": image_size // 4, "channels": 1, "depth": 6},
            "mask": {"num_patches": 10, "min_patches": 4},
            "data": {"kind": "digits", "mean": [0.3], "std": [0.35], "num_workers": 0, **data},
        }
    )


MOVING = {"rotation_degrees": 15.0, "zoom": 0.2, "shift_pixels": 1.5}


def raw_scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target


def test_plain_digits_are_the_scans() -> None:
    config = make_config()
    probe = digits_for_probe(config)
    scans, labels = raw_scans()
    assert probe.images.shape == (1797, 1, 8, 8)
    assert probe.images.dtype == torch.float32
    assert probe.labels.dtype == probe.train_indices.dtype == probe.test_indices.dtype == torch.int64
    torch.testing.assert_close(probe.images[:, 0], (torch.from_numpy(scans) - 0.3) / 0.35)
    np.testing.assert_array_equal(probe.labels, labels)


def test_split_is_fixed_stratified_and_complete() -> None:
    probe = digits_for_probe(make_config())
    train, test = probe.train_indices.tolist(), probe.test_indices.tolist()
    assert sorted(train + test) == list(range(1797))
    assert len(test) == pytest.approx(0.2 * 1797, abs=5)
    shares = torch.bincount(probe.labels[test]) / torch.bincount(probe.labels)
    assert (shares - 0.2).abs().max() < 0.005
    again = digits_for_probe(make_config(image_size=16, **MOVING))
    assert torch.equal(again.test_indices, probe.test_indices)


def test_training_sees_the_train_part_and_no_label() -> None:
    config = make_config()
    probe = digits_for_probe(config)
    dataset = image_dataset(config)
    assert len(dataset) == len(probe.train_indices)
    every = np.arange(len(dataset))
    assert torch.equal(dataset.plain(every), probe.images[probe.train_indices])
    held_out = image_dataset(config, "test")
    assert torch.equal(held_out.plain(np.arange(len(held_out))), probe.images[probe.test_indices])
    assert torch.equal(dataset[17], dataset.plain(np.array([17]))[0])
    arrays = [value for value in vars(dataset).values() if isinstance(value, (np.ndarray, torch.Tensor))]
    assert [array.shape for array in arrays] == [(len(dataset), 8, 8)]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_augmentation_moves_every_digit_differently() -> None:
    config = make_config(**MOVING)
    dataset = image_dataset(config)
    ids = np.arange(200)
    pixels, bad = dataset.augmented(ids, seed=1, epoch=2)
    assert bad == ()
    assert pixels.shape == (200, 1, 8, 8)
    assert pixels.isfinite().all()
    gray = pixels * 0.35 + 0.3
    assert gray.min() > -1e-6
    assert gray.max() < 1 + 1e-6
    plain = dataset.plain(ids)
    change = (pixels - plain).abs().mean(dim=(1, 2, 3))
    assert change.min() > 0
    for seed, epoch in ((2, 2), (1, 3)):
        assert (dataset.augmented(ids, seed, epoch)[0] != pixels).flatten(1).any(dim=1).all()
    # on average a digit still correlates more with itself than with others
    likeness = torch.corrcoef(torch.cat([plain.flatten(1), pixels.flatten(1)]))[:200, 200:]
    assert likeness.diagonal().mean() > likeness.mean() + 0.1


def test_a_digit_does_not_depend_on_its_batch() -> None:
    config = make_config(16, **MOVING)
    dataset = image_dataset(config)
    ids = np.random.default_rng(0).permutation(len(dataset))[:37]
    together, _ = dataset.augmented(ids, 5, 6)
    alone = torch.cat([dataset.augmented(ids[i : i + 1], 5, 6)[0] for i in range(37)])
    assert torch.equal(together, alone)


def test_without_options_nothing_moves() -> None:
    config = make_config()
    dataset = image_dataset(config)
    ids = np.arange(50)
    assert torch.equal(dataset.augmented(ids, 0, 0)[0], dataset.plain(ids))


def one_moved(scan: np.ndarray, turn: float = 0.0, log_zoom: float = 0.0, right: float = 0.0, down: float = 0.0):
    out = np.full((1, *scan.shape), np.nan, dtype=np.float32)
    warp(out, scan[None], np.zeros(1, dtype=np.int64), np.array([[turn, log_zoom, right, down]]))
    return out[0]


def test_warp_directions() -> None:
    scan = np.random.default_rng(3).random((8, 8)).astype(np.float32)
    np.testing.assert_array_equal(one_moved(scan), scan)
    np.testing.assert_array_equal(one_moved(scan, right=1)[:, 1:], scan[:, :-1])
    np.testing.assert_array_equal(one_moved(scan, down=2)[2:], scan[:-2])
    assert (one_moved(scan, down=2)[:2] == 0).all()
    np.testing.assert_allclose(one_moved(scan, turn=np.pi / 2), np.rot90(scan, -1), atol=1e-6)
    # at twice the size, the middle fills the image
    ramp = np.tile(np.linspace(0.1, 0.8, 8, dtype=np.float32), (8, 1))
    slopes = np.diff(one_moved(ramp, log_zoom=np.log(2)), axis=1)[2:-2, 1:-1]
    np.testing.assert_allclose(slopes, 0.05, atol=1e-3)


def test_upscaling_is_cubic() -> None:
    scan = np.random.default_rng(4).random((8, 8)).astype(np.float32)
    out = np.empty((1, 24, 24), dtype=np.float32)
    warp(out, scan[None], np.zeros(1, dtype=np.int64), np.zeros((1, 4)))
    expected = np.asarray(Image.fromarray(scan).resize((24, 24), Image.Resampling.BICUBIC)).clip(0, 1)
    # at the border we read background, and Pillow repeats the last pixel
    np.testing.assert_allclose(out[0, 6:-6, 6:-6], expected[6:-6, 6:-6], atol=1e-6)


def test_color_is_refused() -> None:
    config = make_config()
    with pytest.raises(DataError, match=r"`d2v.model.channels` must be 1 for digits, but is 3"):
        DigitsDataset(config.data, config.model.model_copy(update={"channels": 3}))
