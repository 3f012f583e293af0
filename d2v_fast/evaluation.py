"""What the first process does with the networks during and after training: probe them, and export the student."""

from __future__ import annotations

from typing import Any

import torch

from d2v_fast.config import D2VConfig
from d2v_fast.data2vec import Data2Vec, build_model
from d2v_fast.run_folder import RunFolder
from d2v_fast.teacher import Teacher


def has_labels(config: D2VConfig) -> bool:
    """True where the data set comes with labels, for the probe only."""
    return config.data.kind == "digits"


def probe(config: D2VConfig, model: Data2Vec, teacher: Teacher) -> Any:
    """Probe student and teacher beside the untrained network; returns a report that prints as a table."""
    # scikit-learn is slow to import, and needed here only
    from d2v_fast.data import digits_for_probe
    from d2v_fast.probe import run_probe

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        untrained = build_model(config).student
    models = {"untrained": untrained, "student": model.student, "teacher": teacher.module}
    return run_probe(models, digits_for_probe(config), config.probe)


def export(config: D2VConfig, model: Data2Vec, folder: RunFolder, step: int) -> str:
    """Write the student as a Transformers folder; returns a line for the user."""
    try:
        from d2v_fast.interop.huggingface import export_vision
    except ImportError as error:
        return f"no export: {error.name} is not installed"
    export_vision(model.student, config, folder.path / "export", info={"weights": "student", "step": step})
    return f"export: {folder.path / 'export'} (student, for Transformers)"
