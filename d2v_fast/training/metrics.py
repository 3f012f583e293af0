"""Reports of a run: `log.jsonl`, TensorBoard events, `curves.png`, and a progress bar or plain lines."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from d2v_fast.checkpoints.best import read_validations
from d2v_fast.config import StepGuardConfig
from d2v_fast.data.listing import counted
from d2v_fast.data.progress import TimeLeft
from d2v_fast.figures.curves import draw_curves
from d2v_fast.files.reading import append_regular, open_regular, parse_json, read_json
from d2v_fast.training.run_folder import RunFolder, is_number, is_probes

Entry = dict[str, Any]

LOG = "log.jsonl"
# lines of the log that are not entries are moved here
_BAD_LINES = "log.bad.txt"
# an entry has a few hundred bytes
_MAX_LINE_BYTES = 2**20
_MAX_PROBES_BYTES = 64_000_000
_NUM_NAMED = 5
# keys of every entry, which the curves and the guard read
_FIGURES = ("loss", "lr", "grad_norm")


class Speed:
    """Measure samples per second of training, and seconds since construction.

    Args:
        samples: Samples that were seen before, in earlier processes of the run.
    """

    def __init__(self, samples: int) -> None:
        self._start = self._last = time.monotonic()
        self._samples = samples

    def since_last(self, samples: int) -> Entry:
        """Return `samples_per_s` since the last call, and `seconds`. `samples` counts all samples of the run."""
        now = time.monotonic()
        speed = (samples - self._samples) / max(1e-9, now - self._last)
        self._last, self._samples = now, samples
        return {"samples_per_s": round(speed, 1), "seconds": round(now - self._start, 3)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, which is not training, from the speed."""
        started = time.monotonic()
        yield
        self._last += time.monotonic() - started


class Log(Protocol):
    """The reports that the training loop writes; see `RunLog`."""

    def write(self, entry: Entry) -> None: ...
    def advance(self, step: int) -> None: ...
    def say(self, text: str) -> None: ...
    def draw_curves(self) -> None: ...
    def close(self) -> None: ...


class NoLog:
    """A log that reports nothing, for all processes but the first."""

    def write(self, entry: Entry) -> None: ...
    def advance(self, step: int) -> None: ...
    def say(self, text: str) -> None: ...
    def draw_curves(self) -> None: ...
    def close(self) -> None: ...


