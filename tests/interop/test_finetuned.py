"""Every `Data2Vec` class that Transformers saves is imported with the same features; weights that are left out or new
are reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.commands.console import main
from d2v_fast.config import load_config
from d2v_fast.interop.huggingface import export_model, import_model
from d2v_fast.objectives.build import build_model
from tests.helpers.beit_reference import NEITHER, PER_BLOCK, UNSCALED, assert_same_features, reference
from tests.helpers.runs import TINY, TINY_SPEECH, TINY_TEXT, tiny_file
from tests.helpers.vision_reference import randomize_

transformers = pytest.importorskip("transformers")

CLASSES = sorted(
    name
    for name in dir(transformers)
    if name.startswith("Data2Vec") and (name.endswith("Model") or "For" in name) and "PreTrained" not in name
)
# how they are made of an export: as the model card says, without masks, or what the class needs to be small
OPTIONS: dict[str, dict[str, Any]] = {
    "Data2VecVisionForImageClassification": {"num_labels": 2, "use_mean_pooling": True},
    "Data2VecVisionForSemanticSegmentation": {"num_labels": 2, "out_indices": [0, 1, 2, 2]},
    "Data2VecAudioForCTC": {"vocab_size": 32, "ctc_loss_reduction": "mean", "mask_time_prob": 0.0},
    "Data2VecAudioForXVector": {"tdnn_dim": [8, 8, 8, 8, 16], "xvector_output_dim": 8, "mask_time_prob": 0.0},
    "Data2VecAudioForSequenceClassification": {"num_labels": 3, "classifier_proj_size": 8},
    "Data2VecTextForSequenceClassification": {"num_labels": 2},
}
FILES = {"Vision": TINY, "Audio": TINY_SPEECH, "Text": TINY_TEXT}
LEFT_OUT = {
    "Data2VecAudioForAudioFrameClassification": "classifier (2 tensors)",
    "Data2VecAudioForCTC": "lm_head (2 tensors)",
    "Data2VecAudioForSequenceClassification": "classifier (2 tensors), projector (2 tensors)",
    "Data2VecAudioForXVector": "classifier (2 tensors), feature_extractor (2 tensors), objective, projector",
    "Data2VecTextForCausalLM": "lm_head (",
    "Data2VecTextForMaskedLM": "lm_head (",
    "Data2VecTextForMultipleChoice": "classifier (2 tensors)",
    "Data2VecTextForQuestionAnswering": "qa_outputs (2 tensors)",
    "Data2VecTextForSequenceClassification": "classifier (4 tensors)",
    "Data2VecTextForTokenClassification": "classifier (2 tensors)",
    "Data2VecTextModel": "pooler (2 tensors)",
    "Data2VecVisionForImageClassification": "classifier (2 tensors), pooler (2 tensors)",
    "Data2VecVisionForSemanticSegmentation": "auxiliary_head (",
}


def random_inputs(config: Any) -> torch.Tensor:
    if config.modality == "vision":
        return torch.randn(2, config.model.channels, config.model.image_size, config.model.image_size)
    return torch.randn(2, 4000) if config.modality == "speech" else torch.randint(5, config.model.vocab_size, (2, 20))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_comes_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    [base] = [base for kind, base in FILES.items() if name.startswith(f"Data2Vec{kind}")]
    file = tiny_file(tmp_path, base)
    config = load_config(file).d2v
    initial = build_model(config).student
    randomize_(initial)
    export_model(initial, config, tmp_path / "export")
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "export", **OPTIONS.get(name, {})).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "saved")
    if config.modality == "speech":
        shutil.copy(tmp_path / "export" / "preprocessor_config.json", tmp_path / "saved")
    caplog.clear()

    model, _ = import_model(tmp_path / "saved")
    inner = theirs if name.endswith("Model") else getattr(theirs, theirs.base_model_prefix)
    inputs = random_inputs(config)
    with torch.no_grad():
        output = inner(inputs, output_hidden_states=True)
        their = output.hidden_states[-1] if config.modality == "vision" else output.last_hidden_state
        ours = model.eval()(inputs).last_hidden
    assert ours.shape == their.shape
    assert (ours - their).abs().max() <= 1e-5
    told = "\n".join(caplog.messages)
    assert ("the encoder is read without the parts beside it: " in told) == (name in LEFT_OUT)
    assert LEFT_OUT.get(name, "") in told
    options = OPTIONS.get(name, {})
    assert ("holds no mask token: a new one is drawn" in told) == (options.get("mask_time_prob") == 0.0)
    assert ("holds no norm after the last block" in told) == ("use_mean_pooling" in options)

    run = tmp_path / "runs" / "more"
    assert main(["import", str(tmp_path / "saved"), "--to", str(run), "--ds_config", str(file)]) == 0
    assert (run / "checkpoints" / "step-0" / "manifest.json").is_file()
    assert capsys.readouterr().err.count("error:") == 0


def test_every_class_is_tried() -> None:
    assert len(CLASSES) == 15
    assert set(LEFT_OUT) | set(OPTIONS) <= set(CLASSES)


@pytest.mark.parametrize(
    "changes", [PER_BLOCK, NEITHER, UNSCALED, {"use_mask_token": False, "use_mean_pooling": True}], ids=str
)
def test_vision_models_of_other_configurations(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of relative positions in each block, none at all, neither mask token nor last norm."""
    theirs = reference(**changes)
    theirs.save_pretrained(tmp_path)
    model, config = import_model(tmp_path)
    assert_same_features(model, theirs, masks="use_mask_token" not in changes)
    told = "\n".join(caplog.messages)
    if changes is NEITHER:
        assert "holds no relative positions: their table is 0" in told
    elif changes is UNSCALED:
        assert "holds no LayerScale factors: they are 1" in told
    elif changes is PER_BLOCK:
        assert config.position_bias == "per_block"
        assert not told
    else:
        assert "holds no mask token" in told
    # and out again
    export_model(model, config, tmp_path / "again")
    again = transformers.Data2VecVisionModel.from_pretrained(tmp_path / "again").eval()
    assert_same_features(model, again)


