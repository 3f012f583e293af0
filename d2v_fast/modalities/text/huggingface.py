"""Text encoders as Hugging Face Transformers folders, in both directions, without importing Transformers.

`export_text` writes a folder that `Data2VecTextModel.from_pretrained` reads, and `import_text` reads it back. Both
libraries compute the same features: `last_hidden_state` in Transformers equals `last_hidden` here, also for batches
padded at the end of each text. Documents that do not attend to each other (`data.separate_documents`) must be separate
rows in Transformers.

Two tensors differ. Transformers counts positions from the padding id, `pad + 1` for the first token, with that many
unused rows in front; here the first token has row 2, which is the same table if the padding id is 1, as in RoBERTa.
Transformers also adds the embedding of a token type, which this encoder lacks. The export writes zeros for it, and the
import adds the embedding of type 0 to all position rows, so that the features stay the same.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from d2v_fast.config import ConfigError, TextConfig, TextModelConfig
from d2v_fast.config.errors import check, show
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import model_folder
from d2v_fast.interop.folders import (
    MAX_WEIGHTS_BYTES,
    as_json,
    mlp_ratio,
    model_card,
    read_model_config,
    read_weights,
    require_values,
    whole_number,
    write_code,
    write_weights,
)
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.heads import HeadPart
from d2v_fast.interop.layout import Layout, log_unused, within
from d2v_fast.modalities.text.config import MAX_VOCAB, POSITION_OFFSET
from d2v_fast.modalities.text.config_finetune import TextFinetuneConfig
from d2v_fast.modalities.text.encoder import TextModel
from d2v_fast.modalities.text.layout import POSITION, TextNames, text_layout
from d2v_fast.models.student import Student

if TYPE_CHECKING:
    from d2v_fast.modalities.text.tokenizer import Tokenizer

KIND = "data2vec-text"
# of a model whose head reads the mean of the tokens, for which Transformers has no class
MEAN_KIND = "data2vec-text-mean"
# prefix of all names in a model around the encoder, such as a classifier
BASE_PREFIX = "data2vec_text."
# tensors of a base model that the encoder does not use: the pooling layer, and buffers of older versions
IGNORED_PREFIX = "pooler."
IGNORED_BUFFERS = frozenset({"embeddings.position_ids", "embeddings.token_type_ids"})

NAMES = TextNames(
    token="embeddings.word_embeddings.weight",
    position="embeddings.position_embeddings.weight",
    norm="embeddings.LayerNorm",
    block="encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    fc1="intermediate.dense",
    fc2="output.dense",
    mlp_norm="output.LayerNorm",
)
# row of a padding token in our position table
_PADDING_ROW = POSITION_OFFSET - 1
# a stand-in for a tensor that this encoder does not have
_TOKEN_TYPES = "embedding.token_types"
_THEIR_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


def export_text(
    model: Student | Mapping[str, Tensor],
    config: TextConfig | TextFinetuneConfig | TextModelConfig,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    info: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_WEIGHTS_BYTES,
    head: HeadPart | None = None,
) -> None:
    """Write `config.json`, the weights (fp32), the tokenizer and a model card.

    Args:
        model: Student or whole teacher, on any device and in any dtype, or its state by name. With a mapping that
            reads each tensor on access, at most one file of tensors is in memory at a time.
        config: The run's configuration, or the model's alone if it is unknown how the model was trained.
        folder: Created if missing; files of an earlier export are replaced, see `model_folder`.
        tokenizer: The tokenizer that the model was trained with. None writes no tokenizer and leaves one that is in
            the folder; `config` then gives the padding id, and begin and end have RoBERTa's ids if padding has.
        info: Facts for the model card, such as `{"weights": "teacher", "step": 750}`.
        max_file_bytes: Split larger weights into several files with an index, as Transformers does.
        head: The head of a fine-tuned model; None writes the encoder alone.
    Raises:
        ValueError: The tokenizer has more tokens than the model, or another padding token. Nothing has been written.
    """
    sizes = config if isinstance(config, TextModelConfig) else cast("TextModelConfig", config.model)
    bos, pad, eos = (0, 1, 2) if sizes.padding_row == 1 else (None, sizes.padding_row, None)
    if tokenizer is not None:
        tokenizer.fit(sizes)
        bos, pad, eos = tokenizer.specials.bos, tokenizer.specials.pad, tokenizer.specials.eos
    state = model if isinstance(model, Mapping) else model.state_dict()
    own = {POSITION: _their_positions(state[POSITION], pad), _TOKEN_TYPES: torch.zeros(1, sizes.width)}
    # the cast is safe: a ChainMap writes only to its first map
    whole: Mapping[str, Tensor] = ChainMap(own, cast("dict[str, Tensor]", state))
    names, tensors = _with_token_types(layout(sizes)), whole
    if head is not None:
        names, tensors = head.around(names, whole)
    with model_folder(folder) as target:
        write_weights(target, names, tensors, max_file_bytes)
        write_text(target / "README.md", _model_card(config, sizes, info or {}, tokenizer is not None, head))
        if tokenizer is not None:
            tokenizer.save(target, sizes.max_positions)
        write_code(target, () if head is None else head.code)
        foreign = _foreign_config(sizes, bos, pad, eos)
        write_text(target / "config.json", as_json(foreign if head is None else {**foreign, **head.config}))


def import_text(folder: str | os.PathLike[str]) -> tuple[TextModel, TextModelConfig]:
    """Read a folder that holds a `Data2VecTextModel`, or a model around one.

    Args:
        folder: A folder with `config.json` and `model.safetensors`, or several weight files and their index. A
            tokenizer in it is not read; load it with `load_tokenizer(folder)`.
    Returns:
        The model, fp32 on the CPU, in training mode, and its configuration. Values that the folder does not hold, such
        as the dropout inside the MLP, are those of the published recipe.
    Raises:
        ValueError: The architecture differs, or tensors are missing, unknown or misshapen.
    """
    source = Path(folder)
    path = str(source / "config.json")
    raw = read_model_config(source)
    pad = padding_id(raw, path)
    config = _own_config(raw, pad, path)
    num_types = whole_number(raw, "type_vocab_size", 2, path)
    theirs, weights_path = read_weights(source)
    theirs = within(theirs, BASE_PREFIX, f"`{weights_path}`")
    log_unused([name for name in theirs if name.startswith(IGNORED_PREFIX)], f"`{weights_path}`")
    _with_token_types(layout(config)).require_finite(theirs, f"`{weights_path}`")
    shapes = {
        POSITION: (config.max_positions + pad + 1, config.width),
        _TOKEN_TYPES: (num_types, config.width),
    }

    def arrange(state: dict[str, Tensor]) -> None:
        kind = state.pop(_TOKEN_TYPES)[0]
        state[POSITION] = _own_positions(state[POSITION], pad)
        if kind.any():
            state[POSITION] = state[POSITION] + kind

    what = f"`{weights_path}` does not fit its `config.json`"
    return build_text(config, _with_token_types(layout(config)), theirs, what, _is_ignored, shapes, arrange), config


def build_text(
    config: TextModelConfig,
    layout: Layout,
    theirs: Mapping[str, Tensor],
    what: str,
    ignored: Callable[[str], bool] = lambda name: False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    arrange: Callable[[dict[str, Tensor]], None] = lambda state: None,
) -> TextModel:
    """Build a model from another library's weights, in training mode.

    Args:
        config: The model's configuration.
        layout: The map from our tensors to theirs.
        theirs: Their tensors by name.
        what: Subject of the error message.
        ignored: Whether to ignore a tensor of theirs, by its name.
        shapes: Shapes of their tensors that differ from ours, by our names.
        arrange: Convert a state with these shapes to this encoder's, in place.
    Raises:
        Misfit: Tensors are missing, unknown or misshapen. No memory of the model's size has been allocated.
    """
    with torch.device("meta"):
        model = TextModel(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = layout.ours(theirs, {**expected, **(shapes or {})}, what, ignored)
    arrange(state)
    model.load_state_dict(state, assign=True)
    return model


def layout(config: TextModelConfig) -> Layout:
    """Return the map from our tensors to Transformers', without token types."""
    return text_layout(config, NAMES)


