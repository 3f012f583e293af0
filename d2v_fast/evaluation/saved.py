"""The probe of a run, on any of its checkpoints, with the run's labels or others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2v_fast.checkpoints.saved_weights import load_encoder, open_checkpoint, read_run_config
from d2v_fast.config import D2VConfig, TextConfig
from d2v_fast.config.errors import OptionError, check
from d2v_fast.evaluation import run as evaluation


def probe_checkpoint(
    run_folder: Path,
    *,
    step: int | None = None,
    data: Path | None = None,
    field: str | None = None,
    label_field: str | None = None,
    max_samples: int | None = None,
) -> str:
    """Probe student and teacher of a checkpoint beside the untrained network; returns the table.

    Args:
        run_folder: `runs/NAME`.
        step: of the checkpoint; None takes the newest.
        data: labeled data, in place of what the run's configuration names.
        field, label_field: of a text run, the fields of the text and of its label.
        max_samples: labeled samples to use at most.
    Raises:
        ValueError: no run, no such checkpoint, or it is damaged; there are no labels; or an option does not apply.
    """
    config = read_run_config(run_folder)
    named = {"path": data, "field": field, "label_field": label_field, "max_samples": max_samples}
    config = _with_options(config, {key: value for key, value in named.items() if value is not None})
    if not evaluation.has_labels(config):
        raise ValueError(evaluation.advice(config, run_folder))
    with open_checkpoint(run_folder, step) as checkpoint:
        student, teacher = (load_encoder(checkpoint, config, weights) for weights in ("student", "teacher"))
    key = "`d2v.probe.path`" if data is None else "`--data`"
    return f"{run_folder}, step {checkpoint.step}:\n{evaluation.probe(config, student, teacher, key)}"


def _with_options(config: D2VConfig, options: dict[str, Any]) -> D2VConfig:
    """The configuration with options of the command line in its section `probe`."""
    of_text = [f"--{key.replace('_', '-')}" for key in ("field", "label_field") if key in options]
    if of_text and not isinstance(config, TextConfig):
        raise OptionError(
            f"`{of_text[0]}` is for runs on text. The labels of {config.modality} are the sub-folders of `--data`."
        )
    if options and "path" not in options and config.probe.path is None:
        raise OptionError("`--data` must name labeled data where other options say how to use it, but is not given.")
    raw = config.probe.model_dump(mode="json") | options
    if "path" in options:
        raw["path"] = str(options["path"])
    section, problems = check(type(config.probe), raw, "d2v.probe")
    if section is None:
        raise OptionError("\n".join(problems))
    return config.model_copy(update={"probe": section})
