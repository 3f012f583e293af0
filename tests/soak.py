"""Training is killed again and again, and must end as if nothing had happened.

    python -m tests.soak --kills 200
    python -m tests.soak --sequences 10

Processes that train are killed (SIGKILL) at random moments, a share of them while a checkpoint is being written, and
started again with `--resume`. In the end the last checkpoint and the log must equal those of a run that nobody
disturbed bit for bit, every attempt must have begun where the newest complete checkpoint was, and what the loaders
handed out, without the steps that were lost and done again, must hold every sample exactly as often as it should.

The processes are forked from one that has imported everything, so that a kill costs little more than its delay.

With `--sequences`, runs go on with other processes, ZeRO stages, accumulation and workers instead (`soak_sequences`).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers.soak_runs import BASES, Runs, is_alive, soak_file, warm_up
from tests.helpers.soak_sequences import soak_sequences

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


def soak(
    folder: Path,
    kills: int,
    *,
    modality: str = "images",
    processes: int = 1,
    workers: int = 0,
    seed: int | None = None,
) -> Report:
    """Disturb runs in `folder` until `kills` processes have been killed, and compare each of them when it ends.

    Args:
        modality: "images", "speech" or "text", with the published rates of stochastic depth and layer-drop.
        processes: of each run; more than one run on DeepSpeed, with ZeRO stage 1.
        workers: data loading processes of each of them, which are killed as well.
        seed: of the moments; the machine's load makes them differ all the same.
    """
    draw = random.Random(seed)
    changes: dict[str, Any] = {"d2v__schedule__steps": STEPS, "d2v__data__num_workers": workers}
    if processes > 1:
        changes["zero_optimization__stage"] = 1
    run = Runs(folder, soak_file(folder, modality, **changes))
    warm_up(run.file)
    report = Report()
    started = time.monotonic()
    run.run("whole", processes)
    patience_s = time.monotonic() - started
    started = time.monotonic()
    name, attempt = "run-1", 0
    while True:
        children = run.start(name, attempt, processes)
        is_last = report.kills >= kills
        in_save = not is_last and _kill(run, name, children, patience_s, draw, report)
        statuses = run.ended(children)
        finished = statuses == [0] * processes
        if not finished:
            if is_last:
                raise AssertionError(f"{statuses} without a kill:\n{run.output.read_text()}")
            report.kills_in_save += in_save
            report.restarts += 1
            run.stopped(name, attempt)
            attempt += 1
            continue
        lost, twice = run.compare_bits(name, attempt)
        report.samples_lost, report.samples_twice = report.samples_lost + lost, report.samples_twice + twice
        report.runs += 1
        if is_last:
            break
        name, attempt = f"run-{report.runs + 1}", 0
    report.seconds_per_kill = round((time.monotonic() - started) / max(1, kills), 2)
    report.most_steps_done_again = run.most_steps_done_again
    report.problems = tuple(run.problems)
    return report


def _kill(run: Runs, name: str, children: list[int], patience_s: float, draw: random.Random, report: Report) -> bool:
    """Kill one process of the run at a random moment; True where a checkpoint was being written."""
    target = draw.choice(children)
    if draw.random() < 0.5:
        # half of the time wait for the beginning of a save that this attempt makes
        saves_to_wait = draw.randrange(1, 6)
        begun: set[str] = set()
        while len(begun) < saves_to_wait and is_alive(target):
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
    if not is_alive(target):
        return False
    os.kill(victim, signal.SIGKILL)
    report.kills += 1
    report.kills_of_loader_workers += victim != target
    return in_save


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=0, help="instead of kills of runs that stay as they are")
    parser.add_argument("--modality", choices=[*BASES], default=None, help="of the sequences: all in turn by default")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: Any
    with tempfile.TemporaryDirectory() as folder:
        if options.sequences:
            modalities = [options.modality] if options.modality else [*BASES]
            report = soak_sequences(Path(folder), options.sequences, modalities=modalities, seed=options.seed)
        else:
            report = soak(
                Path(folder),
                options.kills,
                modality=options.modality or "images",
                processes=options.processes,
                workers=options.workers,
                seed=options.seed,
            )
    for key, value in asdict(report).items():
        print(f"{key.replace('_', ' ')}: {value}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
