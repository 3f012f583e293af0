"""Reading and writing the published code's image checkpoints, with features equal to those of Transformers' model."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.interop.published import load_published, read_published
from d2v_fast.modalities.vision.beit import save_beit
from d2v_fast.objectives.build import build_model
from tests.helpers.beit_reference import NEITHER, PER_BLOCK, UNSCALED, assert_same_features, reference
from tests.helpers.checkpoint_files import opened
from tests.helpers.runs import TINY, leave_out_reports, run_forked, tiny_file
from tests.helpers.vision_reference import randomize_

transformers = pytest.importorskip("transformers")

# Transformers' module names in a block -> the published code's
BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def published(theirs: Any) -> dict[str, Tensor]:
    """Return a Transformers model's weights by the published code's names."""
    state = theirs.state_dict()
    found = {
        "cls_token": state["embeddings.cls_token"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    for name, key in {
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
        "rel_pos_bias.relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table",
    }.items():
        if key in state:
            found[name] = state[key]
    for index in range(theirs.config.num_hidden_layers):
        block = f"encoder.layer.{index}"
        attention = f"{block}.attention.attention"
        parts = [state[f"{attention}.{name}.weight"] for name in ("query", "key", "value")]
        found[f"blocks.{index}.attn.qkv.weight"] = torch.cat(parts)
        found[f"blocks.{index}.attn.q_bias"] = state[f"{attention}.query.bias"]
        found[f"blocks.{index}.attn.v_bias"] = state[f"{attention}.value.bias"]
        if f"{block}.lambda_1" in state:
            found[f"blocks.{index}.gamma_1"] = state[f"{block}.lambda_1"]
            found[f"blocks.{index}.gamma_2"] = state[f"{block}.lambda_2"]
        own = f"{attention}.relative_position_bias.relative_position_bias_table"
        if own in state:
            found[f"blocks.{index}.attn.relative_position_bias_table"] = state[own]
            found[f"blocks.{index}.attn.relative_position_index"] = torch.zeros(26, 26, dtype=torch.int64)
        for key, name in BLOCK.items():
            for parameter in ("weight", "bias"):
                found[f"blocks.{index}.{name}.{parameter}"] = state[f"{block}.{key}.{parameter}"]
    return found


@pytest.mark.parametrize(
    "changes", [{}, PER_BLOCK, NEITHER, UNSCALED], ids=["shared", "per_block", "absolute", "unscaled"]
)
@pytest.mark.parametrize("wrapper", ["model", "module", "bare", "ddp"])
def test_features_are_those_of_transformers(changes: dict[str, Any], wrapper: str, tmp_path: Path) -> None:
    theirs = reference(**changes)
    weights = OrderedDict(published(theirs))
    if wrapper == "ddp":
        content: Any = {"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    else:
        content = weights if wrapper == "bare" else {wrapper: weights, "args": argparse.Namespace(drop_path=0.2)}
    torch.save(content, tmp_path / "a.pth")
    model, head, config = load_published(tmp_path / "a.pth", heads=3)
    assert head is None
    assert config.position_bias == ("per_block" if changes is PER_BLOCK else "shared")
    if wrapper in ("model", "module"):
        assert config.drop_path == 0.2
    assert_same_features(model, theirs)


def test_student_teacher_and_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs, average = reference(), reference()
    torch.nn.init.normal_(average.embeddings.cls_token)
    head = {"lm_head.weight": torch.randn(24, 24), "lm_head.bias": torch.randn(24)}
    content = {"model": published(theirs) | head, "model_ema": published(average) | head, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "a.pth")
    found = read_published(tmp_path / "a.pth")
    assert found.head is not None
    assert torch.equal(found.head["weight"], head["lm_head.weight"])
    assert_same_features(found.student, theirs)
    assert_same_features(found.teacher, average)
    assert not caplog.messages


def test_what_is_left_out_and_drawn_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fine-tuned model has no mask token and no last norm, but a classifier and a norm after mean pooling."""
    theirs = reference(use_mean_pooling=True, use_mask_token=False, **PER_BLOCK)
    more = {"fc_norm.weight": torch.ones(24), "fc_norm.bias": torch.zeros(24), "head.weight": torch.zeros(7, 24)}
    torch.save({"model": published(theirs) | more}, tmp_path / "a.pth")
    model, _, _ = load_published(tmp_path / "a.pth")
    assert_same_features(model, theirs, masks=False)
    told = "\n".join(caplog.messages)
    assert "beside it: fc_norm (2 tensors), head" in told
    assert "holds no mask token: a new one is drawn" in told
    assert "holds no norm after the last block" in told
    again, _, _ = load_published(tmp_path / "a.pth")
    assert torch.equal(model.embedding.mask_token, again.embedding.mask_token)
    assert model.embedding.mask_token.std() > 0


