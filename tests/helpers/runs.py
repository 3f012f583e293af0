"""Tiny training runs, in this process or in forked ones, which start quickly and can be killed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v_fast.distributed import deepspeed_internals, deepspeed_start
from d2v_fast.distributed.world import World
from d2v_fast.evaluation import run as evaluation
from d2v_fast.interop import export
from d2v_fast.masking import block_mask_rows
from d2v_fast.modalities.vision import digits
from d2v_fast.train import main
from d2v_fast.training import metrics

_never_compiling = contextlib.ExitStack()

TINY: dict[str, Any] = {
    "train_batch_size": 24,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.05}},
    "d2v": {
        "model": {
            "image_size": 8,
            "patch_size": 2,
            "channels": 1,
            "width": 16,
            "depth": 2,
            "heads": 2,
            "drop_path": 0.1,
            "attention_dropout": 0.1,
            "layer_scale": 0.1,
        },
        "mask": {"num_patches": 9, "min_patches": 2},
        "target": {"top_k": 2},
        "teacher": {"decay_start": 0.9, "decay_end": 0.95, "decay_steps": 10},
        "schedule": {"steps": 12, "warmup_steps": 3},
        "data": {
            "kind": "digits",
            "num_workers": 0,
            "mean": [0.3],
            "std": [0.38],
            "crop_scale": [1.0, 1.0],
            "flip_prob": 0.0,
            "shift_pixels": 1.0,
        },
        "probe": {"num_draws": 1, "labels_per_class": 2},
        "run": {"log_every": 1, "save_every": 3, "keep": 2, "device": "cpu", "timeout_minutes": 1},
    },
}

# with the recordings that ship with the library
TINY_SPEECH: dict[str, Any] = {
    **TINY,
    "d2v": {
        **{key: TINY["d2v"][key] for key in ("teacher", "schedule", "probe", "run")},
        "modality": "speech",
        "model": {
            "sample_rate": 8000,
            "conv_width": 8,
            "conv_kernels": [10, 3, 3, 2],
            "conv_strides": [5, 2, 4, 4],
            "position_depth": 2,
            "position_kernel": 5,
            "position_groups": 4,
            "width": 16,
            "depth": 3,
            "heads": 2,
            "layer_drop": 0.3,
        },
        "mask": {"length": 3, "equal_counts": False},
        "target": {"top_k": 2, "layer_norm": "instance", "final_norm": "none"},
        "data": {"num_workers": 0, "min_seconds": 0.3, "max_seconds": 0.6, "max_batch_seconds": 12, "lengths": "pad"},
    },
}

# with the reference pages that ship with Python
TINY_TEXT: dict[str, Any] = {
    **TINY,
    "d2v": {
        **{key: TINY["d2v"][key] for key in ("teacher", "schedule", "probe", "run")},
        "modality": "text",
        "model": {"vocab_size": 400, "max_positions": 32, "width": 16, "depth": 3, "heads": 2, "layer_drop": 0.3},
        "mask": {"mode": "bert"},
        "target": {"top_k": 2, "layer_norm": "layer", "final_norm": "none"},
        "loss": {"beta": 4.0, "channel_reduction": "sum"},
        "data": {"num_workers": 0, "block_size": 32},
    },
}

_DECODER = {"width": 8, "depth": 2, "kernel": 3, "groups": 2, "dropout": 0.1}


def _second(base: dict[str, Any], modality: str, model: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of data2vec 2.0 for the data of one of data2vec; null removes a key of its model."""
    sizes = {**base["d2v"]["model"], "depth": 2, "decoder": _DECODER, **model}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    target = {"top_k": 2, "layer_norm": "instance", "final_norm": "none"}
    changed = {"model": sizes, "target": target, **sections}
    return {**base, "d2v": {**base["d2v"], "modality": modality, "objective": "data2vec2", **changed}}


TINY_2 = _second(
    TINY,
    "vision",
    {"context_depth": 1, "layer_drop": 0.1, "drop_path": None, "layer_scale": None},
    mask={"num_masks": 3, "prob": 0.6, "length": 2, "prob_adjust": 0.1},
    target={"top_k": 2, "layer_norm": "instance", "final_norm": "layer"},
)
TINY_2_SPEECH = _second(TINY_SPEECH, "speech", {}, mask={"num_masks": 2, "length": 3})
TINY_2_TEXT = _second(
    TINY_TEXT,
    "text",
    {"decoder": {**_DECODER, "groups": 1, "residual": False, "projection": 2}},
    mask={"num_masks": 2},
    loss={"channel_reduction": "sum", "beta": 0},
)

# letters of the spoken words
TINY_CTC: dict[str, Any] = {
    **TINY,
    "d2v": {
        **{key: TINY["d2v"][key] for key in ("schedule", "run")},
        "modality": "speech",
        "objective": "ctc",
        "model": {key: value for key, value in TINY_SPEECH["d2v"]["model"].items() if key != "layer_drop"},
        "mask": {"prob": 0.3, "length": 3, "channel_length": 4},
        "data": {"num_workers": 0, "min_seconds": 0.3, "max_seconds": 1.0, "max_batch_seconds": 12},
    },
}

# the logged values that must be equal bit for bit in a resumed run
FIGURES = ("step", "epoch", "loss", "target_std", "prediction_std", "lr", "decay", "grad_norm", "skipped", "samples")


def tiny_file(folder: Path, base: dict[str, Any] = TINY, **changes: Any) -> Path:
    """Write a tiny configuration to a file; `changes` are dotted keys with `__` for the dot."""
    raw = tiny_raw(base, **{"d2v__run__dir": str(folder / "runs"), **changes})
    path = folder / "tiny.json"
    path.write_text(json.dumps(raw))
    return path


