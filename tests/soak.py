"""Training is killed again and again, and must end as if nothing had happened.

    python -m tests.soak --kills 200

Processes that train are killed (SIGKILL) at random moments, a share of them while a checkpoint is being written, and
started again with `--resume`. In the end the last checkpoint and the log must equal those of a run that nobody
disturbed bit for bit, every attempt must have begun where the newest complete checkpoint was, and what the loaders
handed out, without the steps that were lost and done again, must hold every sample exactly as often as it should.

The processes are forked from one that has imported everything, so that a kill costs little more than its delay.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from d2v_fast.data import Batch, StepLoader
from tests.runs import figures, leave_out_reports, run_here, start_ranks, tiny_file, wait

# optimizer steps of a run; it has two and a bit epochs
STEPS = 150


@dataclass
class Report:
    """What happened; `problems` is empty where everything is as it must be."""

    kills: int = 0
    kills_in_save: int = 0
    kills_of_loader_workers: int = 0
    restarts: int = 0
    runs: int = 0
    samples_lost: int = 0
    samples_twice: int = 0
    most_steps_done_again: int = 0
    seconds_per_kill: float = 0.0
    problems: tuple[str, ...] = ()


def soak(folder: Path, kills: int, *, processes: int = 1, workers: int = 0, seed: int | None = None) -> Report:
    """Disturb runs in `folder` until `kills` processes have been killed, and compare each of them when it ends.

    Args:
        processes: of each run; more than one run on DeepSpeed, with ZeRO stage 1.
        workers: data loading processes of each of them, which are killed as well.
        seed: of the moments; the machine's load makes them differ all the same.
    """
    draw = random.Random(seed)
    changes: dict[str, Any] = {"d2v__schedule__steps": STEPS, "d2v__data__num_workers": workers}
    if processes > 1:
        changes["zero_optimization__stage"] = 1
    run = _Runs(folder, tiny_file(folder, **changes), processes)
    _warm_up(run.file)
    report = Report()
    started = time.monotonic()
    statuses = wait(*run.start("whole", 0), timeout_s=600)
    assert statuses == [0] * processes, run.output.read_text()
    patience_s = time.monotonic() - started
    started = time.monotonic()
    name, attempt = "run-1", 0
    while True:
        children = run.start(name, attempt)
        is_last = report.kills >= kills
        in_save = not is_last and _kill(run, name, children, patience_s, draw, report)
        statuses = run.ended(children)
        finished = statuses == [0] * processes
        if not finished:
            if is_last:
                raise AssertionError(f"{statuses} without a kill:\n{run.output.read_text()}")
            report.kills_in_save += in_save
            report.restarts += 1
            run.killed(name, attempt)
            attempt += 1
            continue
        run.compare(name, attempt, report)
        report.runs += 1
        if is_last:
            break
        name, attempt = f"run-{report.runs + 1}", 0
    report.seconds_per_kill = round((time.monotonic() - started) / max(1, kills), 2)
    report.problems = tuple(run.problems)
    return report


def _warm_up(file: Path) -> None:
    """Import and compile here, once, what every forked process would need again."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        leave_out_reports(patch.setattr)
        arguments = ("--ds_config", file, "--run", "warm-up", "--set", 'd2v.schedule={"steps": 1}')
        assert run_here(*arguments, "--set", "zero_optimization.stage=0") == 0


def _kill(run: _Runs, name: str, children: list[int], patience_s: float, draw: random.Random, report: Report) -> bool:
    """Kill one process of the run at a random moment; True where a checkpoint was being written."""
    target = draw.choice(children)
    if draw.random() < 0.5:
        # half of the time wait for the beginning of a save that this attempt makes
        saves_to_wait = draw.randrange(1, 6)
        begun: set[str] = set()
        while len(begun) < saves_to_wait and _is_alive(target):
            begun |= {path.name for path in run.unfinished(name)}
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0, patience_s))
    victims = [target]
    if draw.random() < 0.25:
        victims = _children(target) or victims
    victim = draw.choice(victims)
    in_save = bool(list(run.unfinished(name)))
    if not _is_alive(target):
        return False
    os.kill(victim, signal.SIGKILL)
    report.kills += 1
    report.kills_of_loader_workers += victim != target
    return in_save


