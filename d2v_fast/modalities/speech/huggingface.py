"""Export and import speech encoders as Hugging Face Transformers folders, without importing Transformers.

`export_speech` writes a folder for `Data2VecAudioModel.from_pretrained`; `import_speech` reads one. Both libraries
compute the same features (`last_hidden_state` equals `last_hidden`), except at the end of padded utterances: in
Transformers and fairseq, padding leaks from one positional convolution into the next
(https://github.com/huggingface/transformers/issues/25621). Here padding never changes features.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from d2v_fast.config import ConfigError, SpeechConfig, SpeechModelConfig
from d2v_fast.config.errors import check
from d2v_fast.config.schema import MAX_FILE_BYTES
from d2v_fast.files.atomic import write_text
from d2v_fast.files.outputs import model_folder
from d2v_fast.files.reading import printable, read_json
from d2v_fast.interop.folders import (
    MAX_WEIGHTS_BYTES,
    as_json,
    mlp_ratio,
    model_card,
    read_model_config,
    read_weights,
    require_values,
    whole_number,
    write_weights,
)
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.heads import HeadPart
from d2v_fast.interop.layout import Layout, within
from d2v_fast.modalities.speech.config import SpeechModelSection
from d2v_fast.modalities.speech.config_finetune import SpeechFinetuneConfig
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.speech.layout import SpeechNames, speech_layout
from d2v_fast.models.student import Student

KIND = "data2vec-audio"
# prefix of the encoder's names in a model built around it, such as one for CTC
BASE_PREFIX = "data2vec_audio."

NAMES = SpeechNames(
    convolution="feature_extractor.conv_layers.{}.conv",
    convolution_norm="feature_extractor.conv_layers.{}.layer_norm",
    front_norm="feature_projection.layer_norm",
    projection="feature_projection.projection",
    mask_token="masked_spec_embed",
    position="encoder.pos_conv_embed.layers.{}.conv",
    norm="encoder.layer_norm",
    block="encoder.layers.{}",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.out_proj",
    attention_norm="layer_norm",
    fc1="feed_forward.intermediate_dense",
    fc2="feed_forward.output_dense",
    mlp_norm="final_layer_norm",
)


NO_FILES: Mapping[str, str] = {}

_log = logging.getLogger(__name__)


def export_speech(
    model: Student | Mapping[str, Tensor],
    config: SpeechConfig | SpeechFinetuneConfig | SpeechModelConfig,
    folder: str | os.PathLike[str],
    *,
    info: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_WEIGHTS_BYTES,
    head: HeadPart | None = None,
    more_files: Mapping[str, str] = NO_FILES,
) -> None:
    """Write `config.json`, the weights (fp32), `preprocessor_config.json` and a model card.

    Args:
        model: Student or whole teacher, on any device and in any dtype, or its state by name. With a mapping that loads
            tensors on access, no more than one file of them is in memory.
        config: Configuration of the run, or of the model alone if the run is unknown.
        folder: Created if missing. Files of an earlier export are replaced; see `model_folder`.
        info: Facts for the model card, such as `{"weights": "teacher", "step": 750}`.
        max_file_bytes: Split larger weights into several files with an index, as Transformers does.
        head: The head of a fine-tuned model; None writes the encoder alone.
        more_files: Texts of further files by name, such as those of a tokenizer.
    """
    state: Mapping[str, Tensor] = model if isinstance(model, Mapping) else model.state_dict()
    sizes = config if isinstance(config, SpeechModelConfig) else cast("SpeechModelConfig", config.model)
    parts, foreign = layout(sizes), _foreign_config(sizes)
    if head is not None:
        parts, state = head.around(parts, state)
        foreign |= head.config
    with model_folder(folder) as target:
        write_weights(target, parts, state, max_file_bytes)
        write_text(target / "README.md", _model_card(config, sizes, info or {}, head))
        for name, text in {"preprocessor_config.json": as_json(preprocessor_config(sizes)), **more_files}.items():
            write_text(target / name, text)
        write_text(target / "config.json", as_json(foreign))


def import_speech(folder: str | os.PathLike[str]) -> tuple[SpeechModel, SpeechModelConfig]:
    """Load a `Data2VecAudioModel`, or the encoder of a model built around one.

    Args:
        folder: Folder with `config.json` and `model.safetensors`, or several files of weights and their index. The
            sample rate is read from `preprocessor_config.json`; without that file it is 16 kHz.

    Returns:
        The model, fp32 on the CPU, in training mode, and its configuration. Settings that the folder does not hold,
        such as what the teacher shares, have the published values.

    Raises:
        ValueError: The architecture differs from this encoder's, or tensors are missing, unknown or misshapen.
    """
    source = Path(folder)
    config = _own_config(read_model_config(source), sample_rate_of(source), str(source / "config.json"))
    theirs, path = read_weights(source)
    theirs = within(theirs, BASE_PREFIX, f"`{path}`")
    layout(config).require_finite(theirs, f"`{path}`")
    if NAMES.mask_token not in theirs:
        # Transformers creates no mask token for a model fine-tuned without masks
        _log.warning(
            "`%s` holds no mask token: a new one is drawn; only pre-training uses it",
            printable(str(path)),
        )
        theirs = {**theirs, NAMES.mask_token: new_mask_token(config)}
    return build_speech(config, layout(config), theirs, f"`{path}` does not fit its `config.json`"), config


def new_mask_token(config: SpeechModelConfig) -> Tensor:
    """Return a mask token with the published initialization, fp32 `[D]`, the same on each call."""
    return torch.rand(config.width, generator=torch.Generator().manual_seed(0))


def build_speech(config: SpeechModelConfig, layout: Layout, theirs: Mapping[str, Tensor], what: str) -> SpeechModel:
    """Build a model in training mode from weights with another library's names.

    Raises:
        Misfit: The weights do not fit; see `Layout.ours`. It is raised before memory for the model is allocated.
    """
    with torch.device("meta"):
        model = SpeechModel(config)
    state = layout.ours(theirs, {name: value.shape for name, value in model.state_dict().items()}, what)
    model.load_state_dict(state, assign=True)
    return model


def layout(config: SpeechModelConfig) -> Layout:
    """Return the layout with Transformers' names and shapes."""
    return speech_layout(config, NAMES)


