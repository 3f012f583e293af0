"""Text encoders to and from Transformers: the same features, with and without padding, and the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from d2v_fast.commands.console import main
from d2v_fast.config import TextConfig, TextModelConfig
from d2v_fast.errors import DataError
from d2v_fast.files.outputs import RECORD
from d2v_fast.interop.huggingface import export_model, import_model
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.huggingface import export_text, import_text
from d2v_fast.modalities.text.tokenizer import load_tokenizer
from tests.helpers.speech_reference import randomize_
from tests.helpers.text_files import small_tokenizer
from tests.helpers.text_models import make_config
from tests.helpers.tokenizer_folders import tokenizer_with_padding_at
from tests.helpers.written_runs import write_run

transformers = pytest.importorskip("transformers")

TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "rates": {"dropout": 0.2, "attention_dropout": 0.3, "layer_drop": 0.1, "activation_dropout": 0.4},
    "odd": {"width": 30, "heads": 5, "mlp_ratio": 2.5, "norm_eps": 1e-3, "vocab_size": 77, "max_positions": 17},
}
THEIRS = {
    "vocab_size": 60,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 100,
    "max_position_embeddings": 20,
}


def build(config: TextConfig) -> TextModel:
    """Return an encoder with all parameters at random, even those that no text uses."""
    model = TextModel(config.model).eval()
    randomize_(model)
    return model


def load_theirs(folder: Path) -> Any:
    """Load a folder with Transformers, without the pooling layer, which pre-training lacks."""
    theirs, report = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert isinstance(theirs, transformers.Data2VecTextModel)
    assert not any(report.values()), report
    return theirs.eval()


@torch.no_grad()
def largest_difference(model: TextModel, theirs: Any, num_tokens: int | None = None) -> float:
    """Return the largest difference of features, over a full and a padded batch, at all valid positions."""
    T, pad = num_tokens or model.embedding.max_positions, theirs.config.pad_token_id
    first = max(4, pad + 1) if pad < 8 else 4
    tokens = torch.randint(first, min(theirs.config.vocab_size, 5000), (3, T))
    lengths = torch.tensor([T, T - 3, 2])
    valid = torch.arange(T) < lengths[:, None]
    model.eval()
    theirs.eval()
    whole = model(tokens).last_hidden - theirs(tokens).last_hidden_state
    padded = tokens.masked_fill(~valid, pad)
    hidden = theirs(padded, attention_mask=valid.long()).last_hidden_state
    # our encoder ignores the tokens after the end of a text
    behind = model(tokens, lengths).last_hidden - hidden
    return max(whole.abs().max().item(), behind[valid].abs().max().item())


def assert_same_features(model: TextModel, theirs: Any, num_tokens: int | None = None) -> None:
    error = largest_difference(model, theirs, num_tokens)
    assert error <= 1e-5, error


def assert_state_equal(first: nn.Module, second: nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_export_gives_the_same_features(sizes: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(**sizes)
    model = build(config)
    export_model(model, config, tmp_path)
    theirs = load_theirs(tmp_path)
    assert_same_features(model, theirs)
    assert theirs.config.hidden_dropout_prob == config.model.dropout
    assert theirs.config.attention_probs_dropout_prob == config.model.attention_dropout
    assert (theirs.config.max_position_embeddings, theirs.config.type_vocab_size) == (config.model.position_rows, 1)
    imported, found = import_model(tmp_path)
    # rates that the folder does not hold
    assert found == config.model.model_copy(update={"layer_drop": 0.0, "activation_dropout": 0.0})
    assert isinstance(imported, TextModel)
    assert imported.training
    assert all(parameter.requires_grad for parameter in imported.parameters())
    assert_state_equal(imported, model)


@pytest.mark.slow
def test_base_size_agrees_both_ways(tmp_path: Path) -> None:
    config = TextConfig()
    model = build(config)
    export_text(model, config, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    published = {"vocab_size": 50_265, "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    assert raw.items() >= published.items()
    assert_same_features(model, load_theirs(tmp_path), 24)
    imported, found = import_text(tmp_path)
    assert found == config.model.model_copy(update={"vocab_size": 50_265, "padding_id": 1})
    assert_state_equal(imported, model)


@pytest.mark.parametrize(
    "around", ["Data2VecTextModel", "Data2VecTextForMaskedLM", "Data2VecTextForSequenceClassification"]
)
def test_import_what_transformers_saved(around: str, tmp_path: Path) -> None:
    """Import folds the embedding of token type 0 into the positions."""
    theirs = getattr(transformers, around)(transformers.Data2VecTextConfig(**THEIRS))
    randomize_(theirs)
    theirs.save_pretrained(tmp_path)
    model, config = import_text(tmp_path)
    expected = {"vocab_size": 60, "max_positions": 18, "width": 36, "depth": 2, "heads": 3, "norm_eps": 1e-12}
    assert config.model_dump().items() >= expected.items()
    assert int(config.width * config.mlp_ratio) == 100
    inner = getattr(theirs, "data2vec_text", theirs)
    assert_same_features(model, inner)
    # after export again, the type embedding is zero and the features are the same
    export_text(model, config, tmp_path / "back")
    again = load_theirs(tmp_path / "back")
    assert not again.embeddings.token_type_embeddings.weight.any()
    assert_same_features(model, again)
    assert_state_equal(import_text(tmp_path / "back")[0], model)


@pytest.mark.parametrize("pad", [0, 3, 7])
def test_another_padding_token(pad: int, tmp_path: Path) -> None:
    """Transformers counts positions from the padding id."""
    config = make_config(padding_id=pad)
    model = build(config)
    tokenizer = tokenizer_with_padding_at(pad, tmp_path / "tokenizer")
    assert tokenizer.specials.pad == pad
    export_text(model, config, tmp_path, tokenizer=tokenizer)
    theirs = load_theirs(tmp_path)
    assert theirs.config.pad_token_id == pad
    assert theirs.config.max_position_embeddings == config.model.max_positions + pad + 1
    assert_same_features(model, theirs)
    imported, found = import_text(tmp_path)
    assert found == config.model
    # all rows that a token can have
    reached = slice(1 if pad == 0 else 0, None)
    assert torch.equal(imported.embedding.position[reached], model.embedding.position[reached])
    assert_same_features(imported, theirs)
    # an export without a tokenizer keeps the padding id
    export_text(imported, found, tmp_path / "again")
    again = load_theirs(tmp_path / "again")
    assert_same_features(imported, again)
    assert (again.config.bos_token_id, again.config.eos_token_id) == (None, None)


def test_padding_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    config = make_config(padding_id=1)
    tokenizer = tokenizer_with_padding_at(0, tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"`d2v.model.padding_id` must be 0, the padding token of .*, but is 1 instead"):
        export_text(build(config), config, tmp_path / "out", tokenizer=tokenizer)


def test_tokenizer_and_classifier_start_from_the_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    config = make_config(vocab_size=tokenizer.vocab_size + 4)
    export_text(TextModel(config.model), config, tmp_path, tokenizer=tokenizer, info={"weights": "student"})
    card = (tmp_path / "README.md").read_text()
    assert "| weights | student |" in card
    assert 'AutoTokenizer.from_pretrained(".")' in card
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == config.model.max_positions
    texts = ["the student reads", "every word", "what the teacher made of it", "numbers count", "a sentence"] * 2
    inputs = theirs(texts, padding=True, truncation=True, return_tensors="pt")
    for row, mask, text in zip(inputs["input_ids"], inputs["attention_mask"], texts, strict=True):
        ids, _ = tokenizer.encode([text])
        assert row[mask.bool()].tolist() == [0, *ids.tolist(), 2][: int(mask.sum())]
        assert (row[~mask.bool()] == 1).all()

    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert torch.equal(
        classifier.data2vec_text.embeddings.word_embeddings.weight, import_text(tmp_path)[0].embedding.token.weight
    )
    labels = torch.tensor(["the" in text for text in texts]).long()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    losses = []
    classifier.train()
    for _ in range(30):
        loss = classifier(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0], losses


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    config = make_config(vocab_size=359)
    with pytest.raises(DataError, match=r"`d2v.model.vocab_size` must be >= 360, the tokens of .*, but is 359 instead"):
        export_text(build(config), config, tmp_path / "out", tokenizer=small_tokenizer())
    assert not (tmp_path / "out").exists()


def test_large_weights_become_several_files(tmp_path: Path) -> None:
    config = make_config()
    model = build(config)
    export_text(model, config, tmp_path, max_file_bytes=8_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_state_equal(import_text(tmp_path)[0], model)
    assert_same_features(model, load_theirs(tmp_path))
    export_text(model.to(torch.bfloat16), config, tmp_path, info={"weights": "student", "step": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", RECORD, "model.safetensors"]
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    card = (tmp_path / "README.md").read_text()
    assert "The tokenizer is not in this folder" in card
    assert '"modality": "text"' in card


def run_of(folder: Path, **data: Any) -> tuple[TextConfig, nn.Module]:
    """Write a text run with one checkpoint whose average is 2 x the student."""
    config = make_config(vocab_size=360)
    config = TextConfig.model_validate({**config.model_dump(), "data": {"block_size": 16, **data}})
    return config, write_run(folder, config, 2).student


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_export_of_a_run(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export holds the whole encoder and the run's tokenizer; the model card shows no path."""
    (tmp_path / "given").mkdir()
    small_tokenizer().save(tmp_path / "given")
    _, student = run_of(tmp_path / "r", kind="text", path="/somewhere", tokenizer=str(tmp_path / "given"))
    assert main(["export", str(tmp_path / "r"), "--weights", weights]) == 0
    assert f"({weights}, step 7, for Transformers)" in capsys.readouterr().out
    folder = tmp_path / "r" / ("export" if weights == "student" else "export-teacher")
    imported, _ = import_text(folder)
    for name, value in student.named_parameters():
        factor = 2 if weights == "teacher" and name.startswith("context.") else 1
        assert torch.equal(imported.state_dict()[name], factor * value), name
    assert load_tokenizer(folder).digest == small_tokenizer().digest
    assert str(tmp_path) not in (folder / "README.md").read_text()

    (tmp_path / "given").rename(tmp_path / "moved")
    assert main(["export", str(tmp_path / "r"), "--to", str(tmp_path / "out")]) == 1
    assert "If the run's tokenizer has moved, name it with `--tokenizer`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    moved = ["--tokenizer", str(tmp_path / "moved")]
    assert main(["export", str(tmp_path / "r"), "--to", str(tmp_path / "out"), *moved]) == 0
    assert load_tokenizer(tmp_path / "out").digest == small_tokenizer().digest
    assert main(["export", str(tmp_path / "r"), "--format", "fairseq", *moved]) == 2
    assert "`--tokenizer` is for text runs, and for Transformers" in capsys.readouterr().err


