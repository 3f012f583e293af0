"""Runs that resume again and again with other processes, ZeRO stages, accumulation and workers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.runs import logged_steps
from tests.helpers.soak_runs import Runs, is_alive, soak_file, warm_up

TOLERANCE = 1e-5
# element-wise dropout may depend on the split
WITHOUT_DROPOUT = {"d2v__model__dropout": 0.0, "d2v__model__attention_dropout": 0.0}


@dataclass
class SequenceReport:
    """The outcome; `problems` is empty if nothing is wrong."""

    sequences: int = 0
    starts: int = 0
    signals: int = 0
    kills: int = 0
    samples_lost: int = 0
    samples_twice: int = 0
    largest_difference_of_a_loss: float = 0.0
    seconds_per_sequence: float = 0.0
    plans: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def soak_sequences(
    folder: Path,
    count: int,
    *,
    steps: int = 24,
    most_stops: int = 5,
    most_processes: int = 4,
    modalities: Sequence[str] = ("images", "speech", "text"),
    seed: int | None = None,
) -> SequenceReport:
    """Run `count` sequences in `folder` and compare each with an uninterrupted run of one process.

    A sequence is a run that is stopped by SIGTERM or SIGKILL at random steps, and goes on each time with another random
    division of its global batch. All samples must be those of the undisturbed run, each as often, and the loss of every
    step within `TOLERANCE` of it.

    Args:
        steps: optimizer steps of a run.
        most_stops: maximum number of stops of a sequence; the minimum is two.
        most_processes: maximum number of processes of a run.
        modalities: taken in turn.
        seed: of divisions and stops; the machine's load makes the steps of the stops differ all the same.
    """
    draw = random.Random(seed)
    report = SequenceReport()
    found: dict[str, Runs] = {}
    started = time.monotonic()
    for index in range(count):
        modality = modalities[index % len(modalities)]
        if modality not in found:
            found[modality] = _undisturbed(folder / modality, modality, steps)
        stops = sorted(draw.sample(range(1, steps), draw.randint(2, most_stops)))
        _sequence(found[modality], f"sequence-{index + 1}", stops, steps, most_processes, draw, report)
    report.seconds_per_sequence = round((time.monotonic() - started) / max(1, count), 1)
    report.problems = [f"{modality}, {problem}" for modality, runs in found.items() for problem in runs.problems]
    return report


def _undisturbed(folder: Path, modality: str, steps: int) -> Runs:
    changes: dict[str, Any] = {**WITHOUT_DROPOUT, "d2v__schedule": {"steps": steps, "warmup_steps": 3}}
    # where a second moment is next to nothing, Adam would make the last digits of a gradient count
    file = soak_file(folder, modality, **changes, optimizer__params__eps=1e-6)
    warm_up(file)
    runs = Runs(folder, file)
    runs.run("whole")
    return runs


def _sequence(
    runs: Runs,
    name: str,
    stops: list[int],
    steps: int,
    most_processes: int,
    draw: random.Random,
    report: SequenceReport,
) -> None:
    plan = []
    attempt = 0
    for stop in [*stops, None]:
        processes, options = _division(draw, most_processes)
        children = runs.start(name, attempt, processes, options)
        kills = stop is not None and draw.random() < 0.4
        if stop is not None and _interrupt(runs, (name, attempt), children, stop, kills, draw):
            report.kills, report.signals = report.kills + kills, report.signals + (not kills)
        statuses = runs.ended(children)
        report.starts += 1
        at = "to the end" if stop is None else f"{'killed' if kills else 'stopped'} after {stop}"
        plan.append(f"{processes} process{'es' * (processes > 1)}, {' '.join(options[1::2])}, {at}")
        if any(statuses) and not kills:
            raise AssertionError(f"{plan}: {statuses} without a kill:\n{runs.output.read_text()}")
        if logged_steps(runs.folder, name) == steps and not any(statuses):
            break
        runs.stopped(name, attempt)
        attempt += 1
    report.sequences += 1
    report.plans.append(f"{runs.folder.name}: {'; '.join(plan)}")
    lost, twice = runs.compare_samples(name, attempt)
    report.samples_lost, report.samples_twice = report.samples_lost + lost, report.samples_twice + twice
    largest = max(report.largest_difference_of_a_loss, runs.compare_losses(name, TOLERANCE))
    report.largest_difference_of_a_loss = largest


def _division(draw: random.Random, most_processes: int) -> tuple[int, list[str]]:
    """Draw a number of processes, and options for the rest of the division."""
    processes = draw.randint(1, most_processes)
    chosen = {
        "zero_optimization.stage": draw.randint(0, 3),
        "gradient_accumulation_steps": draw.choice([1, 2, 3]),
        "d2v.data.num_workers": draw.randint(0, 3),
    }
    if 24 % (processes * chosen["gradient_accumulation_steps"]):
        chosen["gradient_accumulation_steps"] = 2
    return processes, [part for key, value in chosen.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def _interrupt(
    runs: Runs, attempt: tuple[str, int], children: list[int], stop: int, kills: bool, draw: random.Random
) -> bool:
    """Kill or signal one process after this many logged steps; return False if the run ended before."""
    target = draw.choice(children)
    while not runs.has_begun(*attempt) or logged_steps(runs.folder, attempt[0]) < stop:
        if not all(map(is_alive, children)):
            return False
        time.sleep(0.002)
    if not is_alive(target):
        return False
    os.kill(target, signal.SIGKILL if kills else signal.SIGTERM)
    return True
