"""The probe of a run: before it, during it, after it, and of any of its checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2v_fast.checkpoints.saved_weights import load_encoder, load_head, open_checkpoint, read_run_config
from d2v_fast.command_lines import path_words, tool_command
from d2v_fast.config import D2VConfig, PretrainConfig
from d2v_fast.config.errors import check
from d2v_fast.data.labels import PATH_KEY
from d2v_fast.errors import DataError, OptionError
from d2v_fast.evaluation.classifiers import ProbeReport, ProbeReports
from d2v_fast.evaluation.probing import Probed, probing_of
from d2v_fast.modalities import modality_of
from d2v_fast.models.student import Student
from d2v_fast.objectives.build import build_model
from d2v_fast.packages import install_command


def probed(config: D2VConfig) -> PretrainConfig | None:
    """Return the configuration of a run whose features are probed; None if the run learns from labels itself."""
    return config if isinstance(config, PretrainConfig) else None


def epochs_between_probes(config: D2VConfig) -> int:
    """Return `d2v.probe.every_epochs`; 0 of a run that is not probed."""
    found = probed(config)
    return 0 if found is None else found.probe.every_epochs


def has_labels(config: D2VConfig) -> bool:
    """Return whether a run has labels, which only the probe reads: a user's own, or those of a sample set."""
    found = probed(config)
    if found is None:
        return False
    if found.probe.path is not None:
        return True
    modality = modality_of(config)
    return modality.probing is not None and config.data.kind == modality.probing().sample_set


def check_labels(config: D2VConfig) -> list[str]:
    """Return lines that say which samples the probes of a run will use, before it starts.

    Raises:
        DataError: `d2v.probe.path` cannot be probed, or a package is missing.
    """
    found = probed(config)
    if found is None:
        return []
    if found.probe.path is None:
        if has_labels(config) or found.probe.every_epochs == 0:
            return []
        return ["no effect of d2v.probe.every_epochs: there are no labels, which `d2v.probe.path` would name"]
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(f"`d2v.probe.path` needs scikit-learn, which is not installed: `{install_command('sklearn')}`.")
    from d2v_fast.evaluation.labeled import describe_labeled

    first, *others = describe_labeled(found)
    return [f"probe: {first}", *(f"  {line}" for line in others)]


def advice(config: PretrainConfig, run_folder: Path) -> str:
    """Return a sentence that names the command which probes a run without labels."""
    modality = modality_of(config)
    if modality.probing is None:
        return f'there is no probe for runs of modality "{modality.name}"'
    probing = modality.probing()
    command = tool_command("probe", path_words(run_folder), *probing.options)
    return f"there are no labels to probe the run on: `{command}` probes it on {probing.samples}"


def probe(
    config: PretrainConfig, student: Student, teacher: Student, head: nn.Module, key: str = PATH_KEY
) -> ProbeReport | ProbeReports:
    """Probe student and teacher beside the untrained network; the report prints as a table.

    Args:
        config: The run's. `probe.path` has precedence over the labels of a sample set.
        student, teacher: Encoders.
        head: The student's, which stands for the teacher's as well.
        key: The key or option that named `probe.path`, for messages.
    Raises:
        DataError: `probe.path` cannot be probed, or the modality has no probe.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        untrained = build_model(config)
    encoders = {"untrained": untrained.student, "student": student, "teacher": teacher}
    if config.probe.path is None:
        heads = {"untrained": untrained.head, "student": head, "teacher": head}
        return probing_of(config).run(Probed(encoders, heads), config)
    from d2v_fast.evaluation.labeled import run_labeled_probe

    # on the device of the others
    untrained.to(next(student.parameters()).device)
    return run_labeled_probe(encoders, config, key)


def probe_checkpoint(run_folder: Path, *, step: int | None = None, **options: Any) -> str:
    """Probe student and teacher of a checkpoint beside the untrained network; returns the table.

    Args:
        run_folder: `runs/NAME`.
        step: Step of the checkpoint; None probes the newest.
        options: Keys of `d2v.probe`, each in place of the run's own unless it is None: `path`, labeled data;
            `max_samples`, samples to use at most; of a text run `field` and `label_field`.
    Raises:
        ValueError: There is no run or no such checkpoint, or it is damaged; there are no labels; or an option does not
            apply.
    """
    config = probed(read_run_config(run_folder))
    if config is None:
        raise ValueError(
            f"`{run_folder}` is fine-tuned, and only pre-trained encoders are probed: see its `valid.jsonl`."
        )
    given = {key: value for key, value in options.items() if value is not None}
    config = _with_options(config, given)
    if not has_labels(config):
        raise ValueError(advice(config, run_folder))
    with open_checkpoint(run_folder, step) as checkpoint:
        student, teacher = (load_encoder(checkpoint, config, weights) for weights in ("student", "teacher"))
        head = load_head(checkpoint, config, student)
    key = "`--data`" if "path" in given else PATH_KEY
    return f"{run_folder}, step {checkpoint.step}:\n{probe(config, student, teacher, head, key)}"


def _with_options(config: PretrainConfig, options: dict[str, Any]) -> PretrainConfig:
    """Return the configuration with options of the command line in its section `probe`."""
    section = type(config.probe)
    if others := [key for key in options if key not in section.model_fields]:
        option = f"--{others[0].replace('_', '-')}"
        raise OptionError(
            f"`{option}` does not apply to runs on {config.modality}, whose `d2v.probe` has no `{others[0]}`. Name "
            "their labels with `--data` alone."
        )
    if options and "path" not in options and config.probe.path is None:
        raise OptionError("`--data` must name labeled data where other options say how to use it, but is not given.")
    raw = config.probe.model_dump(mode="json") | options
    if "path" in options:
        raw["path"] = str(options["path"])
    found, problems = check(section, raw, "d2v.probe")
    if found is None:
        raise OptionError("\n".join(problems))
    return config.model_copy(update={"probe": found})
