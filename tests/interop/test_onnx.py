"""`d2v-fast export --format onnx`: onnxruntime computes the same from the file as Transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_fast.checkpoints.saved_weights import load_encoder
from d2v_fast.commands.console import main
from d2v_fast.config import D2VConfig
from d2v_fast.interop.huggingface import export_model
from d2v_fast.interop.onnx import export_onnx
from d2v_fast.models.student import Student
from d2v_fast.objectives.build import build_model
from tests.helpers.checkpoint_files import opened
from tests.helpers.masked_models import masked_config, random_masked_pair
from tests.helpers.speech_models import make_config as speech_config
from tests.helpers.speech_reference import randomize_
from tests.helpers.text_models import make_config as text_config
from tests.helpers.written_runs import CONFIG, write_run


def test_packages_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "r", CONFIG, 2)
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["export", str(tmp_path / "r"), "--format", "onnx"]) == 1
    assert "an .onnx file is written with onnx, which cannot" in capsys.readouterr().err
    assert not list((tmp_path / "r").glob("export*"))


class Exported:
    """A random encoder as an ONNX file, and as a Transformers folder."""

    def __init__(self, config: D2VConfig, folder: Path) -> None:
        for name in ("onnx", "onnxscript"):
            pytest.importorskip(name)
        runtime = pytest.importorskip("onnxruntime")
        self.model: Student = build_model(config).student.eval()
        randomize_(self.model)
        self.path, self.folder = folder / "model.onnx", folder / "model"
        export_onnx(self.model, config, self.path)
        export_model(self.model, config, self.folder)
        self.session = runtime.InferenceSession(self.path)

    def __call__(self, **inputs: Tensor) -> Tensor:
        (found,) = self.session.run(["last_hidden_state"], {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(np.asarray(found))

    def theirs(self) -> Any:
        """The model that Transformers reads."""
        transformers = pytest.importorskip("transformers")
        return transformers.AutoModel.from_pretrained(self.folder, attn_implementation="eager").eval()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# slow: the other image encoder is exported in every run
@pytest.mark.slow
@torch.no_grad()
def test_images(tmp_path: Path) -> None:
    exported = Exported(CONFIG, tmp_path)
    theirs = exported.theirs()
    for count in (1, 3):
        pixels = torch.randn(count, 1, 8, 8)
        found = exported(pixel_values=pixels)
        close(found, theirs(pixels).last_hidden_state)
        close(found, exported.model.finish(exported.model(pixels).last_hidden))


@pytest.fixture(scope="module")
def exported_speech(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with torch.no_grad():
        return Exported(speech_config(), tmp_path_factory.mktemp("speech"))


# slow: PyTorch needs 8 s to export the convolutions
@pytest.mark.slow
@torch.no_grad()
def test_speech(exported_speech: Exported) -> None:
    """Of any length; padded, each utterance gets what it gets alone."""
    config, exported = speech_config(), exported_speech
    theirs = exported.theirs()
    for count, num_samples in ((1, 1000), (3, 703)):
        waveforms = torch.randn(count, num_samples)
        mask = torch.ones(count, num_samples, dtype=torch.int32)
        found = exported(input_values=waveforms, attention_mask=mask)
        close(found, theirs(waveforms, attention_mask=mask).last_hidden_state)
    lengths = torch.tensor([703, 411, 250])
    mask = (torch.arange(703) < lengths[:, None]).to(torch.int32)
    found = exported(input_values=waveforms * mask, attention_mask=mask)
    for row, length in enumerate(lengths.tolist()):
        num_frames = config.model.num_frames(length)
        close(found[row, :num_frames], theirs(waveforms[row : row + 1, :length]).last_hidden_state[0])


@pytest.mark.slow
@torch.no_grad()
def test_speech_takes_what_the_feature_extractor_of_the_folder_returns(exported_speech: Exported) -> None:
    exported = exported_speech
    transformers = pytest.importorskip("transformers")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(exported.folder)
    waves = [np.random.default_rng(0).standard_normal(size, np.float32) for size in (700, 400)]
    rate = extractor.sampling_rate
    inputs = extractor(waves, sampling_rate=rate, padding=True, return_tensors="pt")
    alone = extractor(waves[1], sampling_rate=rate, return_tensors="pt")["input_values"]
    expected = exported.theirs()(alone).last_hidden_state[0]
    close(exported(**inputs)[1, : len(expected)], expected)


# slow: `test_the_file_says_what_it_takes` compares the other padding id in every run
@pytest.mark.slow
@torch.no_grad()
def test_text(tmp_path: Path) -> None:
    """Padded on either side; with another padding id than `test_the_file_says_what_it_takes`."""
    config = text_config(padding_id=0)
    exported = Exported(config, tmp_path)
    theirs = exported.theirs()
    longest = config.model.max_positions
    for side in ("right", "left"):
        for lengths in ([longest], [7, 3, 5], [2, 2]):
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            mask = mask.flip(1) if side == "left" else mask
            tokens = torch.randint(4, config.model.vocab_size, mask.shape).where(mask, torch.tensor(0))
            inputs = {"input_ids": tokens, "attention_mask": mask.to(torch.int64)}
            close(exported(**inputs)[mask], theirs(**inputs).last_hidden_state[mask])


def test_the_file_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, with the axes that are free; exported from a run, with the teacher's weights."""
    runtime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    config = text_config()
    write_run(tmp_path / "r", config, 2)
    assert main(["export", str(tmp_path / "r"), "--format", "onnx", "--weights", "teacher"]) == 0
    assert f"{tmp_path / 'r' / 'export-teacher.onnx'} (teacher, step 7, as ONNX)" in capsys.readouterr().out
    session = runtime.InferenceSession(tmp_path / "r" / "export-teacher.onnx")
    shapes = {node.name: node.shape for node in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", config.model.width],
    }
    model = load_encoder(opened(tmp_path / "r" / "checkpoints" / "step-7"), config, "teacher").eval()
    assert config.model.padding_id == 1
    for num_padding in (0, 2):
        tokens = torch.randint(4, config.model.vocab_size, (2, 5))
        tokens[:, :num_padding] = 1
        mask = (tokens != 1).to(torch.int64)
        found = torch.from_numpy(session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0])
        # positions are counted from the first token
        close(found[:, num_padding:], model(tokens[:, num_padding:]).last_hidden.detach())


@torch.no_grad()
@pytest.mark.parametrize("modality", ["vision", pytest.param("speech", marks=pytest.mark.slow)])
def test_encoders_of_masked_training(modality: str, tmp_path: Path) -> None:
    """data2vec 2.0: fixed positions, ALiBi and padding are in the file, and sizes are free."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    config = masked_config(modality)
    model = random_masked_pair(config)[0].student.eval()
    export_onnx(model, config, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    if modality == "vision":
        pixels = torch.randn(3, 1, 8, 8)
        (found,) = session.run(None, {"pixel_values": pixels.numpy()})
        close(torch.from_numpy(found), model(pixels).last_hidden)
        return
    waveforms, mask = torch.randn(3, 300), torch.ones(3, 300, dtype=torch.int32)
    mask[1, 170:] = 0
    waveforms *= mask
    (found,) = session.run(None, {"input_values": waveforms.numpy(), "attention_mask": mask.numpy()})
    frames = [config.model.num_frames(int(length)) for length in mask.sum(1)]
    expected = model(waveforms, torch.tensor(frames)).last_hidden
    for mine, theirs, length in zip(torch.from_numpy(found), expected, frames, strict=True):
        close(mine[:length], theirs[:length])
