"""Encoders, one module per modality: raw input to token embeddings, and the blocks on top of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import d2v_fast.config  # noqa: F401  first: it imports the configurations of all modalities

if TYPE_CHECKING:
    from d2v_fast.config import D2VConfig
    from d2v_fast.models.student import Student

__all__ = ["build_student", "encoder_class"]


def build_student(config: D2VConfig) -> Student:
    """The encoder of the modality, with the published initialization drawn from torch's global generator."""
    make: Any = encoder_class(config)
    student: Student = make(config.model)
    return student


def encoder_class(config: D2VConfig) -> type[Student]:
    """The encoder of the modality; it is built from `config.model`."""
    from d2v_fast.config import SpeechConfig, TextConfig, VisionConfig

    if isinstance(config, VisionConfig):
        from d2v_fast.modalities.vision.encoder import VisionModel

        return VisionModel
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech.encoder import SpeechModel

        return SpeechModel
    if isinstance(config, TextConfig):
        from d2v_fast.modalities.text.encoder import TextModel

        return TextModel
    raise TypeError(f"no encoder for {type(config).__name__}")