def _with_token_types(layout: Layout) -> Layout:
    return replace(layout, names={**layout.names, _TOKEN_TYPES: (_THEIR_TOKEN_TYPES,)})


def _is_ignored(name: str) -> bool:
    return name.startswith(IGNORED_PREFIX) or name in IGNORED_BUFFERS


def _their_positions(own: Tensor, pad: int) -> Tensor:
    """Convert our position table `[T + 2, D]` to theirs, `[T + pad + 1, D]`, in which padding has row `pad`."""
    if pad < _PADDING_ROW:
        return own[_PADDING_ROW - pad :]
    return own if pad == _PADDING_ROW else torch.cat([own.new_zeros(pad - _PADDING_ROW, own.shape[1]), own])


def _own_positions(theirs: Tensor, pad: int) -> Tensor:
    """Invert `_their_positions`; rows that they lack are zero."""
    if pad >= _PADDING_ROW:
        return theirs[pad - _PADDING_ROW :]
    return torch.cat([theirs.new_zeros(_PADDING_ROW - pad, theirs.shape[1]), theirs])


def _foreign_config(config: TextModelConfig, bos: int | None, pad: int, eos: int | None) -> dict[str, Any]:
    return {
        "architectures": ["Data2VecTextModel"],
        "model_type": KIND,
        "dtype": "float32",
        "vocab_size": config.token_rows,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_positions + pad + 1,
        "type_vocab_size": 1,
        "initializer_range": 0.02,
        "layer_norm_eps": config.norm_eps,
        "bos_token_id": bos,
        "pad_token_id": pad,
        "eos_token_id": eos,
        "classifier_dropout": None,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }


def padding_id(raw: Mapping[str, Any], path: str) -> int:
    """Return the id of the padding token in a `config.json`.

    Raises:
        ValueError: It is not a whole number in the range of ids.
    """
    pad = raw.get("pad_token_id", 1)
    if type(pad) is not int or not 0 <= pad < MAX_VOCAB:
        raise ValueError(f"`pad_token_id` in {path} must be a whole number >= 0, but is {show(pad)} instead.")
    return pad


def _own_config(raw: Mapping[str, Any], pad: int, path: str) -> TextModelConfig:
    """Return the model's configuration from that of Transformers, whose defaults apply to missing keys."""
    required = {
        "model_type": MEAN_KIND if raw.get("model_type") == MEAN_KIND else KIND,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    require_values(raw, required, {key: value for key, value in required.items() if key != "model_type"}, path)
    width = whole_number(raw, "hidden_size", 768, path)
    num_rows = whole_number(raw, "max_position_embeddings", 512, path)
    if num_rows < pad + 5:
        must = f"be >= {pad + 5}, which is 4 positions and the rows up to that of the padding token, {pad},"
        raise ValueError(f"`max_position_embeddings` in {path} must {must}, but is {num_rows} instead.")
    config, problems = check(
        TextModelConfig,
        {
            "vocab_size": whole_number(raw, "vocab_size", 30_522, path),
            "padding_id": pad,
            "max_positions": num_rows - pad - 1,
            "width": width,
            "depth": raw.get("num_hidden_layers", 12),
            "heads": raw.get("num_attention_heads", 12),
            "mlp_ratio": mlp_ratio(width, whole_number(raw, "intermediate_size", 3072, path)),
            "dropout": raw.get("hidden_dropout_prob", 0.1),
            "attention_dropout": raw.get("attention_probs_dropout_prob", 0.1),
            "norm_eps": raw.get("layer_norm_eps", 1e-12),
        },
    )
    if config is None:
        raise ConfigError(problems, path)
    return config


def _model_card(
    config: TextConfig | TextFinetuneConfig | TextModelConfig,
    model: TextModelConfig,
    info: Mapping[str, object],
    has_tokenizer: bool,
    head: HeadPart | None,
) -> str:
    if head is not None:
        return model_card(**head.card, info=info, config=config)
    by = "by d2v_fast: a student" if isinstance(config, TextConfig) else "with data2vec: a student"
    where = "." if has_tokenizer else "TOKENIZER"
    missing = "" if has_tokenizer else " The tokenizer is not in this folder: use the run's tokenizer (TOKENIZER)."
    return model_card(
        title=f"data2vec text encoder, {model.depth} blocks of width {model.width}",
        task="feature-extraction",
        tags=["data2vec", "self-supervised", "text"],
        text=f"""\
Pre-trained without labels {by} predicts, at masked tokens, the averaged upper layers of a
teacher that is a moving average of the student and reads the whole text (data2vec, arXiv 2202.03555).""",
        use=f"""\
Input: up to {model.max_positions} tokens, begin and end token included, padded at the end.{missing}

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{where}")
encoder = AutoModel.from_pretrained(".", add_pooling_layer=False)
inputs = tokenizer(["one text", "and another one"], padding=True, truncation=True, return_tensors="pt")
features = encoder(**inputs).last_hidden_state
```

Pre-training has no pooling layer. If you add one, Transformers initializes it at random.

To fine-tune for text classification:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(".", num_labels=2)
```""",
        info=info,
        config=config,
    )


def vocabulary(folder: Path) -> str | None:
    """Return the digest of the tokenizer in a folder; None if there is none."""
    from d2v_fast.modalities.text.tokenizer import load_tokenizer

    return load_tokenizer(folder).digest if (folder / "tokenizer.json").is_file() else None


FORMAT = HuggingFace(KIND, export_text, import_text, vocabulary=vocabulary, more_kinds=(MEAN_KIND,))