def test_an_other_head_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = {"lm_head.weight": torch.zeros(512, 24), "lm_head.bias": torch.zeros(512)}
    torch.save({"model": published(reference()) | more}, tmp_path / "a.pth")
    assert load_published(tmp_path / "a.pth")[1] is None
    assert "beside it: lm_head (2 tensors)" in "\n".join(caplog.messages)


def test_a_folder_is_made_that_transformers_reads(tmp_path: Path) -> None:
    theirs = reference(**PER_BLOCK)
    torch.save({"model": published(theirs), "args": argparse.Namespace()}, tmp_path / "a.pth")
    assert main(["import", str(tmp_path / "a.pth"), "--to", str(tmp_path / "folder")]) == 0
    loaded = transformers.Data2VecVisionModel.from_pretrained(tmp_path / "folder").eval()
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected, actual = (model(pixels).last_hidden_state for model in (theirs, loaded))
    assert (expected - actual).abs().max() < 1e-5
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 30), (200, 10, 90)).save(tmp_path / "images" / "a.png")
    to = tmp_path / "a.npy"
    assert main(["embed", str(tmp_path / "folder"), str(tmp_path / "images"), "--to", str(to)]) == 0
    assert np.load(to).shape == (1, 24)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("position_bias", ["shared", "per_block"])
def test_a_run_begins_with_it_and_is_exported_again(
    position_bias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_reports(monkeypatch.setattr)
    changes = {"d2v__schedule": {"steps": 2}, "d2v__model__position_bias": position_bias}
    file = tiny_file(tmp_path, TINY, **changes)
    config = load_config(file).d2v
    model, other = build_model(config), build_model(config)
    randomize_(model)
    randomize_(other)
    save_beit(model.student, model.head, other.student, config, tmp_path / "a.pth")
    run = tmp_path / "runs" / "more"
    assert main(["import", str(tmp_path / "a.pth"), "--to", str(run), "--ds_config", str(file)]) == 0
    folder = run / "checkpoints" / "step-0"
    for weights, encoder in (("student", model.student), ("teacher", other.student)):
        saved = SavedWeights(opened(folder), weights)
        assert saved.keys() == encoder.state_dict().keys()
        for name, value in encoder.state_dict().items():
            assert torch.equal(saved[name], value), name
    assert torch.equal(SavedWeights(opened(folder), "student").head()["weight"], model.head.weight)
    assert main(["export", str(run), "--format", "beit", "--to", str(tmp_path / "b.pth")]) == 0
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth"))
    for key in ("model", "model_ema"):
        assert first[key].keys() == second[key].keys()
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key])
    arguments = ["--run", "more", "--resume", "--set", f"d2v.run.dir={run.parent}"]
    output = tmp_path / "output"
    assert run_forked(*arguments, output=output) == [0], output.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.bias": None}, "`patch_embed.proj.bias` is missing"),
        ({"blocks.1.attn.v_bias": torch.zeros(3)}, r"`blocks.1.attn.v_bias` must be \[24\], but is \[3\] instead"),
        ({"blocks.1.attn.bias": torch.zeros(3)}, "`blocks.1.attn.bias` has no place in this encoder"),
        ({"rel_pos_bias.relative_position_bias_table": None}, "nothing else gives the image size"),
        ({"cls_token": torch.full((1, 1, 24), torch.nan)}, "finite .*\n.*24 of 24 values of `cls_token`"),
        ({"norm.weight": None}, "`norm.weight` is missing"),
        ({"gamma": "text"}, "`gamma` is no tensor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    weights = {name: value for name, value in (published(reference()) | change).items() if value is not None}
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / "a.pth")


def test_classes_other_than_a_command_line_are_refused(tmp_path: Path) -> None:
    content = {"model": published(reference()), "args": argparse.Namespace(output_dir=Path("x"))}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"needs pathlib\.\w*Path, and reading that could execute code"):
        load_published(tmp_path / "a.pth")
    # fairseq's files need no class, so that a Namespace is refused there
    torch.save({"model": {"mask_emb": torch.zeros(3)}, "args": argparse.Namespace()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"needs argparse\.Namespace, and reading that could execute code"):
        load_published(tmp_path / "b.pt")


def test_there_must_be_a_teacher_for_it(tmp_path: Path) -> None:
    torch.save({"model": published(reference())}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds no average `model_ema`"):
        load_published(tmp_path / "a.pth", weights="teacher")
