"""Transformers folders of small speech models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from d2v_fast.config import SpeechConfig
from d2v_fast.modalities.speech.encoder import SpeechModel
from d2v_fast.modalities.speech.huggingface import export_speech
from tests.helpers.speech_models import make_config
from tests.helpers.speech_reference import randomize_


def build(config: SpeechConfig) -> SpeechModel:
    """Return an encoder in which no parameter has its initial value."""
    model = SpeechModel(config.model).eval()
    randomize_(model)
    return model


def edited(tmp_path: Path, **changes: Any) -> Path:
    """Export a model and change keys of its `config.json`."""
    config = make_config()
    export_speech(build(config), config, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path
