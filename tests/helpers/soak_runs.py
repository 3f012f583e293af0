"""Runs in forked processes that are stopped and restarted, with a record of the samples that their loaders yield."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.data import Step, StepLoader
from tests.helpers.runs import (
    TINY,
    TINY_SPEECH,
    TINY_TEXT,
    figures,
    leave_out_reports,
    run_here,
    start_ranks,
    tiny_file,
    wait,
)

# the published rates of stochastic depth and layer drop; data2vec's text model has none and takes that of speech
BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "images": (TINY, {"d2v__model__drop_path": 0.25, "d2v__model__depth": 4}),
    "speech": (TINY_SPEECH, {"d2v__model__layer_drop": 0.05, "d2v__model__depth": 4}),
    "text": (TINY_TEXT, {"d2v__model__layer_drop": 0.05, "d2v__model__depth": 4}),
}


def soak_file(folder: Path, modality: str, **changes: Any) -> Path:
    """Write a tiny configuration with the published drop rates, whose run writes below `folder` only."""
    folder.mkdir(parents=True, exist_ok=True)
    base, rates = BASES[modality]
    # a few steps cannot be expected to learn anything
    changes |= {"d2v__guard__min_prediction_std": 0.0, "d2v__guard__min_target_std": 0.0}
    if modality == "text":
        changes |= {"d2v__data__tokens_path": str(folder / "tokens")}
    return tiny_file(folder, base, **rates, **changes)


def warm_up(file: Path) -> None:
    """Import and compile once what every forked process needs."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        leave_out_reports(patch.setattr)
        arguments = ("--ds_config", file, "--run", "warm-up", "--set", 'd2v.schedule={"steps": 1}')
        assert run_here(*arguments, "--set", "zero_optimization.stage=0") == 0


