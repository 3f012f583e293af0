"""What the first process does with the networks during and after training: probe them, and export the student."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from d2v_fast.command_lines import path_words, tool_command
from d2v_fast.config import D2VConfig, SpeechConfig, TextConfig, VisionConfig
from d2v_fast.data import DataError
from d2v_fast.models.student import Student
from d2v_fast.objectives.data2vec import build_model
from d2v_fast.packages import install_command
from d2v_fast.training.run_folder import RunFolder


def has_labels(config: D2VConfig) -> bool:
    """True where there are labels, for the probe only: of the user's own, or of a sample set."""
    return config.probe.path is not None or config.data.kind in ("digits", "speech", "docs")


def check_labels(config: D2VConfig) -> list[str]:
    """Say what the probes of a run will use, a line each, before it starts.

    Raises:
        DataError: `d2v.probe.path` cannot be probed, or a package is missing.
    """
    if config.probe.path is None:
        if has_labels(config) or config.probe.every_epochs == 0:
            return []
        return ["no effect of d2v.probe.every_epochs: there are no labels, which `d2v.probe.path` would name"]
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(f"`d2v.probe.path` needs scikit-learn, which is not installed: `{install_command('sklearn')}`.")
    from d2v_fast.evaluation.labeled import describe_labeled

    first, *others = describe_labeled(config)
    return [f"probe: {first}", *(f"  {line}" for line in others)]


def advice(config: D2VConfig, run_folder: Path) -> str:
    """Say which command probes a run that has no labels."""
    options, samples = {
        "vision": (("--data", "FOLDER"), "images whose sub-folders are classes"),
        "speech": (("--data", "FOLDER"), "recordings whose sub-folders are classes"),
        "text": (("--data", "FILE.jsonl", "--label-field", "label"), "texts with a label each"),
    }[config.modality]
    command = tool_command("probe", path_words(run_folder), *options)
    return f"there are no labels to probe the run on: `{command}` probes it on {samples}"


def probe(config: D2VConfig, student: Student, teacher: Student, key: str = "`d2v.probe.path`") -> Any:
    """Probe student and teacher encoder beside the untrained network; returns a report that prints as a table.

    Args:
        config: of the run. `probe.path` takes the place of the labels of a sample set.
        student, teacher: encoders.
        key: what named `probe.path`, for messages.
    Raises:
        DataError: `probe.path` cannot be probed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        untrained = build_model(config).student
    models = {"untrained": untrained, "student": student, "teacher": teacher}
    # scikit-learn is slow to import, and needed here only
    if config.probe.path is not None:
        from d2v_fast.evaluation.labeled import run_labeled_probe

        # where the others are
        models["untrained"].to(next(student.parameters()).device)
        return run_labeled_probe(models, config, key)
    if isinstance(config, SpeechConfig):
        from d2v_fast.modalities.speech.probe import run_speech_probe
        from d2v_fast.modalities.speech.samples import speech_for_probe

        return run_speech_probe(models, speech_for_probe(config), config)
    if isinstance(config, TextConfig):
        from d2v_fast.modalities.text.probe import run_text_probe
        from d2v_fast.modalities.text.reference_pages import docs_for_probe

        return run_text_probe(models, docs_for_probe(config), config)
    assert isinstance(config, VisionConfig)
    from d2v_fast.evaluation.classifiers import run_probe
    from d2v_fast.modalities.vision.digits import digits_for_probe

    return run_probe(models, digits_for_probe(config), config.probe)


def export(folder: RunFolder) -> str:
    """Write the student of the last checkpoint as a Transformers folder; returns a line for the user."""
    from d2v_fast.checkpoints.saved_weights import export_run

    try:
        return export_run(folder.path)
    except ImportError as error:
        return f"no export: {error.name} is not installed"
