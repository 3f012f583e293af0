"""What the first process does with the networks during and after training: probe them, and export the student."""

from __future__ import annotations

from typing import Any

import torch

from d2v_fast.config import D2VConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.data2vec import build_model
from d2v_fast.modalities import Student
from d2v_fast.run_folder import RunFolder


def has_labels(config: D2VConfig) -> bool:
    """True where the data set comes with labels, for the probe only."""
    return config.data.kind in ("digits", "speech", "docs")


def probe(config: D2VConfig, student: Student, teacher: Student) -> Any:
    """Probe student and teacher encoder beside the untrained network; returns a report that prints as a table."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        untrained = build_model(config).student
    models = {"untrained": untrained, "student": student, "teacher": teacher}
    # scikit-learn is slow to import, and needed here only
    if isinstance(config, SpeechConfig):
        from d2v_fast.data.speech import speech_for_probe
        from d2v_fast.speech_probe import run_speech_probe

        return run_speech_probe(models, speech_for_probe(config), config)
    if isinstance(config, TextConfig):
        from d2v_fast.data.docs import docs_for_probe
        from d2v_fast.text_probe import run_text_probe

        return run_text_probe(models, docs_for_probe(config), config)
    assert isinstance(config, VisionConfig)
    from d2v_fast.data import digits_for_probe
    from d2v_fast.probe import run_probe

    return run_probe(models, digits_for_probe(config), config.probe)


def export(folder: RunFolder) -> str:
    """Write the student of the last checkpoint as a Transformers folder; returns a line for the user."""
    from d2v_fast.export import export_run

    try:
        return export_run(folder.path)
    except ImportError as error:
        return f"no export: {error.name} is not installed"
