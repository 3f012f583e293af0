"""Predict and measure peak memory per process on a CPU in short runs; print a Markdown table.

    python bench/memory_per_rank.py                      # ViT-B in 1, 2 and 4 processes, stages 0 to 3, fp32
    python bench/memory_per_rank.py --dtypes bf16 --processes 2
    python bench/memory_per_rank.py --stages 2 3 --offload optimizer
    python bench/memory_per_rank.py --largest            # without runs: which model fits on how many GPUs

The runs set `MALLOC_MMAP_THRESHOLD_`, so that the C library returns freed memory and the resident memory is that of the
tensors. `--malloc default` keeps the library's default.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from d2v_fast.config import load_config
from d2v_fast.memory.predict import Prediction, predict, predict_from
from d2v_fast.memory.sizes import Shapes, shapes_of
from d2v_fast.memory.step import StepMemory, step_memory

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
# name, width, depth, heads: ViT-B, ViT-L, and larger models of the same architecture
MODELS = (
    ("86 M", 768, 12, 12),
    ("304 M", 1024, 24, 16),
    ("1 B", 1536, 36, 24),
    ("3 B", 2560, 40, 32),
    ("10 B", 4096, 50, 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--offload", choices=["none", "optimizer", "all"], default="none")
    parser.add_argument("--malloc", choices=["returns", "default"], default="returns")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "vision_base.json")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--largest", action="store_true")
    options = parser.parse_args()
    if options.largest:
        for line in sizes_table():
            print(line, flush=True)
        return
    print("| processes | stage | dtype | offload | predicted MB | measured MB | difference |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images")
        for dtype in options.dtypes:
            for processes in options.processes:
                for stage in options.stages:
                    overrides = [
                        f"d2v.data.path={folder}/images",
                        *settings(processes, stage, dtype, options.offload),
                        *options.overrides,
                    ]
                    config = load_config(options.config, overrides, processes)
                    predicted = predict(config, processes, DTYPES[dtype], "cpu").device_peak
                    measured = run(options.config, overrides, processes, Path(folder), options.malloc)
                    difference = 100 * (predicted / measured - 1)
                    print(
                        f"| {processes} | {stage} | {dtype} | {options.offload} | {predicted / 1e6:.0f} "
                        f"| {measured / 1e6:.0f} | {difference:+.1f} % |",
                        flush=True,
                    )


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settings(processes: int, stage: int, dtype: str, offload: str) -> list[str]:
    """Return the overrides of a short run with one sample per process."""
    zero: dict[str, Any] = {"stage": stage}
    if offload != "none" and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "all" and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    return [
        f"train_batch_size={processes}",
        "train_micro_batch_size_per_gpu=1",
        f"zero_optimization={json.dumps(zero)}",
        f"bf16.enabled={json.dumps(dtype == 'bf16')}",
        "d2v.data.num_workers=0",
        "d2v.model.drop_path=0",
        "d2v.schedule.epochs=null",
        "d2v.schedule.warmup_epochs=null",
        f"d2v.schedule.steps={STEPS}",
        "d2v.run.device=cpu",
        "d2v.run.log_every=1",
    ]


def make_images(folder: Path) -> None:
    """Write a few small images of noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(16):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def run(config: Path, overrides: list[str], processes: int, folder: Path, malloc: str) -> int:
    """Train for a few steps and return the peak from the run's log."""
    name = "run"
    script = [str(ROOT / "d2v_fast" / "train.py"), "--ds_config", str(config), "--run-name", name]
    for override in [*overrides, f"d2v.run.dir={folder}"]:
        script += ["--set", override]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if malloc == "returns":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    entries = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / name)
    return max(entry["peak_memory_bytes"] for entry in entries)


def sizes_table() -> Iterator[str]:
    """Yield the lines of a table: predicted GB per GPU in bf16 with a micro-batch of 1."""
    yield "| model | stage | offload | 1 GPU | 8 | 64 | 1,024 | largest part |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, width, depth, heads in MODELS:
        for stage in (0, 1, 2, 3):
            for offload in ("none", "optimizer", "all"):
                if (offload != "none" and stage == 0) or (offload == "all" and stage < 3):
                    continue
                found = [predicted_for(width, depth, heads, stage, offload, n) for n in (1, 8, 64, 1024)]
                cells = " | ".join(map(cell, found))
                yield f"| {name} | {stage} | {offload} | {cells} | {largest(found[0])}, {largest(found[-1])} |"


def predicted_for(width: int, depth: int, heads: int, stage: int, offload: str, processes: int) -> Prediction:
    """Predict the memory of a model on GPUs in bf16."""
    overrides = [
        "d2v.data.path=/none",
        f"d2v.model.width={width}",
        f"d2v.model.depth={depth}",
        f"d2v.model.heads={heads}",
        *settings(processes, stage, "bf16", offload),
    ]
    config = load_config(ROOT / "configs" / "vision_base.json", overrides, processes)
    autocast = not config.deepspeed.needs_deepspeed(processes)
    key = (width, depth, heads, autocast)
    if key not in _counted:
        step = step_memory(config.d2v, 1, torch.bfloat16, autocast=autocast, device_type="cuda")
        _counted[key] = (shapes_of(config), step)
    return predict_from(config, processes, torch.bfloat16, "cuda", *_counted[key])


# cached by model and autocast
_counted: dict[tuple[int, int, int, bool], tuple[Shapes, StepMemory]] = {}


def cell(found: Prediction) -> str:
    """Format permanent memory and peak of the device, and permanent memory of the host if any."""
    text = f"{found.device_state / 1e9:.3g} / {found.device_peak / 1e9:.3g}"
    return text + (f" + {found.host_state / 1e9:.3g}" if found.host_state else "")


def largest(found: Prediction) -> str:
    """Return the name of the largest part on the device."""
    return max(found.parts, key=lambda part: part.device).name


if __name__ == "__main__":
    main()
