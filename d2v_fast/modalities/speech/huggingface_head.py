"""Fine-tuned models of speech as Transformers folders: the encoder with its head, in both versions of the encoder.

The heads are those of `Data2VecAudioForCTC` and `Data2VecAudioForSequenceClassification`, and of the same classes of
data2vec 2.0 that a folder carries. A folder for CTC holds its letters as a tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import SavedWeights
from d2v_fast.interop.folders import as_json, read_model_config
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.heads import HeadPart, SavedHead, class_keys, read_head
from d2v_fast.modalities.speech import huggingface, huggingface2
from d2v_fast.modalities.speech.config_finetune import SpeechClassifyConfig, SpeechCtcConfig, SpeechFinetuneConfig
from d2v_fast.modalities.speech.vocabulary import BLANK, BOUNDARY, UNKNOWN, Vocabulary, read_vocabulary

__all__ = ["FORMAT", "export_fine_tuned", "head_of_folder"]

LETTERS = "vocab.json"
# our names of the heads' tensors and theirs
_CTC = {"classifier.weight": "lm_head.weight", "classifier.bias": "lm_head.bias"}
_CLASSIFY = {name: name for name in ("projector.weight", "projector.bias", "classifier.weight", "classifier.bias")}
_SPECIAL = {"unk_token": UNKNOWN, "bos_token": "<s>", "eos_token": "</s>"}


def export_fine_tuned(
    model: SavedWeights, config: SpeechFinetuneConfig, folder: str | os.PathLike[str], **options: Any
) -> None:
    """Write a folder that `pipeline("automatic-speech-recognition")` or `pipeline("audio-classification")` reads.

    Args:
        model: Encoder and head.
        config: The run's section.
        folder, options: See `huggingface.export_speech`.
    """
    write: Callable[..., None]
    if config.encoder == "data2vec":
        write, prefix, kind = huggingface.export_speech, huggingface.BASE_PREFIX, "Data2VecAudio"
    else:
        write, prefix, kind = huggingface2.export_masked_speech, huggingface2.REMOTE.prefix, "Data2Vec2Audio"
    names, keys = (
        (_CTC, _letter_keys(config)) if isinstance(config, SpeechCtcConfig) else (_CLASSIFY, _class_keys(config))
    )
    saved, mask = model.head(), config.mask
    masks = {
        "mask_time_prob": mask.prob,
        "mask_time_length": mask.length,
        "mask_feature_prob": mask.channel_prob,
        "mask_feature_length": mask.channel_length,
    }
    end = "ForCTC" if isinstance(config, SpeechCtcConfig) else "ForSequenceClassification"
    head = HeadPart(
        prefix,
        {theirs: saved[own] for own, theirs in names.items()},
        {"architectures": [f"{kind}{end}"], **masks, **keys},
        _card(config),
    )
    letters = tokenizer_files(config) if isinstance(config, SpeechCtcConfig) else {}
    write(model, config, folder, head=head, more_files=letters, **options)


def tokenizer_files(config: SpeechCtcConfig) -> dict[str, str]:
    """Return the files of a tokenizer of the run's letters, by name."""
    tokens = config.labels or ()
    # a token that the vocabulary lacks would become a class that the model does not have
    special = {name: token if token in tokens else None for name, token in _SPECIAL.items()}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        "pad_token": BLANK,
        **special,
        "word_delimiter_token": BOUNDARY,
        "replace_word_delimiter_char": " ",
        "do_lower_case": False,
    }
    letters = {token: number for number, token in enumerate(tokens)}
    return {LETTERS: json.dumps(letters, ensure_ascii=False), "tokenizer_config.json": as_json(settings)}


def head_of_folder(folder: Path) -> SavedHead | None:
    """Return the head in a folder that Transformers or `export_fine_tuned` wrote; None if there is none.

    Raises:
        DataError: the letters of a model for CTC cannot be read.
    """
    found = read_head(folder, _CTC)
    if found is None:
        return read_head(folder, _CLASSIFY)
    path = folder / LETTERS
    return SavedHead(found.tensors, read_vocabulary(str(path)).tokens if path.is_file() else None)


def _letter_keys(config: SpeechCtcConfig) -> dict[str, Any]:
    tokens = tuple(config.labels or ())
    return {
        "vocab_size": len(tokens),
        "pad_token_id": Vocabulary(tokens).blank,
        "final_dropout": config.head.dropout,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }


def _class_keys(config: SpeechFinetuneConfig) -> dict[str, Any]:
    assert isinstance(config, SpeechClassifyConfig)
    return {
        "classifier_proj_size": config.head.projection,
        "use_weighted_layer_sum": False,
        **class_keys(config.labels),
    }


def _import(folder: str | os.PathLike[str], **options: Any) -> Any:
    kind = read_model_config(Path(folder)).get("model_type")
    read = huggingface2.import_masked_speech if kind == huggingface2.REMOTE.kind else huggingface.import_speech
    return read(folder, **options)


def _card(config: SpeechFinetuneConfig) -> dict[str, Any]:
    is_ctc = isinstance(config, SpeechCtcConfig)
    remote = config.encoder != "data2vec"
    task = "automatic-speech-recognition" if is_ctc else "audio-classification"
    count = len(config.labels or ())
    what = f"transcripts of recordings, in {count} letters (CTC)" if is_ctc else f"{count} classes of recordings"
    code = " The folder holds the model's code, which `trust_remote_code=True` runs: read it before." if remote else ""
    data = "spoken words of synthetic voices" if config.data.kind == "speech" else "recordings of the user's"
    return {
        "title": f"data2vec model of speech for {what}",
        "task": task,
        "tags": ["data2vec", "audio", "speech", task],
        "text": f"""\
An encoder of {"data2vec 2.0 (arXiv 2212.07525)" if remote else "data2vec (arXiv 2202.03555)"} that was fine-tuned by
d2v_fast. Data: {data}.""",
        "use": f"""\
Input: mono recordings at {config.model.sample_rate:,} Hz.{code}

```python
from transformers import pipeline

answer = pipeline("{task}", "."{", trust_remote_code=True" if remote else ""})
answer({{"raw": waveform, "sampling_rate": {config.model.sample_rate}}})
```""",
    }


FORMAT = HuggingFace(huggingface.KIND, export_fine_tuned, _import, head=head_of_folder)
