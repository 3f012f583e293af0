"""Encoders, one module per modality: raw input to token embeddings, and the blocks on top of them."""

from __future__ import annotations

from d2v_fast.config import D2VConfig, SpeechConfig, VisionConfig
from d2v_fast.modalities.student import Student

__all__ = ["Student", "build_student"]


def build_student(config: D2VConfig) -> Student:
    """The encoder of the modality, with the published initialisation drawn from torch's global generator."""
    if isinstance(config, VisionConfig):
        from d2v_fast.modalities.vision import VisionModel

        return VisionModel(config.model)
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech import SpeechModel

        return SpeechModel(config.model)
    raise TypeError(f"no encoder for {type(config).__name__}")