def _foreign_config(config: SpeechModelConfig) -> dict[str, Any]:
    num_layers = len(config.conv_kernels)
    return {
        "architectures": ["Data2VecAudioModel"],
        "model_type": KIND,
        "dtype": "float32",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
        "feat_proj_dropout": config.input_dropout,
        "final_dropout": config.dropout,
        "layerdrop": config.layer_drop,
        "num_feat_extract_layers": num_layers,
        "feat_extract_activation": "gelu",
        "conv_dim": [config.conv_width] * num_layers,
        "conv_kernel": list(config.conv_kernels),
        "conv_stride": list(config.conv_strides),
        "conv_bias": False,
        "conv_pos_kernel_size": config.position_kernel,
        # the number of layers; in other models of this family it is the kernel size
        "num_conv_pos_embeddings": config.position_depth,
        "num_conv_pos_embedding_groups": config.position_groups,
        # for fine-tuning; must be above zero, or the base model would have no mask token
        "mask_time_prob": 0.05,
        "mask_time_length": 10,
        "mask_time_min_masks": 2,
        "mask_feature_prob": 0.0,
        "mask_feature_length": 10,
        "mask_feature_min_masks": 0,
        "add_adapter": False,
        # a placeholder: the tokenizer used for fine-tuning determines these
        "vocab_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _own_config(raw: Mapping[str, Any], sample_rate: int, path: str) -> SpeechModelConfig:
    """Convert a Transformers configuration, with Transformers' defaults for missing keys."""
    required = {
        "model_type": KIND,
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "conv_bias": False,
        "add_adapter": False,
    }
    require_values(raw, required, {key: value for key, value in required.items() if key != "model_type"}, path)
    kernels = raw.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2])
    widths = raw.get("conv_dim", [512] * 7)
    if not isinstance(widths, list) or not widths or any(width != widths[0] for width in widths):
        raise ValueError(f"`conv_dim` in {path} must be one number, repeated, but is {json.dumps(widths)} instead.")
    if not isinstance(kernels, list) or len(kernels) != len(widths):
        must = f"be a list of {len(widths)} numbers, as `conv_dim` is"
        raise ValueError(f"`conv_kernel` in {path} must {must}, but is {json.dumps(kernels)} instead.")
    width = whole_number(raw, "hidden_size", 768, path)
    config, problems = check(
        SpeechModelConfig,
        {
            "sample_rate": sample_rate,
            "conv_width": widths[0],
            "conv_kernels": kernels,
            "conv_strides": raw.get("conv_stride", [5, 2, 2, 2, 2, 2, 2]),
            "position_depth": raw.get("num_conv_pos_embeddings", 5),
            "position_kernel": raw.get("conv_pos_kernel_size", 19),
            "position_groups": raw.get("num_conv_pos_embedding_groups", 16),
            "width": width,
            "depth": raw.get("num_hidden_layers", 12),
            "heads": raw.get("num_attention_heads", 12),
            "mlp_ratio": mlp_ratio(width, whole_number(raw, "intermediate_size", 3072, path)),
            "dropout": raw.get("hidden_dropout", 0.1),
            "attention_dropout": raw.get("attention_dropout", 0.1),
            "activation_dropout": raw.get("activation_dropout", 0.1),
            "input_dropout": raw.get("feat_proj_dropout", 0.0),
            "layer_drop": raw.get("layerdrop", 0.1),
            "norm_eps": raw.get("layer_norm_eps", 1e-5),
        },
    )
    if config is None:
        raise ConfigError(problems, path)
    return config