def tiny_raw(base: dict[str, Any] = TINY, **changes: Any) -> dict[str, Any]:
    """Return the content of `tiny_file`."""
    raw = copy.deepcopy(base)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return raw


def leave_out_reports(patch: Callable[[object, str, Any], None] = setattr) -> None:
    """Switch off pictures, events, probe and export, which take far longer than the tiny steps."""
    # the whole method, which imports matplotlib first: in every forked process
    patch(metrics.RunLog, "draw_curves", lambda self: None)
    patch(metrics, "_tensorboard", lambda *arguments: None)
    patch(metrics, "import_reports", lambda: None)
    patch(evaluation, "has_labels", lambda config: False)
    patch(export, "export_student", lambda run_folder, **options: "no export")


def figures(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """Return the log of a run without the values that depend on time."""
    lines = (folder / "runs" / name / "log.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in FIGURES) for line in lines]


def failure_status(said: str) -> int:
    """Return the exit status that belongs to an error message: 2 for a wrong option, else 1."""
    return 2 if said.startswith(("error: `--", "error: `NAME`")) else 1


def run_here(*arguments: object) -> int:
    """Run the command line in this process."""
    return main([str(argument) for argument in arguments])


def start(
    arguments: list[object],
    output: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Fork a process that runs the command line, after `before`; its output goes to a file. Returns its id."""
    import_what_runs_need()

    def work() -> int:
        # threads of the tokenizer do not survive a fork
        os.environ.update({"TOKENIZERS_PARALLELISM": "false", **(environment or {})})
        torch.set_num_threads(1)
        before()
        return run_here(*arguments)

    return fork(work, output)


@functools.cache
def import_what_runs_need() -> None:
    """Import and compile once, for all processes that are forked from here, what the tiny runs import and compile."""
    for name in (
        "torch._dynamo",
        "d2v_fast.training.prepare",
        "d2v_fast.modalities.vision.batches",
        "safetensors.torch",
        "torch.profiler",
    ):
        importlib.import_module(name)
    digits._load_scans()
    block_mask_rows(0, 0, np.arange(2), 4, 9, 2, None, 0.3)


def fork(work: Callable[[], int], output: Path) -> int:
    """Fork a process that ends with the status that `work` returns; its output goes to a file. Returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 99
    # DeepSpeed collects garbage often, which would look at everything that the parent made, and copy these pages
    gc.freeze()
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(*children: int, timeout_s: float = 120) -> list[int]:
    """Return the exit statuses of forked processes; a process ended by signal N has status -N."""
    statuses, deadline = [], time.monotonic() + timeout_s
    for child in children:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                for other in children[len(statuses) :]:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
                raise TimeoutError(f"process {child} did not end in {timeout_s} s")
            time.sleep(0.01)
        statuses.append(os.waitstatus_to_exitcode(ended[1]))
    return statuses


def run_forked(
    *arguments: object, output: Path, num_processes: int = 1, before: Callable[[], None] = lambda: None
) -> list[int]:
    """Run the command line in forked processes, as a launcher would describe them; returns their exit statuses."""
    return wait(*start_ranks(list(arguments), output, num_processes, before))


def start_ranks(
    arguments: list[object], output: Path, num_processes: int, before: Callable[[], None] = lambda: None
) -> list[int]:
    """Fork the processes of one run, as a launcher would describe them; returns their ids by rank."""
    if num_processes == 1:
        return [start(arguments, output, before=before)]
    import_deepspeed()
    common = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(arguments, output, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, before)
        for rank in range(num_processes)
    ]


def in_processes(count: int, folder: Path, work: Callable[[World, Path], Any], timeout_s: float = 120) -> list[Any]:
    """Run `work` in `count` forked processes of one world, one thread each; return its results, passed as JSON."""
    import_deepspeed()
    described = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def child(rank: int) -> int:
        os.environ.update({**described, "RANK": str(rank), "LOCAL_RANK": str(rank), "DEEPSPEED_TIMEOUT": "1"})
        torch.set_num_threads(1)
        try:
            world = World("cpu", grouped=True)
            (folder / f"{rank}.json").write_text(json.dumps(work(world, folder)))
            world.close()
        except Exception:
            (folder / f"{rank}.json").write_text(json.dumps(traceback.format_exc()))
            return 1
        return 0

    children = [fork(lambda rank=rank: child(rank), folder / f"{rank}.out") for rank in range(count)]
    statuses = wait(*children, timeout_s=timeout_s)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    assert statuses == [0] * count, results
    return results


def import_deepspeed() -> None:
    """Import DeepSpeed once, which is slow, for all processes that are forked from here."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed_start.load(torch.device("cpu"))
        deepspeed_start.load_zero()
        # what a run imports when it makes its engine and at its first step; other versions may have other modules
        for name in ("torch._dynamo", "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        # for the tests that call `deepspeed.initialize` themselves
        _never_compiling.enter_context(deepspeed_internals.without_compiling(torch.device("cpu")))


def processes(*words: str) -> dict[int, dict[str, str]]:
    """Return ids and environments of the running processes whose command line contains all these words."""
    found = {}
    for folder in Path("/proc").iterdir():
        # a process may end while it is read
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if folder.name.isdecimal() and all(word in line for word in words):
                entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(folder.name)] = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return found


def until(condition: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not happen in {timeout_s} s")
        time.sleep(0.02)


def logged_steps(folder: Path, name: str) -> int:
    """Return the number of steps in the log of a run."""
    path = folder / "runs" / name / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
