"""Fine-tune once for each value of some keys and each seed, one process after another, and compare the results.

Every run is a run like any other, in the folder of the sweep. A run that has its result is not run again, so the same
command continues an interrupted sweep, and more values or seeds extend it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.command_lines import path_override, path_words
from d2v_fast.errors import OptionError
from d2v_fast.files.atomic import write_text
from d2v_fast.files.reading import append_regular, open_regular, parse_json, printable, read_json
from d2v_fast.processes.parent import end_with_parent
from d2v_fast.processes.signals import StopRequest

__all__ = ["Axis", "Cell", "Outcome", "Sweep", "parse_axis", "refuse_own_keys"]

SUMMARY = "sweep.json"
MAX_RUNS, MAX_SEEDS = 10_000, 1000
_MAX_BYTES = 64_000_000
_STOPPED = 130
# what an entry of the best validation holds beside its metrics
_ABOUT = ("step", "epoch", "samples", "value", "more_is_better", "seconds")
# keys that a sweep sets for every run -> what to do instead
_OWN_KEYS = {
    "d2v.run.seed": "`--seeds N` makes a run of every value with each of the seeds 0 to N - 1",
    "d2v.run.name": "every run is named by its values, and `--run NAME` names the sweep",
    "d2v.run.dir": "`--set d2v.run.dir=FOLDER` names the folder of all runs of the sweep",
}
# options of the sweep itself, with the number of their values; every run gets its own
_OWN = {"--sweep": 1, "--seeds": 1, "--run": 1, "--run-name": 1, "--resume": 0}


class Axis(NamedTuple):
    """A key of the configuration and the values that it takes, as text."""

    key: str
    values: tuple[str, ...]


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes:
        values: Value of every axis.
        seed: `d2v.run.seed`.
        name: Name of its run folder.
    """

    values: tuple[str, ...]
    seed: int
    name: str


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished", "failed", or "stopped" if it has not finished.
        metrics: The metrics of its best checkpoint; empty without a result.
        step: Optimizer step of that checkpoint.
        metric: Name of the metric that chose it.
        higher_is_better: Whether more of that metric is better.
        error: Why it failed, in one line.
        seconds: Duration of the last attempt; 0 if it had finished before.
    """

    status: str
    metrics: Mapping[str, float]
    step: int = 0
    metric: str = ""
    higher_is_better: bool = True
    error: str = ""
    seconds: float = 0.0


def parse_axis(text: str) -> Axis:
    """Read `KEY=VALUE,VALUE,...`. Commas within brackets, braces or quotes belong to a value.

    Raises:
        OptionError: The text is of another form, or a value is empty or appears twice.
    """
    key, equals, listed = text.partition("=")
    must = f"`--sweep {printable(text)}` must be of the form KEY=VALUE,VALUE, like optimizer.params.lr=1e-5,2e-5"
    values = tuple(part.strip() for part in listed.split(","))
    try:
        found = parse_json(f"[{listed}]")
        if len(found) != len(values):
            values = tuple(json.dumps(value) for value in found)
    except ValueError:
        pass
    if not equals or not all(key.strip().split(".")) or not values or not all(values):
        raise OptionError(f"{must}.")
    if len(set(values)) < len(values):
        raise OptionError(f"{must}, with every value once.")
    return Axis(key.strip(), values)


def refuse_own_keys(axes: Iterable[Axis], overrides: Iterable[str]) -> None:
    """Refuse keys that a sweep sets itself, among its axes and among the overrides of its runs.

    Raises:
        OptionError: One is given.
    """
    given = [("--sweep", axis.key) for axis in axes]
    given += [("--set", text.partition("=")[0].strip()) for text in overrides]
    # the folder of all runs
    given = [one for one in given if one != ("--set", "d2v.run.dir")]
    for (option, key), (own, instead) in product(given, _OWN_KEYS.items()):
        if own == key or own.startswith(f"{key}."):
            raise OptionError(
                f"`{option} {key}=...` must be left out, because a sweep sets `{own}` for every run: {instead}."
            )


class Sweep:
    """All runs of a sweep.

    Args:
        words: The arguments of the command, after its name; the options of the sweep are left out for the runs.
        axes: Swept keys; every combination of their values is run.
        num_seeds: Runs of each combination, with `d2v.run.seed` 0, 1, ...
        folder: Folder of the sweep, which holds a run folder and a log for each run, and sweep.json.
        command: Words that start one run, before `words`.
    Raises:
        OptionError: Two axes have one key, the runs are too many, or the folder holds a sweep of another command.
    """

    def __init__(
        self, words: Sequence[str], axes: Sequence[Axis], num_seeds: int, folder: Path, command: Sequence[str]
    ) -> None:
        keys = [axis.key for axis in axes]
        if len(set(keys)) < len(keys):
            raise OptionError("`--sweep` must name every key once; list all values of a key in one of them.")
        num_runs = math.prod(len(axis.values) for axis in axes) * num_seeds
        if num_runs > MAX_RUNS or num_seeds > MAX_SEEDS:
            raise OptionError(
                f"`--sweep` and `--seeds` must make at most {MAX_RUNS:,} runs with at most {MAX_SEEDS:,} seeds, but "
                f"make {num_runs:,} instead."
            )
        self.axes, self.folder = tuple(axes), folder
        self._command, self._words = list(command), without_own_options(words)
        combinations = product(*(axis.values for axis in axes))
        self.cells = _named(axes, [(values, seed) for values in combinations for seed in range(num_seeds)])
        self._refuse_other()

    def settings(self, cell: Cell) -> list[str]:
        """Return the swept keys of a run with their values, `dotted.key=value` each."""
        return [f"{axis.key}={value}" for axis, value in zip(self.axes, cell.values, strict=True)]

    def run(self, out: IO[str] = sys.stdout) -> int:
        """Run what has no result yet, print the table, write sweep.json, and return the exit status.

        Returns:
            0, 1 if a run failed, or 130 if a signal stopped the sweep; then the current run has saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        outcomes: dict[Cell, Outcome] = {}
        with StopRequest() as stop:
            for number, cell in enumerate(self.cells, 1):
                outcome = self._result(cell)
                if outcome is None:
                    outcome = self._start(cell, stop)
                outcomes[cell] = outcome
                print(f"[{number}/{len(self.cells)}] {self._line(cell, outcome)}", file=out, flush=True)
                write_text(self.folder / SUMMARY, json.dumps(self._summary(outcomes), indent=1) + "\n")
                if stop.requested:
                    print("stopped; the same command continues", file=out, flush=True)
                    return _STOPPED
        print(self.table(outcomes), file=out, flush=True)
        return int(any(outcome.status != "finished" for outcome in outcomes.values()))

    def table(self, outcomes: Mapping[Cell, Outcome]) -> str:
        """Return a table with a line for each combination of values: mean ± standard deviation, number of runs."""
        rows = self._rows(outcomes)
        metric = next((outcome.metric for outcome in outcomes.values() if outcome.metric), "")
        names = [axis.key for axis in self.axes]
        lines = [[*names, metric or "result", "runs", ""]]
        for row in rows:
            shown = "no result" if row["mean"] is None else f"{row['mean']:.4f} ± {row['std']:.4f}"
            failed = f"{row['failed']} failed" if row["failed"] else ""
            note = ", ".join(filter(None, ("best" if row["best"] else "", failed)))
            lines.append([*row["values"].values(), shown, str(row["runs"]), note])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, f"± is the standard deviation over seeds; all figures: {self.folder / SUMMARY}"])

    def _rows(self, outcomes: Mapping[Cell, Outcome]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        done = [outcome for outcome in outcomes.values() if outcome.status == "finished"]
        sign = 1 if not done or done[0].higher_is_better else -1
        for values in dict.fromkeys(cell.values for cell in self.cells):
            of_row = [outcome for cell, outcome in outcomes.items() if cell.values == values]
            found = [outcome.metrics[outcome.metric] for outcome in of_row if outcome.status == "finished"]
            rows.append(
                {
                    "values": dict(zip((axis.key for axis in self.axes), values, strict=True)),
                    "mean": float(np.mean(found)) if found else None,
                    "std": float(np.std(found)) if found else None,
                    "runs": len(found),
                    "failed": sum(outcome.status == "failed" for outcome in of_row),
                    "best": False,
                }
            )
        scored = [row for row in rows if row["mean"] is not None]
        if scored:
            max(scored, key=lambda row: sign * row["mean"])["best"] = True
        return rows

    def _summary(self, outcomes: Mapping[Cell, Outcome]) -> dict[str, Any]:
        runs = []
        for cell, outcome in outcomes.items():
            values = dict(zip((axis.key for axis in self.axes), cell.values, strict=True))
            run = {"run": cell.name, "values": values, "seed": cell.seed, "status": outcome.status}
            if outcome.status == "finished":
                run |= {"metric": outcome.metric, "metrics": dict(outcome.metrics), "best_step": outcome.step}
            runs.append(run | ({"error": outcome.error} if outcome.error else {}))
        return {"words": self._words, "table": self._rows(outcomes), "runs": runs}

    def _line(self, cell: Cell, outcome: Outcome) -> str:
        took = f", {outcome.seconds:.0f} s" if outcome.seconds else ", finished before"
        if outcome.status == "finished":
            value = outcome.metrics[outcome.metric]
            return f"{cell.name}: {outcome.metric} {value:.4f} at step {outcome.step:,}{took}"
        return f"{cell.name}: {outcome.status}" + (f": {outcome.error}" if outcome.error else "")

    def _refuse_other(self) -> None:
        path = self.folder / SUMMARY
        if not path.exists():
            return
        before = read_json(path, _MAX_BYTES, below=self.folder, max_values=_MAX_BYTES)
        words = before.get("words") if isinstance(before, dict) else None
        if words != self._words:
            shown = " ".join(map(str, words)) if isinstance(words, list) else "an unreadable sweep.json"
            raise OptionError(
                f"`--run` must name a new folder or a sweep of the same command, but {printable(str(self.folder))} "
                f"holds one of another: {printable(shown)}"
            )

    def _result(self, cell: Cell) -> Outcome | None:
        """Return the outcome of a run that has finished; None if it has not."""
        return read_result(self.folder / cell.name)

    def _start(self, cell: Cell, stop: StopRequest) -> Outcome:
        sets = [word for text in (*self.settings(cell), f"d2v.run.seed={cell.seed}") for word in ("--set", text)]
        begun = bool(complete_steps(self.folder / cell.name / "checkpoints"))
        own = [*sets, *path_override("d2v.run.dir", self.folder), "--run", cell.name, *(["--resume"] if begun else [])]
        log, since = self.folder / f"{cell.name}.log", time.monotonic()
        with append_regular(log) as file:
            status = _wait([*self._command, *self._words, *own], file, stop)
        seconds = time.monotonic() - since
        found = self._result(cell) if status == 0 else None
        if found is not None:
            return Outcome(**{**vars(found), "seconds": seconds})
        if stop.requested or status == 0:
            return Outcome("stopped", {}, seconds=seconds)
        return Outcome("failed", {}, error=_last_error(log, status), seconds=seconds)


def read_result(run: Path) -> Outcome | None:
    """Return the outcome of a run folder from its result.json; None if the run has not finished.

    Raises:
        ValueError: The file is not that of a fine-tuned run.
    """
    try:
        result = read_json(run / "result.json", _MAX_BYTES, below=run)
    except FileNotFoundError:
        return None
    best = result.get("best") if isinstance(result, dict) else None
    if not isinstance(best, dict):
        raise ValueError(f"`{printable(str(run))}` must be the folder of a fine-tuned run, but is that of another run.")
    step, value = int(best["step"]), best["value"]
    if value is None:
        return Outcome("failed", {}, step, error="its metric is not finite in any validation")
    named = {name: number for name, number in best.items() if name not in _ABOUT and isinstance(number, float)}
    return Outcome("finished", named, step, result["metric"], bool(best["more_is_better"]))


def without_own_options(words: Sequence[str]) -> list[str]:
    """Return the words of a command without the options of the sweep and without `d2v.run.dir`."""
    kept: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name in _OWN:
            if not equals:
                for _ in range(_OWN[name]):
                    next(left, None)
        elif name == "--set":
            setting = value if equals else next(left, "")
            if setting.partition("=")[0].strip() != "d2v.run.dir":
                kept += ["--set", setting]
        else:
            kept.append(word)
    return kept


def _named(axes: Sequence[Axis], cells: Iterable[tuple[tuple[str, ...], int]]) -> tuple[Cell, ...]:
    """Name the run of each cell by the last part of every key, its value, and the seed."""
    shorts = [axis.key.rpartition(".")[2] for axis in axes]
    shorts = [axis.key if shorts.count(short) > 1 else short for axis, short in zip(axes, shorts, strict=True)]
    found: dict[str, Cell] = {}
    for values, seed in cells:
        parts = [f"{short}_{_plain(value)}" for short, value in zip(shorts, values, strict=True)]
        base = "_".join([*parts, f"seed_{seed}"])
        name, number = base, 1
        while name in found:
            number += 1
            name = f"{base}.{number}"
        found[name] = Cell(values, seed, name)
    return tuple(found.values())


def _plain(value: str) -> str:
    """Return a value with the letters that the name of a run may have."""
    letters = "".join(letter if letter.isalnum() or letter in "._-" else "." for letter in value)
    # the folder's name has a limit of 255 bytes
    return letters[:40]


def _wait(command: Sequence[str], log: IO[bytes], stop: StopRequest) -> int:
    """Run a process to its end and return its status; a request to stop is passed on once."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent
    )
    told = False
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.requested and not told:
                process.send_signal(signal.SIGTERM)
                told = True


def _last_error(log: Path, status: int) -> str:
    """Return the last error in the log of a run, with the name of the log."""
    with open_regular(log) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    reason = errors[-1] if errors else next((line for line in reversed(lines) if line.strip()), "")
    return printable(f"{how}: {reason[:500]} ({path_words(log)})")
