"""Random models and teachers for a configuration file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from d2v_fast.config import D2VConfig, load_config
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec
from tests.helpers.speech_reference import randomize_


def given(file: Path) -> tuple[D2VConfig, Data2Vec, nn.Module]:
    """Return the configuration of a file, a random model, and a teacher with other weights."""
    config = load_config(file).d2v
    model, other = build_model(config), build_model(config)
    randomize_(model)
    randomize_(other)
    return config, model, model.student.with_averaged(other.student.averaged)
