"""Export to and import from Transformers: equal features, equal image preparation, clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v_fast.config import VisionModelConfig
from d2v_fast.files.outputs import RECORD
from d2v_fast.modalities.vision.encoder import VisionModel
from d2v_fast.modalities.vision.huggingface import export_vision, import_vision
from tests.helpers.vision_folders import SIZES, build, edited
from tests.helpers.vision_reference import randomize_

transformers = pytest.importorskip("transformers")


def random_pixels(config: VisionModelConfig, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, config.channels, config.image_size, config.image_size)


@torch.no_grad()
def assert_same_features(model: VisionModel, theirs: Any, config: VisionModelConfig) -> None:
    """Compare every block's output, unmasked and masked."""
    pixels = random_pixels(config)
    masked = torch.rand(2, config.num_patches) < 0.5
    theirs.eval()
    for mask in (None, masked):
        rows = None if mask is None else mask.flatten().nonzero()[:, 0]
        ours = model(pixels, rows, top_k=config.depth)
        output = theirs(pixels, bool_masked_pos=mask, output_hidden_states=True)
        error = (output.last_hidden_state - model.norm(ours.last_hidden)).abs().max().item()
        assert error <= 1e-5, error
        for their_layer, layer in zip(output.hidden_states[1:], ours.features, strict=True):
            assert (their_layer - layer).abs().max() <= 1e-5 * max(1.0, layer.abs().max())


def load_theirs(folder: Path) -> Any:
    theirs, report = transformers.Data2VecVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return theirs


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_export_gives_the_same_features(sizes: dict[str, Any], tmp_path: Path) -> None:
    model, config = build(**sizes)
    export_vision(model, config, tmp_path)
    assert_same_features(model, load_theirs(tmp_path), config.model)


@pytest.mark.slow
def test_base_size_agrees_both_ways(tmp_path: Path) -> None:
    model, config = build()
    export_vision(model, config, tmp_path)
    assert_same_features(model, load_theirs(tmp_path), config.model)
    imported, imported_config = import_vision(tmp_path)
    assert imported_config == config.model
    assert_state_equal(imported, model)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_round_trip_is_exact(sizes: dict[str, Any], tmp_path: Path) -> None:
    model, config = build(**sizes)
    export_vision(model, config, tmp_path)
    imported, imported_config = import_vision(tmp_path)
    hidden_width = int(imported_config.width * imported_config.mlp_ratio)
    assert hidden_width == int(config.model.width * config.model.mlp_ratio)
    assert imported_config.model_copy(update={"mlp_ratio": config.model.mlp_ratio}) == config.model
    assert_state_equal(imported, model)


