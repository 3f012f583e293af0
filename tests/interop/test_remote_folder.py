"""Transformers folders of data2vec 2.0: they load with their own code, give our features, and come back unchanged."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_fast.config import D2VConfig, check_d2v
from d2v_fast.errors import OptionError
from d2v_fast.interop.huggingface import export_model, import_model
from d2v_fast.modalities.text.huggingface2 import export_masked_text
from d2v_fast.models.student import Student
from d2v_fast.objectives.build import build_model
from tests.helpers.places import ROOT
from tests.helpers.text_files import small_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = {"width": 24, "heads": 6, "depth": 2, "mlp_ratio": 1.5, "decoder": {"width": 8, "depth": 1, "groups": 2}}
SECTIONS: dict[str, dict[str, Any]] = {
    "vision": {
        "model": {**SMALL, "context_depth": 1, "image_size": 8, "patch_size": 4, "channels": 1, "norm_eps": 1e-3},
        "mask": {"prob": 0.5, "length": 1},
        "data": {"mean": [0.3], "std": [0.4]},
    },
    # 6 heads: not all slopes of ALiBi are powers of two
    "speech": {
        "model": {
            **SMALL,
            "context_depth": 1,
            "conv_width": 8,
            "conv_kernels": [10, 3, 2],
            "conv_strides": [5, 2, 2],
            "position_depth": 2,
            "position_kernel": 5,
            "position_groups": 4,
            "sample_rate": 8_000,
        }
    },
    "text": {
        "model": {**SMALL, "vocab_size": 19, "padding_id": 3, "max_positions": 12},
        "data": {"block_size": 12},
    },
}
HEADS = {
    "vision": ("AutoModelForImageClassification", {"num_labels": 3}),
    "speech": ("AutoModelForCTC", {"vocab_size": 9}),
    "text": ("AutoModelForSequenceClassification", {"num_labels": 3}),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies the code of a folder into its cache and imports it from there: here, one of these tests."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]

    # what tests of other files imported is in another cache
    forget()
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
            patch.setattr(f"{module}.HF_MODULES_CACHE", place, raising=False)
        patch.syspath_prepend(place)
        yield
    forget()


def build(modality: str) -> tuple[Student, D2VConfig]:
    """A student with random weights everywhere, and one negative ALiBi scale."""
    config, problems = check_d2v(
        {"modality": modality, "objective": "data2vec2", "target": {"top_k": 1}, **SECTIONS[modality]}
    )
    assert config is not None, problems
    torch.manual_seed(3)
    student = build_model(config).student.eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        if modality == "speech":
            student.get_parameter("context.alibi.scale")[2] = -0.5
    return student, config


def inputs_of(modality: str) -> dict[str, Tensor]:
    """Two samples, of which the second is padded."""
    if modality == "vision":
        return {"pixel_values": torch.randn(2, 1, 8, 8)}
    if modality == "speech":
        mask = torch.ones(2, 400, dtype=torch.int32)
        mask[1, 250:] = 0
        return {"input_values": torch.randn(2, 400) * mask, "attention_mask": mask}
    tokens = torch.randint(4, 19, (2, 9))
    tokens[1, 5:] = 3
    return {"input_ids": tokens, "attention_mask": (tokens != 3).long()}


def places_of(student: Student, modality: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Our features `[B, T, D]`, and bool `[B, T]` where they have a meaning."""
    first = next(iter(inputs.values()))
    if modality == "vision":
        hidden = student(first).last_hidden
        return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)
    lengths = inputs["attention_mask"].sum(1)
    if modality == "speech":
        sizes = SECTIONS["speech"]["model"]
        for kernel, stride in zip(sizes["conv_kernels"], sizes["conv_strides"], strict=True):
            lengths = (lengths - kernel) // stride + 1
    hidden = student(first, lengths).last_hidden
    return hidden, torch.arange(hidden.shape[1]) < lengths[:, None]


@torch.no_grad()
@pytest.mark.parametrize("modality", SECTIONS)
def test_transformers_gives_our_features(modality: str, tmp_path: Path) -> None:
    student, config = build(modality)
    export_model(student, config, tmp_path / "out", info={"step": 7})
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = inputs_of(modality)
    found = theirs.eval()(**inputs, output_hidden_states=True)
    expected, is_place = places_of(student, modality, inputs)
    assert (found.last_hidden_state - expected)[is_place].abs().max() <= 1e-5
    assert len(found.hidden_states) == 1 + config.model.context_depth + config.model.depth
    # padding changes nothing
    alone = (
        theirs(**{name: one[1:, : int(inputs["attention_mask"][1].sum())] for name, one in inputs.items()})
        if ("attention_mask" in inputs)
        else None
    )
    if alone is not None:
        length = int(is_place[1].sum())
        assert (alone.last_hidden_state[0, :length] - found.last_hidden_state[1, :length]).abs().max() <= 1e-5


