"""The probe of a run, on any of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from d2v_fast import evaluation
from d2v_fast.export import choose_checkpoint, load_encoder, read_run_config


def probe_checkpoint(run_folder: Path, *, step: int | None = None) -> str:
    """Probe student and teacher of a checkpoint beside the untrained network; returns the table.

    Args:
        run_folder: `runs/NAME`.
        step: of the checkpoint; None takes the newest.
    Raises:
        ValueError: no run, no such checkpoint, or it is damaged; or the run's data has no labels.
    """
    config = read_run_config(run_folder)
    if not evaluation.has_labels(config):
        raise ValueError(
            f'`d2v.data.kind` must be one that comes with labels to be probed, but is "{config.data.kind}" in '
            f"{run_folder} instead. `d2v-fast embed` writes features for a probe of your own."
        )
    checkpoint, step = choose_checkpoint(run_folder, step)
    student, teacher = (load_encoder(checkpoint, config, weights) for weights in ("student", "teacher"))
    return f"{run_folder}, step {step}:\n{evaluation.probe(config, student, teacher)}"