@pytest.mark.parametrize("around", ["Data2VecVisionModel", "Data2VecVisionForImageClassification"])
def test_import_what_transformers_saved(around: str, tmp_path: Path) -> None:
    config = transformers.Data2VecVisionConfig(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=100,
        image_size=20,
        patch_size=4,
        layer_norm_eps=1e-6,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        use_mean_pooling=False,
    )
    theirs = getattr(transformers, around)(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    model, model_config = import_vision(tmp_path)
    assert (model_config.grid_size, model_config.norm_eps) == (5, 1e-6)
    assert_same_features(model.eval(), getattr(theirs, "data2vec_vision", theirs), model_config)


def assert_state_equal(first: VisionModel, second: VisionModel) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_low_precision_copy_is_exported_in_fp32(tmp_path: Path) -> None:
    model, config = build(**SIZES["digits"])
    model = model.to(torch.bfloat16)
    export_vision(model, config, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert_state_equal(import_vision(tmp_path)[0], model.float())


def test_export_replaces_an_earlier_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    model, config = build(**SIZES["digits"])
    export_vision(model, config, tmp_path, info={"weights": "student", "step": 5})
    randomize_(model)
    export_vision(model, config, tmp_path, info={"weights": "teacher", "step": 750})
    assert_state_equal(import_vision(tmp_path)[0], model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        RECORD,
        "model.safetensors",
        "preprocessor_config.json",
    ]
    card = (tmp_path / "README.md").read_text()
    assert "| weights | teacher |" in card
    assert "| step | 750 |" in card
    assert "student |" not in card


def test_digits_are_prepared_as_in_training(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from d2v_fast.modalities.vision.batches import image_dataset

    model, config = build(**SIZES["digits"])
    export_vision(model, config, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    scans = load_digits().images
    theirs = processor([Image.fromarray(scan.astype(np.uint8)) for scan in scans], return_tensors="pt")["pixel_values"]
    dataset = image_dataset(config, "train")
    for sample_id in range(3):
        distance = (theirs - dataset[sample_id]).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5


@pytest.mark.parametrize("size", [(40, 30), (35, 91), (35, 35)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_training(size: tuple[int, int], channels: int, tmp_path: Path) -> None:
    from d2v_fast.modalities.vision.batches import image_dataset

    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")

    model, config = build(**SIZES["odd"], channels=channels)
    data = config.data.model_copy(update={"kind": "images", "path": str(tmp_path / "images")})
    config = config.model_copy(update={"data": data})
    export_vision(model, config, tmp_path / "export")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "export")
    theirs = processor(image if channels == 3 else image.convert("L"), return_tensors="pt")["pixel_values"][0]
    ours = image_dataset(config.model_copy(update={"data": data}))[0]
    assert theirs.shape == ours.shape
    # only the crop may differ, by a pixel before or after resizing
    assert (theirs - ours).abs().mean() < 0.1
    if size == (35, 35):
        torch.testing.assert_close(theirs, ours)


# slow: Transformers' other way to pool the same output
@pytest.mark.parametrize("use_mean_pooling", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_classifier_learns_digits(use_mean_pooling: bool, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    _, config = build(**SIZES["digits"], layer_scale=0.1, drop_path=0.0, attention_dropout=0.0)
    export_vision(VisionModel(config.model), config, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    classifier = transformers.Data2VecVisionForImageClassification.from_pretrained(
        tmp_path, num_labels=10, use_mean_pooling=use_mean_pooling
    )
    digits = load_digits()
    images = [Image.fromarray(scan.astype(np.uint8)) for scan in digits.images[:50]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    labels = torch.from_numpy(digits.target[:50])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = classifier(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "beit"}, r'`model_type` in .* must be "data2vec-vision", but is "beit" instead'),
        ({"use_relative_position_bias": True}, r"`use_shared_relative_position_bias` in .* must be false"),
        ({"use_absolute_position_embeddings": True}, r"`embeddings.position_embeddings` is missing"),
        ({"hidden_act": "relu"}, r'`hidden_act` in .* must be "gelu"'),
        ({"image_size": [8, 16]}, r"`image_size` in .* must be square, but is \[8, 16\] instead"),
        ({"image_size": 16}, r"relative_position_bias_table` must be \[228, 4\], but is \[52, 4\] instead"),
        ({"num_hidden_layers": 4}, r"`encoder.layer.3.[\w.]+` is missing"),
        ({"num_hidden_layers": 2}, r"`encoder.layer.2.[\w.]+` has no place in this encoder"),
        ({"num_attention_heads": 5}, "heads"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        import_vision(edited(tmp_path, **changes))


def test_square_sizes_may_be_pairs(tmp_path: Path) -> None:
    _, config = import_vision(edited(tmp_path, image_size=[8, 8], patch_size=[2, 2]))
    assert (config.image_size, config.patch_size) == (8, 2)


def test_the_converters_eps_is_kept_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = edited(tmp_path, layer_norm_eps=1e-12)
    model, config = import_vision(folder)
    assert "config.json is 1e-12 and is kept" in caplog.text
    assert config.norm_eps == model.norm.eps == 1e-12
    model, config = import_vision(folder, norm_eps=1e-6)
    assert config.norm_eps == model.encoder.blocks[0].norm1.eps == 1e-6


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a Transformers model folder\. `.*nowhere` does not exist"):
        import_vision(tmp_path / "nowhere")
    folder = edited(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold `model.safetensors`, but does not\. Save the model again"):
        import_vision(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", b"[" * 100_000, "config.json: nested too deeply"),
        ("config.json", b"[]", r"its config.json holds no section"),
        ("config.json", b"{}" + b" " * 1_000_000, "config.json: longer than 1,000,000 bytes"),
        ("model.safetensors", b"", "must be a safetensors file, but: "),
        ("model.safetensors", b"\xff" * 8 + b"{}", "must be a safetensors file, but: .*[Hh]eader"),
        ("model.safetensors", b"\x80\x04]", "must be a safetensors file, but: "),
    ],
)
def test_hostile_files_are_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    folder = edited(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        import_vision(folder)


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    folder = edited(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["embeddings.cls_token"]
    tensors["layernorm.weight"] = torch.zeros(3)
    tensors["embeddings.position_embeddings"] = torch.zeros(1, 17, 48)
    tensors["classifier.weight"] = torch.zeros(10, 48)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        import_vision(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  `embeddings.cls_token` is missing",
        "  `layernorm.weight` must be [48], but is [3] instead",
        "  `embeddings.position_embeddings` has no place in this encoder",
    ]