def import_reports() -> None:
    """Import the packages of `RunLog` before the run's memory is measured. A missing one is reported when needed."""
    for module in ("torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        with suppress(Exception):
            importlib.import_module(module)


class RunLog:
    """Write the reports of a run. Only the first process has one.

    Args:
        folder: The run folder.
        num_steps: Optimizer steps of the whole run.
        start_step: Steps already made. Log entries of later steps belong to a lost part of the run and are dropped.
        guard: Settings whose limits are drawn in `curves.png`; None draws none.
    """

    def __init__(
        self, folder: RunFolder, num_steps: int, start_step: int, guard: StepGuardConfig | None = None
    ) -> None:
        self._folder, self._guard = folder, guard
        self._num_steps = num_steps
        self._left = TimeLeft(num_steps)
        self._progress: _Bar | None = None
        entries, bad = _read_lines(folder.path / LOG)
        if bad:
            # save them before the log is rewritten without them
            with append_regular(folder.path / _BAD_LINES) as file:
                file.write(b"".join(bad.values()).rstrip(b"\n") + b"\n")
            numbers = ", ".join(map(str, list(bad)[:_NUM_NAMED])) + (", ..." if len(bad) > _NUM_NAMED else "")
            self.say(
                f"{LOG} holds {counted(len(bad), 'line')} that cannot be read (line {numbers}): moved to {_BAD_LINES}; "
                "the rest is kept"
            )
        entries = [entry for entry in entries if entry["step"] <= start_step]
        folder.write_text(LOG, "".join(json.dumps(entry) + "\n" for entry in entries))
        self._file = (folder.path / LOG).open("a", encoding="utf-8")
        self._events = _tensorboard(folder.path, start_step)
        self._progress = _progress_bar(num_steps, start_step) if sys.stdout.isatty() else None

    def write(self, entry: Entry) -> None:
        """Report one logged step. NaN and infinity are written as null, since JSON has neither."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for key, value in clean.items():
            if self._events is not None and key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, entry["step"])
        if self._progress is not None:
            self._progress.show(_figures(entry))
        else:
            self.say(f"step {entry['step']}/{self._num_steps}  {_figures(entry)}{self._left}")

    def advance(self, step: int) -> None:
        """Update the progress bar and the time left. This is cheap enough for every step."""
        self._left.report(step)
        if self._progress is not None:
            self._progress.advance(step, str(self._left))

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._progress is not None:
            self._progress.say(text)
        else:
            print(text, flush=True)

    def draw_curves(self) -> None:
        """Replace `curves.png` with curves of the whole log and all probes. Report a missing matplotlib once."""
        try:
            import matplotlib.backends.backend_agg  # noqa: F401
        except Exception as error:
            _say_missing(self.say, "curves.png", "matplotlib", error)
            return
        path = self._folder.path
        draw_curves(read_log(path), path / "curves.png", self._guard, read_probes(path), read_validations(path))

    def close(self) -> None:
        """Close the progress bar and the files. `say` still works, and `close` may be called again."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        if self._events is not None:
            self._events.close()
        self._file.close()


def read_log(folder: Path) -> list[Entry]:
    """Return the entries of `log.jsonl` without unreadable lines."""
    return _read_lines(folder / LOG)[0]


def _read_lines(path: Path) -> tuple[list[Entry], dict[int, bytes]]:
    """Return the entries of a log, and the lines that are not entries by their 1-based numbers."""
    entries: list[Entry] = []
    bad: dict[int, bytes] = {}
    if not path.exists():
        return entries, bad
    with open_regular(path) as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            try:
                # a power failure leaves zero bytes before the next write
                entry = parse_json(line.strip(b"\0\r\n").decode())
            except ValueError:
                entry = None
            if _is_entry(entry):
                entries.append(entry)
            elif line.strip(b"\0 \t\r\n"):
                bad[number] = line
    return entries, bad


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_number(entry.get("step"), int):
        return False
    return all(key in entry and (entry[key] is None or is_number(entry[key])) for key in _FIGURES)


def read_probes(folder: Path) -> list[Entry]:
    """Return the entries of `probe.json`, or none if the file is missing or cannot be read."""
    with suppress(OSError, ValueError):
        found = read_json(folder / "probe.json", _MAX_PROBES_BYTES)
        if is_probes(found):
            entries: list[Entry] = found
            return entries
    return []


def _figures(entry: Mapping[str, Any]) -> str:
    keys = list(entry)
    # what the objective adds stands between the loss and the learning rate
    own = keys[keys.index("loss") + 1 : keys.index("lr")]
    shown = [f"loss {entry['loss']:.4f}", *(f"{key.replace('_', ' ')} {entry[key]:.3f}" for key in own)]
    return "  ".join([*shown, f"{entry['samples_per_s']:.0f} samples/s"])


class _Bar:
    """The progress bar on a terminal."""

    def __init__(self, num_steps: int, start_step: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
        self._num_steps, self._step = num_steps, start_step
        self._figures, self._left = "making the first batch", ""
        self._bar = Progress(*columns, refresh_per_second=4)
        self._task = self._bar.add_task("", total=num_steps)
        self._update()
        self._bar.start()

    def advance(self, step: int, left: str) -> None:
        self._step, self._left = step, left
        self._update()

    def show(self, figures: str) -> None:
        """Replace the values, which stay until the next logged step."""
        self._figures = figures
        self._update()

    def _update(self) -> None:
        text = f"step {self._step}/{self._num_steps}  {self._figures}{self._left}"
        self._bar.update(self._task, completed=self._step, description=text)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def _progress_bar(num_steps: int, start_step: int) -> _Bar | None:
    try:
        return _Bar(num_steps, start_step)
    except Exception as error:
        _say_missing(print, "progress bar", "rich", error)
        return None


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:
        _say_missing(print, "TensorBoard events", "tensorboard", error)
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)


_said: set[str] = set()


def _say_missing(say: Any, what: str, package: str, error: Exception) -> None:
    """Print once that a report is not written, and why. Incompatible packages can raise any exception on import."""
    if isinstance(error, ModuleNotFoundError):
        reason = "is not installed"
    else:
        lines = str(error).splitlines() or [""]
        reason = f"cannot be imported ({type(error).__name__}: {lines[0]})"
    text = f"no {what}: {package} {reason}"
    if text not in _said:
        _said.add(text)
        say(text)
