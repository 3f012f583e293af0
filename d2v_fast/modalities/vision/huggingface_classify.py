"""Write classifiers of images as Transformers folders, and read the head of such a folder.

`pipeline("image-classification")` runs them. An encoder of the first version becomes a
`Data2VecVisionForImageClassification`; one of data2vec 2.0 carries its model's code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.config import VisionModelConfig
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import model_folder
from d2v_fast.interop.folders import MAX_WEIGHTS_BYTES, as_json, model_card, read_model_config, write_weights
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.heads import HeadPart, SavedHead, class_keys, read_head
from d2v_fast.modalities.vision.config_finetune import VisionClassifyConfig
from d2v_fast.modalities.vision.huggingface import (
    BASE_PREFIX,
    KIND,
    NAMES,
    foreign_config,
    import_vision,
    layout,
    preprocessor_config,
)
from d2v_fast.modalities.vision.huggingface2 import REMOTE, import_masked_vision

__all__ = ["FORMAT", "export_classifier", "head_of_folder"]


def export_classifier(
    model: SavedWeights,
    config: VisionClassifyConfig,
    folder: str | os.PathLike[str],
    *,
    info: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_WEIGHTS_BYTES,
) -> None:
    """Write `config.json`, the weights (fp32), `preprocessor_config.json` and a model card.

    Args:
        model: Encoder and head.
        config: The run's section.
        folder: Created if missing. Files of an earlier export are replaced; see `model_folder`.
        info: Facts for the model card.
        max_file_bytes: Larger weights are split into several files with an index.
    """
    head = _head(model, config)

    def write_processor(target: Path) -> None:
        processor = preprocessor_config(config.model, config.data, config.data.kind == "digits")
        write_text(target / "preprocessor_config.json", as_json(processor))

    sizes = config.model
    if not isinstance(sizes, VisionModelConfig):
        options: dict[str, Any] = {"info": info, "max_file_bytes": max_file_bytes, "head": head}
        REMOTE.write(model, config, folder, more={}, files=write_processor, **options)
        return
    whole = layout(sizes)
    # the head's norm takes the place of the encoder's last one
    names = {own: theirs for own, theirs in whole.names.items() if not own.startswith("norm.")}
    whole, state = head.around(replace(whole, names=names), model)
    with model_folder(folder) as target:
        write_weights(target, whole, state, max_file_bytes)
        write_text(target / "README.md", model_card(**head.card, info=info or {}, config=config))
        write_processor(target)
        write_text(target / "config.json", as_json({**foreign_config(sizes), **head.config}))


def head_of_folder(folder: Path) -> SavedHead | None:
    """Return the head in a folder that Transformers or `export_classifier` wrote; None if there is none."""
    raw = read_model_config(folder)
    is_first = raw.get("model_type") == KIND
    uses_mean = bool(raw.get("use_mean_pooling", True)) if is_first else raw.get("pooling", "mean") == "mean"
    found = read_head(folder, _names(is_first, uses_mean))
    return None if found is None else replace(found, keys={"pooling": "mean" if uses_mean else "token"})


def _names(is_first: bool, uses_mean: bool) -> dict[str, str]:
    """Return our names of the head's tensors, and theirs."""
    norm, classifier = "fc_norm", "head"
    if is_first:
        # of the pooled patches, or the encoder's last norm, before the class token is chosen
        norm, classifier = f"{BASE_PREFIX}{'pooler.layernorm' if uses_mean else NAMES.norm}", "classifier"
    modules = {"norm": norm, "classifier": classifier}
    return {f"{own}.{kind}": f"{theirs}.{kind}" for own, theirs in modules.items() for kind in ("weight", "bias")}


def _head(model: SavedWeights, config: VisionClassifyConfig) -> HeadPart:
    is_first, uses_mean = config.encoder == "data2vec", config.head.pooling == "mean"
    pooling = {"use_mean_pooling": uses_mean} if is_first else {"pooling": config.head.pooling}
    kind = "Data2VecVision" if is_first else "Data2Vec2Vision"
    saved = model.head()
    return HeadPart(
        BASE_PREFIX if is_first else REMOTE.prefix,
        {theirs: saved[own] for own, theirs in _names(is_first, uses_mean).items()},
        {"architectures": [f"{kind}ForImageClassification"], **class_keys(config.labels), **pooling},
        _card(config),
    )


def _import(folder: str | os.PathLike[str], **options: Any) -> Any:
    kind = read_model_config(Path(folder)).get("model_type")
    return (import_masked_vision if kind == REMOTE.kind else import_vision)(folder, **options)


def _card(config: VisionClassifyConfig) -> dict[str, Any]:
    model, labels = config.model, config.labels or ()
    is_first = isinstance(model, VisionModelConfig)
    code = "" if is_first else ", trust_remote_code=True"
    paper = " (arXiv 2202.03555)" if is_first else " 2.0 (arXiv 2212.07525)"
    pooled = "the mean of the patches" if config.head.pooling == "mean" else "the class token"
    return {
        "title": f"Classifier of images, {len(labels)} classes",
        "task": "image-classification",
        "tags": ["data2vec", *([] if is_first else ["data2vec2"]), "vision"],
        "text": f"""\
An encoder that was pre-trained without labels by data2vec{paper}, fine-tuned on labeled images with a
norm and a linear map of {pooled}.""",
        "use": f"""\
Input: {model.channels} x {model.image_size} x {model.image_size} pixels, prepared by the image processor in this
folder.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="."{code})
print(classify("image.png"))
```""",
    }


FORMAT = HuggingFace(KIND, export_classifier, _import, head=head_of_folder)