def test_a_table_that_the_model_does_not_use_is_not_used(tmp_path: Path) -> None:
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_shared_relative_position_bias": False}))
    assert "encoder.relative_position_bias.relative_position_bias_table" in load_file(tmp_path / "model.safetensors")
    plain = transformers.Data2VecVisionModel.from_pretrained(tmp_path).eval()
    assert_same_features(import_model(tmp_path)[0], plain)


def test_a_text_model_that_looks_back_only_is_refused(tmp_path: Path) -> None:
    """A causal mask gives other features."""
    config = transformers.Data2VecTextConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    transformers.Data2VecTextForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`is_decoder` in .* must be false, but is true instead"):
        import_model(tmp_path)


def test_the_converters_eps_gives_way_to_the_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers' converter leaves 1e-12, which the published models were not trained with."""
    file = tiny_file(tmp_path)
    config = load_config(file).d2v
    export_model(build_model(config).student, config, tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    raw = {**json.loads(path.read_text()), "use_mask_token": False}
    arguments = ["import", str(tmp_path / "folder"), "--ds_config", str(file), "--to"]
    path.write_text(json.dumps({**raw, "layer_norm_eps": 1e-12}))
    assert main([*arguments, str(tmp_path / "runs" / "a")]) == 0
    assert "is kept" not in caplog.text
    assert "holds no mask token" not in caplog.text
    path.write_text(json.dumps({**raw, "layer_norm_eps": 1e-5}))
    assert main([*arguments, str(tmp_path / "runs" / "b")]) == 1
    assert "`d2v.model.norm_eps` must be 1e-05" in capsys.readouterr().err