@pytest.mark.parametrize("modality", SECTIONS)
def test_a_head_is_new_and_learns(modality: str, tmp_path: Path) -> None:
    """A model with a head loads the encoder, gives a loss with gradients, and its own folder reads back here."""
    student, config = build(modality)
    export_model(student, config, tmp_path / "out")
    name, options = HEADS[modality]
    model, report = getattr(transformers, name).from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True, **options
    )
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    encoder = "vision" if modality == "vision" else {"speech": "audio", "text": "text"}[modality]
    assert not any(f"data2vec2_{encoder}." in key for key in report["missing_keys"])
    labels = torch.tensor([[1, 2], [3, -100]]) if modality == "speech" else torch.tensor([0, 2])
    output = model(**inputs_of(modality), labels=labels)
    output.loss.backward()
    assert output.loss.isfinite()
    assert model.get_parameter(f"data2vec2_{encoder}.blocks.0.mlp.fc1.weight").grad.any()
    model.save_pretrained(tmp_path / "tuned")
    again, _ = import_model(tmp_path / "tuned")
    assert all(torch.equal(again.state_dict()[key], one) for key, one in student.state_dict().items())


@pytest.mark.parametrize("modality", SECTIONS)
def test_a_folder_comes_back_bit_for_bit(modality: str, tmp_path: Path) -> None:
    student, config = build(modality)
    export_model(student, config, tmp_path / "out")
    again, found = import_model(tmp_path / "out", decoder=config.model.decoder)
    free = {"context_dropout", "context_layer_drop", "layer_drop"}
    assert {key for key, one in found if getattr(config.model, key) != one} <= free
    assert again.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], one) for key, one in student.state_dict().items())
    # without a run to begin, the decoder is the published one, as far as it fits
    import_model(tmp_path / "out")


def test_processors_are_in_the_folders(tmp_path: Path) -> None:
    student, config = build("vision")
    export_model(student, config, tmp_path / "images")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "images")
    assert list(processor.image_mean) == [0.3]
    assert processor.crop_size["height"] == 8
    student, config = build("speech")
    export_model(student, config, tmp_path / "speech")
    assert transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "speech").sampling_rate == 8_000


def test_a_tokenizer_is_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It loads as its page says, without a question."""
    tokenizer = small_tokenizer()
    model = {**SECTIONS["text"]["model"], "vocab_size": tokenizer.vocab_size, "padding_id": 1}
    config, problems = check_d2v(
        {"modality": "text", "objective": "data2vec2", **SECTIONS["text"], "model": model, "target": {"top_k": 1}}
    )
    assert config is not None, problems
    export_masked_text(build_model(config).student, config, tmp_path, tokenizer=tokenizer)
    assert 'AutoTokenizer.from_pretrained(".", trust_remote_code=True)' in (tmp_path / "README.md").read_text()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert "custom code" not in capsys.readouterr().out
    ids, _ = tokenizer.encode(["the student reads"])
    inputs = theirs("the student reads", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [0, *ids.tolist(), 2]
    encoder = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert encoder(**inputs).last_hidden_state.shape[2] == 24


def test_a_text_model_with_context_blocks_is_refused(tmp_path: Path) -> None:
    raw = {"modality": "text", "objective": "data2vec2", **SECTIONS["text"], "target": {"top_k": 1}}
    config, problems = check_d2v({**raw, "model": {**raw["model"], "context_depth": 1}})
    assert config is not None, problems
    with pytest.raises(OptionError, match=r"`d2v\.model\.context_depth` must be 0 for Transformers, but is 1"):
        export_model(build_model(config).student, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted(ROOT.glob("d2v_fast/**/remote/*.py")), ids=lambda path: path.stem)
def test_the_code_of_folders_stands_alone(path: Path) -> None:
    """It is short, and imports torch, Transformers, the standard library and the files beside it only."""
    text = path.read_text()
    assert len(text.splitlines()) < 400
    allowed = {"torch", "transformers", "math", "__future__"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert module.split(".")[0] in allowed if node.level == 0 else module.startswith(("model", "config"))
