"""Tiny runs that fine-tune, and what is compared of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.common import opened
from tests.helpers.runs import TINY

# what depends on time or on the place of a run
_VARYING = ("samples_per_s", "seconds", "peak_memory_bytes")

TINY_CLASSIFY: dict[str, Any] = {
    **TINY,
    "d2v": {
        "objective": "classify",
        "model": TINY["d2v"]["model"],
        "finetune": {"layer_decay": 0.8, "average_decay": 0.9},
        "schedule": {"steps": 6, "warmup_steps": 1, "kind": "constant"},
        "data": {key: value for key, value in TINY["d2v"]["data"].items() if key not in ("crop_scale", "flip_prob")},
        "valid": {"every_epochs": 0, "every_steps": 2, "batch_size": 100},
        "run": TINY["d2v"]["run"],
    },
}


def logged(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the log of a run without the values that depend on time."""
    lines = (folder / "runs" / name / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _VARYING} for line in lines]


def validations(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the validations of a run."""
    return [json.loads(line) for line in (folder / "runs" / name / "valid.jsonl").read_text().splitlines()]


def result(folder: Path, name: str) -> dict[str, Any]:
    """Return `result.json` of a run."""
    found: dict[str, Any] = json.loads((folder / "runs" / name / "result.json").read_text())
    return found


def saved(folder: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, whole, by `KIND/NAME`."""
    reader = opened(folder / "runs" / name / "checkpoints" / f"step-{step}").reader()
    return {one: reader.whole(one) for one in reader.shapes}