class Runs:
    """Runs in one folder.

    Attributes:
        problems: descriptions of what is wrong.
        most_steps_done_again: the most steps that were repeated after a stop.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder, self.file = folder, file
        self.output = folder / "output"
        self.problems: list[str] = []
        self.most_steps_done_again = 0
        self._expected_start: dict[tuple[str, int], int] = {}
        self._processes: dict[tuple[str, int], int] = {}

    def start(self, name: str, attempt: int, processes: int = 1, options: Sequence[str] = ()) -> list[int]:
        """Fork the processes of a run or of its continuation; return their process ids by rank."""

        def prepare() -> None:
            leave_out_reports()
            path = self._handed_out(name, attempt, int(os.environ.get("RANK", "0")))
            _record(path)

        self._processes[name, attempt] = processes
        resume = ["--resume"] if (self.folder / "runs" / name).is_dir() else []
        arguments = ["--ds_config", self.file, "--run", name, *resume, *options]
        return start_ranks(arguments, self.output, processes, prepare)

    def run(self, name: str, processes: int = 1) -> None:
        """Run without an interruption."""
        statuses = wait(*self.start(name, 0, processes), timeout_s=600)
        assert statuses == [0] * processes, self.output.read_text()

    def ended(self, children: list[int]) -> list[int]:
        """Return the exit statuses; as a launcher does, end all processes when one of them dies."""
        statuses = {}
        while len(statuses) < len(children):
            for child in children:
                if child not in statuses and not is_alive(child):
                    [statuses[child]] = wait(child)
            if any(statuses.values()):
                for child in children:
                    if child not in statuses:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        return [statuses[child] for child in children]

    def has_begun(self, name: str, attempt: int) -> bool:
        """Return whether every process of an attempt has reached its first step."""
        ranks = range(self._processes[name, attempt])
        return all(_read(self._handed_out(name, attempt, rank))[0] is not None for rank in ranks)

    def unfinished(self, name: str) -> Iterator[Path]:
        """Return the checkpoints that are being written."""
        return (self.folder / "runs" / name / "checkpoints").glob("*.tmp-*")

    def stopped(self, name: str, attempt: int) -> None:
        """Record the step at which the next attempt must begin."""
        self._expected_start[name, attempt + 1] = self._newest(name)

    def compare_bits(self, name: str, last_attempt: int) -> tuple[int, int]:
        """Compare a finished run with "whole", the uninterrupted one; count the lost and the repeated samples."""
        if figures(self.folder, name) != figures(self.folder, "whole"):
            self.problems.append(f"{name}: the log differs")
        ours, theirs = self._tensors(name), self._tensors("whole")
        if ours.keys() != theirs.keys():
            self.problems.append(f"{name}: other tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
        differing = [key for key in ours.keys() & theirs.keys() if not _same_bits(ours[key], theirs[key])]
        if differing:
            self.problems.append(f"{name}: {len(differing)} tensors differ, such as {differing[0]}")
        return self.compare_samples(name, last_attempt)

    def compare_losses(self, name: str, tolerance: float) -> float:
        """Compare the loss of every step with the uninterrupted run; return the largest relative difference."""
        ours, theirs = ({entry[0]: entry[2] for entry in figures(self.folder, run)} for run in (name, "whole"))
        if ours.keys() != theirs.keys():
            self.problems.append(f"{name}: {len(ours)} steps are logged, not {len(theirs)}")
        largest = max(abs(ours[step] / theirs[step] - 1) for step in ours.keys() & theirs.keys())
        if largest > tolerance:
            self.problems.append(f"{name}: a loss differs by {largest:.1e}")
        return largest

    def compare_samples(self, name: str, last_attempt: int) -> tuple[int, int]:
        """Compare the samples of a finished run with the uninterrupted one; count the lost and the repeated ones."""
        whole, kept = self._samples("whole", 0), self._samples(name, last_attempt)
        lost, twice = whole - kept, kept - whole
        if lost or twice:
            self.problems.append(f"{name}: {lost.total()} samples lost, {twice.total()} seen twice")
        repeated = [key for key, count in whole.items() if count != 1]
        if repeated:
            self.problems.append(f"whole: an epoch saw a sample more than once: {repeated[:3]}")
        return lost.total(), twice.total()

    def _handed_out(self, name: str, attempt: int, rank: int) -> Path:
        return self.folder / f"{name}-{attempt}-{rank}.handed-out.jsonl"

    def _newest(self, name: str) -> int:
        names = (self.folder / "runs" / name / "checkpoints").glob("step-*")
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in names)
        return max((int(match[1]) for match in found if match), default=0)

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        newest = self.folder / "runs" / name / "checkpoints" / f"step-{self._newest(name)}"
        return {
            f"{path.relative_to(newest)}:{key}": value
            for path in sorted(newest.rglob("*.safetensors"))
            for key, value in load_file(path).items()
        }

    def _samples(self, name: str, last_attempt: int) -> Counter[tuple[int, int]]:
        """Count how often the final run used each (epoch, sample)."""
        kept: list[tuple[int, int, list[int]]] = []
        for attempt in range(last_attempt + 1):
            for rank in range(self._processes[name, attempt]):
                start_step, steps = _read(self._handed_out(name, attempt, rank))
                if start_step is None:
                    continue
                expected = self._expected_start.get((name, attempt), 0)
                if start_step != expected:
                    self.problems.append(f"{name}: attempt {attempt} began at step {start_step}, not {expected}")
                if rank == 0:
                    last = max((step for step, *_ in kept), default=0)
                    self.most_steps_done_again = max(self.most_steps_done_again, last - start_step)
                    kept = [entry for entry in kept if entry[0] <= start_step]
                kept += steps
        return Counter((epoch, sample) for _, epoch, samples in kept for sample in samples)


def _record(path: Path) -> None:
    """Make every loader of this process record the samples that it yields."""
    original = StepLoader.__iter__

    def recorded(self: StepLoader) -> Iterator[Step]:
        start_step = self.order.start_step
        with path.open("w", buffering=1) as file:
            file.write(json.dumps(start_step) + "\n")
            for number, step in enumerate(original(self), start=start_step + 1):
                samples = [int(sample) for batch in step.micro_batches for sample in batch.sample_ids]
                file.write(json.dumps([number, (number - 1) // self.order.steps_per_epoch, samples]) + "\n")
                yield step

    StepLoader.__iter__ = recorded  # type: ignore[method-assign]


def _read(path: Path) -> tuple[int | None, list[tuple[int, int, list[int]]]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if not lines:
        return None, []
    return json.loads(lines[0]), [tuple(json.loads(line)) for line in lines[1:]]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))


def is_alive(process: int) -> bool:
    """Return whether a child process is still running."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
