"""Import DeepSpeed in a supported version, with the settings of this process that it needs.

All global state that DeepSpeed needs is set here, by functions that a run calls at its start, never by an import.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import cast

import torch
from torch import nn

from d2v_fast.distributed.deepspeed_types import Engine
from d2v_fast.errors import RunError

# the first version that works, and the first that was not tried; pyproject.toml has the same range
FIRST, NOT_TRIED = (0, 19, 7), (0, 20, 0)
TESTED = ("0.19.7", "0.19.8")
INSTALL = "pip install 'deepspeed>=0.19.7,<0.20'"


class InternalsError(RunError):
    """The installed DeepSpeed is not one that this library knows."""


def check_version() -> None:
    """Raise an InternalsError unless the installed DeepSpeed is of a version that this library knows.

    Nothing is imported. A DeepSpeed that is not installed passes.
    """
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is None or not FIRST <= tuple(map(int, numbers.groups())) < NOT_TRIED:
        raise InternalsError(
            f"DeepSpeed {version} is installed, but only 0.19.7 and later 0.19 are supported (tested: "
            f"{' and '.join(TESTED)}): ZeRO's internal layout, which is read here, differs. Install a supported "
            f"version: `{INSTALL}`."
        )


def missing(owner: str, names: Sequence[str]) -> str:
    """Return the message for attributes that the installed DeepSpeed lacks.

    Args:
        owner: Name of the class that lacks them.
        names: Names of the attributes.
    """
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        version = "of an unknown version"
    return (
        f"DeepSpeed {version} keeps its state in another way than the tested versions {' and '.join(TESTED)}: {owner} "
        f"lacks {', '.join(names)}. Install a supported version: `{INSTALL}`."
    )


def load(device: torch.device) -> None:
    """Import DeepSpeed, and make the settings of this process that it needs. Call it once, at the start of a run.

    Two settings last as long as the process:

    - `TORCH_FORCE_WEIGHTS_ONLY_LOAD`: otherwise DeepSpeed loads its own checkpoints with pickle;
    - torch's FutureWarning about two collectives that ZeRO calls is ignored: it comes in every process, at training
      time, and no user can act on it.

    Args:
        device: The device that this process computes on.
    Raises:
        InternalsError: The version is not supported.
        Exception: Whatever DeepSpeed raises if it does not fit other packages.
    """
    check_version()
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    with warnings.catch_warnings(), _accelerator(device), _without_broken_apex():
        warnings.simplefilter("ignore")
        importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def load_zero() -> None:
    """Import what DeepSpeed imports when it makes an optimizer of stage 1 to 3."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def initialize(
    model: nn.Module, settings: Mapping[str, object], optimizer: torch.optim.Optimizer | None = None
) -> Engine:
    """Return the DeepSpeed engine of a model; torch.distributed is initialized already."""
    import deepspeed

    engine: Engine = deepspeed.initialize(
        model=model, optimizer=optimizer, config=dict(settings), dist_init_required=False
    )[0]
    return engine


def adam_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return DeepSpeed's optimizer of this name, such as "FusedAdam".

    Raises:
        Exception: Whatever DeepSpeed raises if it does not fit other packages.
    """
    found: Callable[..., torch.optim.Optimizer] = getattr(importlib.import_module("deepspeed.ops.adam"), name)
    return found


@contextmanager
def _accelerator(device: torch.device) -> Iterator[None]:
    """Have DeepSpeed choose the CPU while it is imported, also on a machine with a GPU, and without its warning."""
    if device.type != "cpu" or "DS_ACCELERATOR" in os.environ:
        yield
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        del os.environ["DS_ACCELERATOR"]


@contextmanager
def _without_broken_apex() -> Iterator[None]:
    """Hide a broken apex while DeepSpeed is imported, which imports apex if present and tolerates only ImportError."""
    modules = cast(MutableMapping[str, ModuleType | None], sys.modules)
    try:
        importlib.import_module("apex")
    except ImportError:
        pass
    except Exception:
        # None makes the import statement raise ImportError
        modules["apex"] = None
    try:
        yield
    finally:
        if "apex" in modules and modules["apex"] is None:
            del modules["apex"]
