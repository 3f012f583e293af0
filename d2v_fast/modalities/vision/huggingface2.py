"""Image encoders of data2vec 2.0 as Transformers folders that carry their model's code.

Both compute the same features: `last_hidden_state` in Transformers is our `last_hidden`, class token first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_fast.config import MaskedVisionConfig, MaskedVisionModelConfig, VisionDataConfig
from d2v_fast.config.errors import Section
from d2v_fast.files.atomic import write_text
from d2v_fast.interop.folders import as_json
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.remote_folder import CODE, RemoteModel
from d2v_fast.modalities.vision.fairseq2 import MODEL
from d2v_fast.modalities.vision.huggingface import preprocessor_config
from d2v_fast.models.student import Student


def _card(config: MaskedVisionModelConfig) -> dict[str, Any]:
    blocks = config.context_depth + config.depth
    return {
        "title": f"data2vec 2.0 image encoder, {blocks} blocks of width {config.width}",
        "task": "image-feature-extraction",
        "tags": ["data2vec", "data2vec2", "self-supervised", "vision"],
        "text": """\
Pre-trained without labels: a student encodes the visible patches of an image, and a decoder predicts, at the masked
ones, the averaged upper layers of a teacher that is a moving average of the student and sees the whole image (data2vec
2.0, arXiv 2212.07525).""",
        "use": f"""\
Input: {config.channels} x {config.image_size} x {config.image_size} pixels, prepared by the image processor in this
folder; patches of {config.patch_size} x {config.patch_size}. Transformers has no such model, so this folder holds its
code, which `trust_remote_code=True` runs: read it before.

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
encoder = AutoModel.from_pretrained(".", trust_remote_code=True)
features = encoder(**processor(image, return_tensors="pt")).last_hidden_state  # class token first
```

To fine-tune a classifier on the normalized mean of the patch features:

```python
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(".", num_labels=10, trust_remote_code=True)
```""",
    }


REMOTE = RemoteModel(
    name="vision",
    title="Vision",
    heads={"AutoModelForImageClassification": "ForImageClassification"},
    model=MODEL,
    code=Path(__file__).parent / CODE,
    keys={"image_size": "image_size", "patch_size": "patch_size", "channels": "num_channels"},
    card=_card,
)


def export_masked_vision(
    model: Student | Mapping[str, Tensor],
    config: MaskedVisionConfig | MaskedVisionModelConfig,
    folder: str | os.PathLike[str],
    **options: Any,
) -> None:
    """Write a folder with an image processor.

    Args:
        model, folder, options: See `RemoteModel.write`.
        config: The run's configuration, or the model's if the run's is unknown: then images are prepared as for the
            published models.
    """
    sizes = config.model if isinstance(config, MaskedVisionConfig) else config
    data = config.data if isinstance(config, MaskedVisionConfig) else VisionDataConfig()
    scans = isinstance(config, MaskedVisionConfig) and data.kind == "digits"

    def write_processor(target: Path) -> None:
        write_text(target / "preprocessor_config.json", as_json(preprocessor_config(sizes, data, scans)))

    REMOTE.write(model, config, folder, more={}, files=write_processor, **options)


def import_masked_vision(
    folder: str | os.PathLike[str], *, decoder: Section | None = None
) -> tuple[Student, MaskedVisionModelConfig]:
    """Read a folder; see `RemoteModel.read`."""
    model, config = REMOTE.read(folder, {}, decoder)
    return model, config


FORMAT = HuggingFace(
    REMOTE.kind, export_masked_vision, import_masked_vision, lambda raw, wanted: {"decoder": wanted.decoder}
)