class _Runs:
    """Runs in one folder, with what their loaders handed out."""

    def __init__(self, folder: Path, file: Path, processes: int) -> None:
        self.folder, self.file, self.processes = folder, file, processes
        self.output = folder / "output"
        self.problems: list[str] = []
        self._expected_start: dict[tuple[str, int], int] = {}

    def start(self, name: str, attempt: int) -> list[int]:
        def prepare() -> None:
            leave_out_reports()
            path = self._handed_out(name, attempt, int(os.environ.get("RANK", "0")))
            _record(path)

        resume = ["--resume"] if (self.folder / "runs" / name).is_dir() else []
        return start_ranks(["--ds_config", self.file, "--run", name, *resume], self.output, self.processes, prepare)

    def ended(self, children: list[int]) -> list[int]:
        """Exit statuses; what a launcher does for several processes is done here: one that dies takes the others."""
        statuses = {}
        while len(statuses) < len(children):
            for child in children:
                if child not in statuses and not _is_alive(child):
                    [statuses[child]] = wait(child)
            if any(statuses.values()):
                for child in children:
                    if child not in statuses:
                        os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        return [statuses[child] for child in children]

    def unfinished(self, name: str) -> Iterator[Path]:
        return (self.folder / "runs" / name / "checkpoints").glob("*.tmp-*")

    def killed(self, name: str, attempt: int) -> None:
        """Note where the next attempt must begin."""
        self._expected_start[name, attempt + 1] = self._newest(name)

    def compare(self, name: str, last_attempt: int, report: Report) -> None:
        """Check a finished run against the undisturbed one."""
        if figures(self.folder, name) != figures(self.folder, "whole"):
            self.problems.append(f"{name}: the log differs")
        ours, theirs = self._tensors(name), self._tensors("whole")
        if ours.keys() != theirs.keys():
            self.problems.append(f"{name}: other tensors: {sorted(ours.keys() ^ theirs.keys())[:5]}")
        differing = [key for key in ours.keys() & theirs.keys() if not _same_bits(ours[key], theirs[key])]
        if differing:
            self.problems.append(f"{name}: {len(differing)} tensors differ, such as {differing[0]}")
        whole, kept = self._samples("whole", 0, report), self._samples(name, last_attempt, report)
        lost, twice = whole - kept, kept - whole
        report.samples_lost += lost.total()
        report.samples_twice += twice.total()
        if lost or twice:
            self.problems.append(f"{name}: {lost.total()} samples lost, {twice.total()} seen twice")
        repeated = [key for key, count in whole.items() if count != 1]
        if repeated:
            self.problems.append(f"whole: an epoch saw a sample more than once: {repeated[:3]}")

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

    def _samples(self, name: str, last_attempt: int, report: Report) -> Counter[tuple[int, int]]:
        """How often the run that counts in the end took each (epoch, sample)."""
        kept: list[tuple[int, int, list[int]]] = []
        for attempt in range(last_attempt + 1):
            for rank in range(self.processes):
                start_step, steps = _read(self._handed_out(name, attempt, rank))
                if start_step is None:
                    continue
                expected = self._expected_start.get((name, attempt), 0)
                if start_step != expected:
                    self.problems.append(f"{name}: attempt {attempt} began at step {start_step}, not {expected}")
                if rank == 0:
                    last = max((step for step, *_ in kept), default=0)
                    report.most_steps_done_again = max(report.most_steps_done_again, last - start_step)
                    kept = [entry for entry in kept if entry[0] <= start_step]
                kept += steps
        return Counter((epoch, sample) for _, epoch, samples in kept for sample in samples)


def _record(path: Path) -> None:
    """From now on every loader of this process writes down what it hands out."""
    original = StepLoader.__iter__

    def recorded(self: StepLoader) -> Iterator[list[Batch]]:
        start_step = self._order.start_step
        with path.open("w", buffering=1) as file:
            file.write(json.dumps(start_step) + "\n")
            for step, batches in enumerate(original(self), start=start_step + 1):
                samples = [int(sample) for batch in batches for sample in batch.sample_ids]
                file.write(json.dumps([step, (step - 1) // self.steps_per_epoch, samples]) + "\n")
                yield batches

    StepLoader.__iter__ = recorded  # type: ignore[method-assign]


def _read(path: Path) -> tuple[int | None, list[tuple[int, int, list[int]]]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if not lines:
        return None, []
    return json.loads(lines[0]), [tuple(json.loads(line)) for line in lines[1:]]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and bool(torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)))


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(
            Path(folder),
            options.kills,
            processes=options.processes,
            workers=options.workers,
            seed=options.seed,
        )
    for key, value in asdict(report).items():
        print(f"{key.replace('_', ' ')}: {value}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
