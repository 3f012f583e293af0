"""What can be found wrong before a run folder is made: packages that are missing, memory and room on the disk."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage

import torch

from d2v_fast import evaluation
from d2v_fast.config import RunConfig
from d2v_fast.engine import check_engine_available
from d2v_fast.memory import predict, shapes_of
from d2v_fast.peak_memory import available_memory, format_bytes
from d2v_fast.world import RunError, World


def check_packages(config: RunConfig, num_processes: int) -> None:
    """Check that every package is there that the run will need, at its end or for its reports.

    Args:
        num_processes: of the run.
    Raises:
        RunError: one is missing or cannot be imported.
    """
    check_engine_available(config, num_processes)
    if config.deepspeed.needs_deepspeed(num_processes):
        for monitor, package in config.deepspeed.monitor_packages().items():
            try:
                importlib.import_module(package)
            except Exception as error:
                name = package.rpartition(".")[2]
                raise RunError(
                    f"`{monitor}.enabled` needs the package {name}, which cannot be imported ({error}): "
                    f"`pip install {name}`, or set it to false."
                ) from error
    if evaluation.has_labels(config.d2v) and importlib.util.find_spec("sklearn") is None:
        raise RunError("the probe of this data needs scikit-learn, which is not installed: `pip install scikit-learn`.")


def check_room(config: RunConfig, world: World, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Check that parameters and optimizer fit into memory, and a checkpoint on the disk. Every process calls it.

    Args:
        world: of the run.
        dtype: of the forward pass.
        say: gets a line where a step is predicted to need more memory than there is.
    Raises:
        RunError: they do not fit, in one of the processes; in all of them.
    """
    problems = world.collect(_memory_problem(config, world, dtype, say) or _disk_problem(config))
    if problem := next(filter(None, problems), None):
        raise RunError(problem)


def _memory_problem(config: RunConfig, world: World, dtype: torch.dtype, say: Callable[[str], None]) -> str | None:
    device = world.device
    found = predict(config, world.size, dtype, device.type)
    here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None:
        there = f"{format_bytes(free)} are free on this {device.type}"
        several = f", in each of {here} processes" if here > 1 else ""
        advice = "Lower `train_micro_batch_size_per_gpu`, or set `d2v.model.gradient_checkpointing`."
        if here * found.device_state > free:
            return (
                f"the model and its optimizer need {format_bytes(found.device_state)}{several}, and {there}. Take a "
                "smaller model, or shard it with `zero_optimization.stage` over more processes."
            )
        if here * found.device_peak > free:
            say(f"a step may need {format_bytes(found.device_peak)}{several}, and {there}. {advice}")
    return None


def _disk_problem(config: RunConfig) -> str | None:
    shapes = shapes_of(config)
    needed = 4 * (3 * shapes.trained + shapes.teacher)
    root = Path(config.d2v.run.dir).absolute()
    disk = disk_usage(next(folder for folder in (root, *root.parents) if folder.is_dir())).free
    if needed <= disk:
        return None
    return (
        f"a checkpoint takes {format_bytes(needed)}, and {format_bytes(disk)} are left on the disk of {root}. Make "
        "room, or choose another folder with `--set d2v.run.dir=FOLDER`."
    )