def preprocessor_config(config: SpeechModelSection) -> dict[str, Any]:
    """Return a configuration that normalizes each utterance to zero mean and unit variance, as training does."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": config.sample_rate,
        "do_normalize": True,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def sample_rate_of(folder: Path) -> int:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        _log.warning("`%s` holds no %s: assuming a sample rate of 16,000 Hz", printable(str(folder)), path.name)
        return 16_000
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{path}` must be a preprocessor configuration, but: {error}") from None
    return whole_number(raw if isinstance(raw, dict) else {}, "sampling_rate", 16_000, str(path))


def _model_card(
    config: SpeechConfig | SpeechFinetuneConfig | SpeechModelConfig,
    model: SpeechModelConfig,
    info: Mapping[str, object],
    head: HeadPart | None,
) -> str:
    if head is not None:
        return model_card(**head.card, info=info, config=config)
    by = "by d2v_fast: a student" if isinstance(config, SpeechConfig) else "with data2vec: a student"
    return model_card(
        title=f"data2vec speech encoder, {model.depth} blocks of width {model.width}",
        task="feature-extraction",
        tags=["data2vec", "self-supervised", "audio", "speech"],
        text=f"""\
Pre-trained without labels {by} predicts, at masked frames, the average of a teacher's upper
layers. The teacher is a moving average of the student and encodes the unmasked recording (data2vec, arXiv
2202.03555).""",
        use=f"""\
Input: mono recordings at {model.sample_rate:,} Hz, normalized by the feature extractor in this folder. The encoder
returns one frame per {model.hop} samples.

```python
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(".")
encoder = AutoModel.from_pretrained(".")
inputs = extractor(waveform, sampling_rate={model.sample_rate}, return_tensors="pt")
features = encoder(**inputs).last_hidden_state
```

In a padded batch, Transformers changes the last frames of the shorter recordings
(https://github.com/huggingface/transformers/issues/25621).

To fine-tune for speech recognition, with a tokenizer of 32 characters:

```python
from transformers import Data2VecAudioForCTC

model = Data2VecAudioForCTC.from_pretrained(".", vocab_size=32, ctc_loss_reduction="mean")
```""",
        info=info,
        config=config,
    )


FORMAT = HuggingFace(KIND, export_speech, import_speech)
