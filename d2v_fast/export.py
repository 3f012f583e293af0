"""Weights out of the checkpoints of a run, whatever division they were written in, and their export.

    d2v-fast export runs/NAME                 # the student of the newest good checkpoint -> runs/NAME/export
    d2v-fast export runs/NAME --weights teacher --to FOLDER

No GPU and none of the processes of the run are needed, and no more than one file of weights is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_fast.checkpoints import MAX_STATE_BYTES, STATE, complete_steps, verify
from d2v_fast.config import MAX_FILE_BYTES, ConfigError, D2VConfig, VisionConfig, check_d2v
from d2v_fast.shard_files import ShardReader
from d2v_fast.untrusted import read_json

WEIGHTS = ("student", "teacher")


class SavedWeights(Mapping[str, Tensor]):
    """Student or teacher encoder of a checkpoint: fp32 tensors by name, each read when it is asked for.

    Args:
        folder: `checkpoints/step-N`, verified.
        weights: "student" or "teacher".
    """

    def __init__(self, folder: Path, weights: str) -> None:
        shapes = read_json(folder / STATE, MAX_STATE_BYTES)["shapes"]
        self._reader = ShardReader(folder, shapes)
        # a student is saved together with its head, as parts of one model
        self._prefix = "student/student." if weights == "student" else "teacher/"

    def __getitem__(self, name: str) -> Tensor:
        if self._prefix + name not in self._reader.shapes:
            raise KeyError(name)
        return self._reader.whole(self._prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self._prefix) for n in self._reader.shapes if n.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_run_config(run_folder: Path) -> D2VConfig:
    """The `"d2v"` section of the run's `config.json`.

    Raises:
        ValueError: it is no run folder, or the section is refused.
    """
    path = run_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"`{run_folder}` must be the folder of a run, but holds no config.json.")
    try:
        raw = read_json(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise ConfigError([f"not a configuration: {error}"], str(path)) from None
    config, problems = check_d2v(raw.get("d2v") if isinstance(raw, dict) else None)
    if config is None:
        raise ConfigError(problems, str(path))
    return config


def newest_checkpoint(run_folder: Path) -> tuple[Path, int]:
    """Folder and step of the newest checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    steps = complete_steps(run_folder / "checkpoints")
    if not steps:
        raise ValueError(f"`{run_folder}` must hold a checkpoint, but has none yet. Let the run save one first.")
    return run_folder / "checkpoints" / f"step-{steps[0]}", steps[0]


def load_weights(model: torch.nn.Module, saved: SavedWeights, source: Path) -> None:
    """Copy saved weights into a model.

    Raises:
        ValueError: one is missing or has another shape.
    """
    expected = model.state_dict()
    found = {name: saved[name] for name in expected if name in saved}
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    if wrong:
        named = ", ".join(wrong[:5])
        raise ValueError(f"{source} does not fit the run's config.json: {named} is missing or misshapen.")
    model.load_state_dict(found)


def export_run(
    run_folder: Path, *, to: Path | None = None, weights: str = "student", step: int | None = None, **options: Any
) -> str:
    """Write a Transformers folder from a checkpoint of a run; returns a line for the user.

    Args:
        run_folder: of a run on images.
        to: the folder to write; None is `export` in the run folder.
        weights: "student" or "teacher".
        step: of the checkpoint; None takes the newest.
        options: of `export_vision`.
    Raises:
        ValueError: no run, no such checkpoint, or it is damaged.
    """
    from d2v_fast.interop.huggingface import export_vision

    config = read_run_config(run_folder)
    if not isinstance(config, VisionConfig):
        raise ValueError(f"`{run_folder}` must be of a run on images, but is of one on {config.modality}.")
    folder, newest = newest_checkpoint(run_folder)
    if step is not None and step != newest:
        folder = folder.with_name(f"step-{step}")
        if not folder.is_dir():
            there = ", ".join(map(str, complete_steps(run_folder / "checkpoints")))
            raise ValueError(f"`--step` must be of a checkpoint in {run_folder} ({there}), but is {step} instead.")
    step = newest if step is None else step
    problem = verify(folder, step)
    if problem is not None:
        raise ValueError(f"the checkpoint {folder} is damaged ({problem}): choose another one with `--step`.")
    target = run_folder / "export" if to is None else to
    export_vision(SavedWeights(folder, weights), config, target, info={"weights": weights, "step": step}, **options)
    return f"export: {target} ({weights}, step {step}, for Transformers)"
