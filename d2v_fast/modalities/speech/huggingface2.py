"""Speech encoders of data2vec 2.0 as Transformers folders that carry their model's code.

Both compute the same features: `last_hidden_state` in Transformers is our `last_hidden`, also of padded recordings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from d2v_fast.config import MaskedSpeechConfig, MaskedSpeechModelConfig
from d2v_fast.config.errors import Section
from d2v_fast.files.atomic import write_text
from d2v_fast.interop.folders import as_json
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.remote_folder import CODE, RemoteModel
from d2v_fast.modalities.speech.config_finetune import SpeechFinetuneConfig
from d2v_fast.modalities.speech.fairseq2 import MODEL
from d2v_fast.modalities.speech.huggingface import NO_FILES, preprocessor_config, sample_rate_of
from d2v_fast.models.student import Student


def _card(config: MaskedSpeechModelConfig) -> dict[str, Any]:
    blocks = config.context_depth + config.depth
    return {
        "title": f"data2vec 2.0 speech encoder, {blocks} blocks of width {config.width}",
        "task": "feature-extraction",
        "tags": ["data2vec", "data2vec2", "self-supervised", "audio", "speech"],
        "text": """\
Pre-trained without labels: a student encodes the visible frames of a recording, and a decoder predicts, at the masked
ones, the averaged upper layers of a teacher that is a moving average of the student and hears the whole recording
(data2vec 2.0, arXiv 2212.07525).""",
        "use": f"""\
Input: mono recordings at {config.sample_rate:,} Hz, normalized by the feature extractor in this folder. The encoder
returns one frame per {config.hop} samples. Transformers has no such model, so this folder holds its code, which
`trust_remote_code=True` runs: read it before.

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(".")
encoder = AutoModel.from_pretrained(".", trust_remote_code=True)
inputs = extractor(waveform, sampling_rate={config.sample_rate}, return_tensors="pt")
features = encoder(**inputs).last_hidden_state
```

To fine-tune for speech recognition, with a tokenizer of 32 characters:

```python
from transformers import AutoModelForCTC

model = AutoModelForCTC.from_pretrained(".", vocab_size=32, trust_remote_code=True)
```""",
    }


REMOTE = RemoteModel(
    name="audio",
    title="Audio",
    heads={"AutoModelForCTC": "ForCTC", "AutoModelForAudioClassification": "ForSequenceClassification"},
    model=MODEL,
    code=Path(__file__).parent / CODE,
    keys={
        "conv_width": "conv_dim",
        "conv_kernels": "conv_kernel",
        "conv_strides": "conv_stride",
        "position_kernel": "conv_pos_kernel_size",
        "position_depth": "num_conv_pos_layers",
        "position_groups": "num_conv_pos_groups",
        "context_dropout": "context_dropout",
        "layer_drop": "layerdrop",
    },
    card=_card,
)


def export_masked_speech(
    model: Student | Mapping[str, Tensor],
    config: MaskedSpeechConfig | SpeechFinetuneConfig | MaskedSpeechModelConfig,
    folder: str | os.PathLike[str],
    *,
    more_files: Mapping[str, str] = NO_FILES,
    **options: Any,
) -> None:
    """Write a folder with a feature extractor.

    Args:
        model, config, folder, options: See `RemoteModel.write`.
        more_files: Texts of further files by name, such as those of a tokenizer.
    """
    sizes = config if isinstance(config, MaskedSpeechModelConfig) else cast("MaskedSpeechModelConfig", config.model)

    def write_files(target: Path) -> None:
        for name, text in {"preprocessor_config.json": as_json(preprocessor_config(sizes)), **more_files}.items():
            write_text(target / name, text)

    # a placeholder: the tokenizer used for fine-tuning determines these
    more = {"vocab_size": 32, "pad_token_id": 0}
    REMOTE.write(model, config, folder, more=more, files=write_files, **options)


def import_masked_speech(
    folder: str | os.PathLike[str], *, decoder: Section | None = None
) -> tuple[Student, MaskedSpeechModelConfig]:
    """Read a folder; see `RemoteModel.read`. The sample rate is the feature extractor's."""
    model, config = REMOTE.read(folder, {"sample_rate": sample_rate_of(Path(folder))}, decoder)
    return model, config


FORMAT = HuggingFace(
    REMOTE.kind, export_masked_speech, import_masked_speech, lambda raw, wanted: {"decoder": wanted.decoder}
)
