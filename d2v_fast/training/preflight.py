"""Checks before a run folder is made: the run's name, missing packages, memory and disk space."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import disk_usage
from typing import get_args

import torch

from d2v_fast.command_lines import SUPERVISION
from d2v_fast.config import RunConfig
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.evaluation import run as evaluation
from d2v_fast.memory.peak import available_memory, format_bytes
from d2v_fast.memory.predict import predict_from
from d2v_fast.memory.sizes import Shapes, shapes_of
from d2v_fast.memory.step import StepMemory
from d2v_fast.models import xformers_attention
from d2v_fast.ops import missing_kernels
from d2v_fast.packages import install_command
from d2v_fast.training.engine import check_engine_available
from d2v_fast.training.run_folder import refuse_saved

# memory that lives as long as the run does not depend on a step
_NO_STEP = StepMemory(batch=0, saved=0, forward=0, backward=0, with_gradients=0, arrivals=())


def check_name(config: RunConfig, resume: bool) -> None:
    """Check that a new run's name is free before its data are listed or tokenized.

    Raises:
        RunError: The name belongs to a run that has saved something.
    """
    run = config.d2v.run
    # under supervision, a later attempt continues the run of an earlier one
    if run.name is not None and not resume and SUPERVISION not in os.environ:
        refuse_saved(Path(run.dir) / run.name)


def check_packages(config: RunConfig, num_processes: int) -> None:
    """Check that every package is available that the run will need, including those for reports and the probe.

    Args:
        config: The run's configuration.
        num_processes: Number of processes of the run.
    Raises:
        RunError: A package is missing or cannot be imported.
        ImportError: safetensors is missing or cannot be imported.
    """
    # without it, the run would fail at its first checkpoint
    importlib.import_module("safetensors.torch")
    check_engine_available(config.deepspeed, num_processes)
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
    # `evaluation.check_labels` checks a user's own labels
    found = evaluation.probed(config.d2v)
    if (
        found is not None
        and found.probe.path is None
        and evaluation.has_labels(found)
        and importlib.util.find_spec("sklearn") is None
    ):
        command = install_command("sklearn")
        raise RunError(f"the probe of this data needs scikit-learn, which is not installed: `{command}`.")


def report_missing_kernels(world: World, say: Callable[[str], None]) -> None:
    """Report at the start of a run if its operations use the slower reference implementation.

    Args:
        world: The processes of the run.
        say: Prints a line in one process.
    """
    missing = missing_kernels(world.device.type)
    if missing is not None:
        say(f"note: {missing}")
        # the first operation would warn about the same in every process
        warnings.filterwarnings("ignore", message=re.escape(missing))


def check_attention(config: RunConfig, world: World, dtype: torch.dtype, say: Callable[[str], None]) -> None:
    """Check that `d2v.model.attention` can run on the run's device. Every process calls it.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        dtype: Dtype of the forward pass.
        say: Prints a line in one process.
    Raises:
        RunError: xformers is asked for and cannot run in some process. All processes raise it.
    """
    kind = getattr(config.d2v.model, "attention", None)
    if kind == "fused" and world.device.type != "cuda":
        say('no effect of `d2v.model.attention`: "fused" is for GPUs, and a CPU uses the attention of PyTorch')
    if kind != "xformers":
        return
    problems = world.collect(xformers_attention.problem(world.device, dtype))
    if problem := next(filter(None, problems), None):
        kinds = get_args(type(config.d2v.model).model_fields["attention"].annotation)
        others = " or ".join(f'"{other}"' for other in kinds if other != kind)
        raise RunError(f'`d2v.model.attention` must be {others} here, but is "xformers": {problem}.')


def check_room(config: RunConfig, world: World, dtype: torch.dtype) -> None:
    """Check that parameters and optimizer fit into memory, and a checkpoint on the disk. Every process calls it.

    The command `check` also measures the memory of a step.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        dtype: Dtype of the forward pass.
    Raises:
        RunError: They do not fit in some process. All processes raise it.
    """
    shapes = shapes_of(config)
    problems = world.collect(_memory_problem(config, world, dtype, shapes) or _disk_problem(config, shapes))
    if problem := next(filter(None, problems), None):
        raise RunError(problem)


def _memory_problem(config: RunConfig, world: World, dtype: torch.dtype, shapes: Shapes) -> str | None:
    device = world.device
    needed = predict_from(config, world.size, dtype, device.type, shapes, _NO_STEP).device_state
    here = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is None or here * needed <= free:
        return None
    several = f", in each of {here} processes" if here > 1 else ""
    return (
        f"the model and its optimizer need {format_bytes(needed)}{several}, and {format_bytes(free)} are free on this "
        f"{device.type}. Use a smaller model, or shard it with `zero_optimization.stage` over more processes."
    )


def _disk_problem(config: RunConfig, shapes: Shapes) -> str | None:
    needed = 4 * (3 * shapes.trained + shapes.teacher)
    root = Path(config.d2v.run.dir).absolute()
    disk = disk_usage(next(folder for folder in (root, *root.parents) if folder.is_dir()))
    # virtual file systems report a size of 0
    if needed <= disk.free or disk.total == 0:
        return None
    return (
        f"a checkpoint takes {format_bytes(needed)}, and {format_bytes(disk.free)} are left on the disk of {root}. "
        "Make room, or choose another folder with `--set d2v.run.dir=FOLDER`."
    )
