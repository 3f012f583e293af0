"""Fine-tuned models of text as Transformers folders: the encoder with its head, in both versions of the encoder.

The heads are those of `Data2VecTextForSequenceClassification`, which reads the begin token, and of the classes whose
code a folder carries: that of data2vec 2.0, and that of the mean of the tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.interop.folders import read_model_config
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.heads import HeadPart, SavedHead, class_keys, read_head
from d2v_fast.interop.remote_folder import CODE
from d2v_fast.modalities.text import huggingface, huggingface2
from d2v_fast.modalities.text.config_finetune import TextClassifyConfig, TextFinetuneConfig

__all__ = ["FORMAT", "export_fine_tuned", "head_of_folder"]

# our names of the head's tensors and theirs
_NAMES = {
    f"{own}.{kind}": f"classifier.{theirs}.{kind}"
    for own, theirs in (("dense", "dense"), ("out", "out_proj"))
    for kind in ("weight", "bias")
}


# the folder of the first version that carries the code of its head, and loads with no other one
_MEAN_CLASS = "Data2VecTextMeanForSequenceClassification"
_MEAN_CODE = tuple(
    Path(__file__).parent / CODE / f"{begin}_data2vec_text_mean.py" for begin in ("configuration", "modeling")
)
_MEAN_KEYS = {
    "architectures": [_MEAN_CLASS],
    "model_type": huggingface.MEAN_KIND,
    "auto_map": {
        "AutoConfig": "configuration_data2vec_text_mean.Data2VecTextMeanConfig",
        "AutoModelForSequenceClassification": f"modeling_data2vec_text_mean.{_MEAN_CLASS}",
    },
}


def export_fine_tuned(
    model: SavedWeights, config: TextFinetuneConfig, folder: str | os.PathLike[str], **options: Any
) -> None:
    """Write a folder that `pipeline("text-classification")` reads.

    Args:
        model: Encoder and head.
        config: The run's section.
        folder, options: See `huggingface.export_text`.
    """
    write: Callable[..., None]
    if config.encoder == "data2vec":
        write, prefix, kind = huggingface.export_text, huggingface.BASE_PREFIX, "Data2VecText"
    else:
        write, prefix, kind = huggingface2.export_masked_text, huggingface2.REMOTE.prefix, "Data2Vec2Text"
    labels = config.labels if isinstance(config, TextClassifyConfig) else None
    saved, pooling = model.head(), config.head.pooling
    keys: dict[str, Any] = {"architectures": [f"{kind}ForSequenceClassification"]}
    code: tuple[Path, ...] = ()
    if config.encoder != "data2vec":
        keys["pooling"] = pooling
    elif pooling == "mean":
        keys, code = _MEAN_KEYS, _MEAN_CODE
    head = HeadPart(
        prefix,
        {theirs: saved[own] for own, theirs in _NAMES.items()},
        {**keys, **class_keys(labels), "classifier_dropout": config.head.dropout},
        _card(config, labels),
        code,
    )
    write(model, config, folder, head=head, **options)


def head_of_folder(folder: Path) -> SavedHead | None:
    """Return the head in a folder that Transformers or `export_fine_tuned` wrote; None if there is none."""
    raw = read_model_config(folder)
    is_mean = raw.get("model_type") == huggingface.MEAN_KIND or raw.get("pooling") == "mean"
    found = read_head(folder, _NAMES)
    return None if found is None else replace(found, keys={"pooling": "mean" if is_mean else "token"})


def _import(folder: str | os.PathLike[str], **options: Any) -> Any:
    kind = read_model_config(Path(folder)).get("model_type")
    read = huggingface2.import_masked_text if kind == huggingface2.REMOTE.kind else huggingface.import_text
    return read(folder, **options)


def _card(config: TextFinetuneConfig, labels: tuple[str, ...] | None) -> dict[str, Any]:
    pairs = config.data.pair_field is not None
    what = "pairs of texts" if pairs else "texts"
    task = f"tells {len(labels)} classes of {what} apart" if labels is not None else f"scores {what}"
    second, uses_mean = config.encoder != "data2vec", config.head.pooling == "mean"
    carries = second or uses_mean
    trust = ", trust_remote_code=True" if carries else ""
    code = " The folder holds the model's code, which `trust_remote_code=True` runs: read it before." if carries else ""
    text = '{"text": "the first text", "text_pair": "the second one"}' if pairs else '"a text"'
    data = "reference pages of Python" if config.data.kind == "docs" else config.data.glue or "a table of the user's"
    return {
        "title": f"data2vec text model that {task}",
        "task": "text-classification",
        "tags": ["data2vec", "text", "text-classification"],
        "text": f"""\
An encoder of {"data2vec 2.0 (arXiv 2212.07525)" if second else "data2vec (arXiv 2202.03555)"} that was fine-tuned by
d2v_fast on labeled {what}, with a head on {"the mean of the tokens" if uses_mean else "the begin token"}.
Data: {data}.""",
        "use": f"""\
Input: up to {config.data.block_size} tokens, begin and end token included.{code}

```python
from transformers import pipeline

classify = pipeline("text-classification", "."{trust})
classify({text}, truncation=True, max_length={config.data.block_size})
```""",
    }


FORMAT = HuggingFace(
    huggingface.KIND,
    export_fine_tuned,
    _import,
    vocabulary=huggingface.vocabulary,
    head=head_of_folder,
    more_kinds=(huggingface.MEAN_KIND,),
)
