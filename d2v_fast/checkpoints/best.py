"""The validations of a fine-tuned run, and which of its checkpoints is the best one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from d2v_fast.files.reading import open_regular, parse_json

# one line for each validation
VALID = "valid.jsonl"
_MAX_LINE_BYTES = 2**20


def read_validations(run_folder: Path) -> list[dict[str, Any]]:
    """Return the entries of `valid.jsonl`, without lines that cannot be read."""
    path, entries = run_folder / VALID, []
    if not path.is_file():
        return []
    with open_regular(path) as file:
        while line := file.readline(_MAX_LINE_BYTES):
            try:
                entry = parse_json(line.strip(b"\0\r\n").decode())
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int) and "value" in entry:
                entries.append(entry)
    return entries


def written(entries: list[dict[str, Any]]) -> str:
    """Return the text of `valid.jsonl`."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def best_of(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the validation with the best value, of several equal ones the first; None without validations."""

    def rank(entry: dict[str, Any]) -> float:
        value = entry["value"]
        if value is None or not math.isfinite(value):
            return -math.inf
        return float(value if entry.get("more_is_better", True) else -value)

    return max(entries, key=rank, default=None)


def best_step(run_folder: Path) -> int | None:
    """Return the step of the best checkpoint of a run; None if it has not been validated."""
    best = best_of(read_validations(run_folder))
    return None if best is None else int(best["step"])
