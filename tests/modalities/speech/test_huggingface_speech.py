"""Test exporting to and importing from Transformers: equal features with and without padding, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2v_fast.config import SpeechConfig, SpeechModelConfig
from d2v_fast.files.outputs import RECORD
from d2v_fast.interop.huggingface import export_model, import_model
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.speech.huggingface import export_speech, import_speech
from tests.helpers.speech_folders import build, edited
from tests.helpers.speech_models import SIZES as SMALL
from tests.helpers.speech_models import make_config
from tests.helpers.speech_reference import randomize_

transformers = pytest.importorskip("transformers")

SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "averaged": {"position_in_teacher": "averaged", "position_depth": 3, "position_kernel": 3, "layer_drop": 0.2},
    "odd": {"width": 30, "heads": 5, "position_groups": 3, "mlp_ratio": 2.5, "norm_eps": 1e-3, "sample_rate": 8_000},
    "one_of_each": {"conv_kernels": (9,), "conv_strides": (4,), "position_depth": 1, "depth": 1, "position_kernel": 4},
}
THEIRS = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "conv_dim": [10, 10, 10],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 2,
    "num_conv_pos_embedding_groups": 4,
    "conv_pos_kernel_size": 7,
}


def load_theirs(folder: Path) -> Any:
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, transformers.Data2VecAudioModel)
    assert not any(report.values()), report
    return theirs.eval()


def padded_batch(*num_samples: int) -> tuple[Tensor, Tensor]:
    """Return waveforms `[B, N]`, padded with zeros, and the mask that is 1 at their samples."""
    waveforms, mask = torch.zeros(len(num_samples), max(num_samples)), torch.zeros(len(num_samples), max(num_samples))
    for b, n in enumerate(num_samples):
        waveforms[b, :n] = F.layer_norm(torch.randn(n), (n,))
        mask[b, :n] = 1
    return waveforms, mask.long()


@torch.no_grad()
def assert_same_features(model: SpeechModel, theirs: Any, num_samples: int = 700) -> None:
    """Compare the features of every block, of unpadded and of masked frames."""
    waveforms, _ = padded_batch(num_samples, num_samples)
    theirs.eval()
    ours = model(waveforms).last_hidden
    output = theirs(waveforms)
    assert_close(output.last_hidden_state, ours)
    masked = torch.rand(ours.shape[:2]) < 0.5
    frames = model.front_end(waveforms)
    frames[masked] = model.front_end.mask_token
    hidden = model.context(model._with_positions(frames, None)).last_hidden
    assert_close(theirs(waveforms, mask_time_indices=masked).last_hidden_state, hidden)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= 1e-5, error


def assert_state_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_export_gives_the_same_features(sizes: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(**sizes) if sizes.get("depth") != 1 else one_block(**sizes)
    model = build(config)
    export_model(model, config, tmp_path)
    theirs = load_theirs(tmp_path)
    assert_same_features(model, theirs)
    assert theirs.config.layerdrop == config.model.layer_drop
    assert theirs.config.hidden_dropout == config.model.dropout
    imported, found = import_speech(tmp_path)
    # a setting that the folder does not hold
    assert found.model_copy(update={"position_in_teacher": config.model.position_in_teacher}) == config.model
    assert_same_features(imported.eval(), theirs)


def one_block(**sizes: Any) -> SpeechConfig:
    model = SpeechModelConfig(**{**SMALL, **sizes})
    target = SpeechConfig().target.model_copy(update={"top_k": 1})
    return SpeechConfig(model=model, target=target)


@pytest.mark.slow
def test_base_size_agrees_both_ways(tmp_path: Path) -> None:
    config = SpeechConfig()
    model = build(config)
    export_speech(model, config, tmp_path)
    assert_same_features(model, load_theirs(tmp_path), 8_000)
    imported, found = import_speech(tmp_path)
    assert found == config.model
    assert_state_equal(imported, model)


def test_import_what_transformers_saved_with_its_defaults(tmp_path: Path) -> None:
    """Those of the base size, except for its depth."""
    theirs = transformers.Data2VecAudioModel(transformers.Data2VecAudioConfig(num_hidden_layers=2))
    randomize_(theirs)
    theirs.save_pretrained(tmp_path)
    model, config = import_model(tmp_path)
    assert config == SpeechModelConfig(depth=2, activation_dropout=0.1, layer_drop=0.1)
    assert isinstance(model, SpeechModel)
    assert_same_features(model.eval(), theirs, 8_000)


@pytest.mark.parametrize("around", ["Data2VecAudioModel", "Data2VecAudioForCTC", "Data2VecAudioForXVector"])
def test_import_what_transformers_saved(around: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, around)(transformers.Data2VecAudioConfig(**THEIRS))
    randomize_(theirs)
    theirs.save_pretrained(tmp_path)
    model, config = import_speech(tmp_path)
    assert (config.position_kernel, config.position_depth, config.sample_rate) == (7, 2, 16_000)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_features(model.eval(), getattr(theirs, "data2vec_audio", theirs))


@contextmanager
def without_leaks(theirs: Any, lengths: Tensor) -> Iterator[None]:
    """Make Transformers zero the padding before every positional convolution, not only before the first one
    (https://github.com/huggingface/transformers/issues/25621)."""

    def zero(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        is_padding = torch.arange(inputs[0].shape[2]) >= lengths[:, None]
        return (inputs[0].masked_fill(is_padding[:, None], 0),)

    handles = [layer.register_forward_pre_hook(zero) for layer in theirs.encoder.pos_conv_embed.layers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("attention", ["padded", "packed"])
@torch.no_grad()
def test_padding(attention: str, tmp_path: Path) -> None:
    """A padded utterance has Transformers' features of the utterance alone, and of a padded batch if padding does not
    leak."""
    config = make_config(attention=attention)
    model = build(config)
    export_speech(model, config, tmp_path)
    theirs = load_theirs(tmp_path)
    num_samples = [700, 431, 622]
    waveforms, mask = padded_batch(*num_samples)
    lengths = torch.tensor([config.model.num_frames(n) for n in num_samples])
    unpadded = (torch.arange(int(lengths.max())) < lengths[:, None]).flatten().nonzero()[:, 0]
    ours = model(waveforms, lengths, unpadded).last_hidden
    with without_leaks(theirs, lengths):
        batch = theirs(waveforms, attention_mask=mask).last_hidden_state
    leaking = theirs(waveforms, attention_mask=mask).last_hidden_state
    for b, (n, num_frames) in enumerate(zip(num_samples, lengths.tolist(), strict=True)):
        alone = theirs(waveforms[b : b + 1, :n]).last_hidden_state[0]
        assert_close(alone, ours[b, :num_frames])
        assert_close(batch[b, :num_frames], ours[b, :num_frames])
        leaks = (leaking[b, :num_frames] - alone).abs().max() > 1e-3
        assert leaks == (num_frames < int(lengths.max())), "Transformers has changed: the documentation must, too"


def test_recordings_are_normalized_as_in_training(tmp_path: Path) -> None:
    from d2v_fast.modalities.speech.audio import normalized

    config = make_config(sample_rate=8_000)
    export_speech(build(config), config, tmp_path)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(extractor, transformers.Wav2Vec2FeatureExtractor)
    generator = np.random.default_rng(0)
    samples = [(generator.normal(size=n) * 0.1 + 0.02).astype(np.float32) for n in (700, 431)]
    inputs = extractor(samples, sampling_rate=8_000, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).tolist() == [700, 431]
    for values, wave in zip(inputs["input_values"], samples, strict=True):
        # at this loudness, the two epsilons (1e-7 and 1e-5) change values by a relative 5e-4
        torch.testing.assert_close(values[: len(wave)], normalized(wave), rtol=6e-4, atol=1e-6)
        assert values[len(wave) :].abs().sum() == 0
    loud = [10 * wave for wave in samples]
    inputs = extractor(loud, sampling_rate=8_000, padding=True, return_tensors="pt")
    for values, wave in zip(inputs["input_values"], loud, strict=True):
        torch.testing.assert_close(values[: len(wave)], normalized(wave), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="8000"):
        extractor(samples, sampling_rate=16_000)


def test_a_recognizer_learns(tmp_path: Path) -> None:
    """Fine-tune with CTC on four distinguishable utterances."""
    torch.manual_seed(0)
    np.random.seed(0)
    config = make_config()
    export_speech(SpeechModel(config.model), config, tmp_path)
    recognizer = transformers.Data2VecAudioForCTC.from_pretrained(
        tmp_path, vocab_size=6, pad_token_id=0, ctc_loss_reduction="mean", mask_time_length=2
    )
    waveforms, mask = padded_batch(700, 700, 640, 580)
    labels = torch.tensor([[1, 2, 3], [3, 2, 1], [4, 5, -100], [5, 4, -100]])
    optimizer = torch.optim.AdamW(recognizer.parameters(), lr=3e-3)
    losses = []
    recognizer.train()
    for _ in range(40):
        loss = recognizer(waveforms, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], losses


def test_large_weights_become_several_files(tmp_path: Path) -> None:
    config = make_config()
    model = build(config)
    export_speech(model, config, tmp_path, max_file_bytes=8_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_state_equal(import_speech(tmp_path)[0], model)
    assert_same_features(model, load_theirs(tmp_path))
    export_speech(model.to(torch.bfloat16), config, tmp_path, info={"weights": "student", "step": 5})
    names = ["README.md", "config.json", RECORD, "model.safetensors", "preprocessor_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    card = (tmp_path / "README.md").read_text()
    assert "| step | 5 |" in card
    assert '"modality": "speech"' in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "wav2vec2"},
            r'`model_type` in .* must be .*"data2vec-audio", "data2vec2-audio", .*, but is "wav2vec2"',
        ),
        ({"conv_bias": True}, r"`conv_bias` in .* must be false, but is true instead"),
        ({"add_adapter": True}, r"`add_adapter` in .* must be false"),
        ({"hidden_act": "relu"}, r'`hidden_act` in .* must be "gelu", but is "relu" instead'),
        ({"conv_dim": [8, 8, 16]}, r"`conv_dim` in .* must be one number, repeated, but is \[8, 8, 16\] instead"),
        ({"conv_kernel": [10, 3]}, r"`conv_kernel` in .* must be a list of 3 numbers, as `conv_dim` is"),
        ({"conv_stride": [5, 2]}, r"`conv_strides` must hold as many values as `conv_kernels`"),
        ({"conv_kernel": [10, 3, 3]}, r"conv_layers.2.conv.weight` must be \[8, 8, 3\], but is \[8, 8, 2\] instead"),
        ({"conv_pos_kernel_size": 4}, r"layers.0.conv.weight` must be \[24, \d+, 4\], but is"),
        ({"num_conv_pos_embeddings": 3}, r"`encoder.pos_conv_embed.layers.2.conv.weight` is missing"),
        ({"num_hidden_layers": 4}, r"`encoder.layers.3.[\w.]+` is missing"),
        ({"num_hidden_layers": 2}, r"`encoder.layers.2.[\w.]+` has no place in this encoder"),
        ({"num_attention_heads": 5}, "`heads` must divide `width`"),
        ({"hidden_size": "24"}, r'`hidden_size` in .* must be a whole number >= 1, but is "24" instead'),
        ({"intermediate_size": 90}, r"intermediate_dense.weight` must be \[90, 24\], but is \[96, 24\] instead"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(edited(tmp_path, **changes))


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    folder = edited(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["feature_projection.layer_norm.weight"]
    tensors["encoder.layer_norm.weight"] = torch.zeros(3)
    tensors["lm_head.weight\n"] = torch.zeros(10, 24)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        import_speech(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  `feature_projection.layer_norm.weight` is missing",
        "  `encoder.layer_norm.weight` must be [24], but is [3] instead",
        r"  `lm_head.weight\n` has no place in this encoder",
    ]


@pytest.mark.parametrize("content", [b"[", b'{"sampling_rate": "fast"}', b'{"sampling_rate": 1}'])
def test_broken_preprocessor(content: bytes, tmp_path: Path) -> None:
    folder = edited(tmp_path)
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"preprocessor_config.json|`sample_rate` must be in"):
        import_speech(folder)
