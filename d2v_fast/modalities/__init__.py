"""Encoders, one module per modality: raw input to token embeddings, and the blocks on top of them."""

from __future__ import annotations

from typing import Any

from d2v_fast.config import D2VConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.modalities.student import Student

__all__ = ["Student", "build_student", "encoder_class"]


def build_student(config: D2VConfig) -> Student:
    """The encoder of the modality, with the published initialisation drawn from torch's global generator."""
    make: Any = encoder_class(config)
    student: Student = make(config.model)
    return student


def encoder_class(config: D2VConfig) -> type[Student]:
    """The encoder of the modality; it is built from `config.model`."""
    if isinstance(config, VisionConfig):
        from d2v_fast.modalities.vision import VisionModel

        return VisionModel
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech import SpeechModel

        return SpeechModel
    if isinstance(config, TextConfig):
        from d2v_fast.modalities.text import TextModel

        return TextModel
    raise TypeError(f"no encoder for {type(config).__name__}")