def test_export_of_a_run_on_the_sample_set(tmp_path: Path) -> None:
    run_of(tmp_path / "r", kind="docs", tokens_path=str(tmp_path / "tokens"))
    assert main(["export", str(tmp_path / "r"), "--to", str(tmp_path / "out")]) == 0
    assert load_tokenizer(tmp_path / "out").vocab_size == 360
    assert len(list((tmp_path / "tokens").glob("docs-*"))) == 1


def edited(tmp_path: Path, **changes: Any) -> Path:
    """Export a folder and change its `config.json`."""
    config = make_config()
    export_text(build(config), config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "roberta"},
            r'`model_type` in .* must be .*"data2vec-text" or "data2vec2-text", but is "roberta" instead',
        ),
        ({"hidden_act": "relu"}, r'`hidden_act` in .* must be "gelu", but is "relu" instead'),
        ({"position_embedding_type": "relative_key"}, r'must be "absolute", but is "relative_key" instead'),
        ({"is_decoder": True}, r"`is_decoder` in .* must be false, but is true instead"),
        ({"add_cross_attention": True}, r"`add_cross_attention` in .* must be false"),
        ({"pad_token_id": None}, r"`pad_token_id` in .* must be a whole number >= 0, but is null instead"),
        ({"pad_token_id": 17}, r"`max_position_embeddings` in .* must be >= 22, .* but is 18 instead"),
        ({"max_position_embeddings": 20}, r"position_embeddings.weight` must be \[20, 24\], but is \[18, 24\] instead"),
        ({"vocab_size": 51}, r"word_embeddings.weight` must be \[51, 24\], but is \[50, 24\] instead"),
        ({"type_vocab_size": 2}, r"token_type_embeddings.weight` must be \[2, 24\], but is \[1, 24\] instead"),
        ({"type_vocab_size": 0}, r"`type_vocab_size` in .* must be a whole number >= 1, but is 0 instead"),
        ({"num_hidden_layers": 4}, r"`encoder.layer.3.[\w.]+` is missing"),
        ({"num_hidden_layers": 2}, r"`encoder.layer.2.[\w.]+` has no place in this encoder"),
        ({"num_attention_heads": 5}, "`heads` must divide `width`"),
        ({"hidden_size": "24"}, r'`hidden_size` in .* must be a whole number >= 1, but is "24" instead'),
        ({"intermediate_size": 90}, r"intermediate.dense.weight` must be \[90, 24\], but is \[96, 24\] instead"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(edited(tmp_path, **changes))


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    folder = edited(tmp_path)
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    del tensors[TOKEN_TYPES]
    tensors["embeddings.LayerNorm.weight"] = torch.zeros(3)
    tensors["lm_head.bias\n"] = torch.zeros(10)
    tensors["pooler.dense.weight"] = torch.zeros(24, 24)
    tensors["embeddings.position_ids"] = torch.arange(18)[None]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit") as caught:
        import_text(folder)
    assert str(caught.value).splitlines()[1:] == [
        "  `embeddings.LayerNorm.weight` must be [24], but is [3] instead",
        f"  `{TOKEN_TYPES}` is missing",
        r"  `lm_head.bias\n` has no place in this encoder",
    ]


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    """The model's configuration suffices if it is unknown how the model was trained."""
    config = make_config()
    model = build(config)
    export_model(model, config.model, tmp_path)
    assert "How it was pre-trained" not in (tmp_path / "README.md").read_text()
    assert isinstance(import_text(tmp_path)[1], TextModelConfig)
    assert_same_features(model, load_theirs(tmp_path))
