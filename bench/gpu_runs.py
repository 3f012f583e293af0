"""Small training runs on a device: train, kill, resume bit for bit; and ZeRO 0 to 3 with the same losses.

python bench/gpu_runs.py --device cuda --out build/gpu/runs.txt

The run that is timed comes first and alone; the others run at the same time. A line per check is written as it ends.
What a run printed is shown when it ends, or when this program is interrupted. The exit status is 1 if a check failed.
On a CPU the runs are smaller, and the first line says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Size(NamedTuple):
    """Size of the runs. The step after which one is killed lies between two checkpoints.

    Attributes:
        batch_size: Samples of a step.
        steps, save_every, kill_after, log_every: Numbers of steps.
    """

    batch_size: int
    steps: int
    save_every: int
    kill_after: int
    log_every: int


SIZES = {"cuda": Size(64, 120, 50, 70, 10), "cpu": Size(16, 24, 10, 14, 2)}
# between ZeRO stages, which add gradients in other orders; bf16 has 8 bits
RTOL = 0.02
NOT_COMPARED = ("seconds", "samples_per_s", "peak_memory_bytes")


class Runs:
    """Starts runs of `configs/digits.json` and reports checks.

    Args:
        device: "cuda" or "cpu".
        out: File to which checks are appended.
        scratch: Folder of the runs.
    """

    def __init__(self, device: str, out: Path, scratch: Path) -> None:
        self._device, self._size, self._out, self._scratch = device, SIZES[device], out, scratch
        self._lock = threading.Lock()
        self._outputs: dict[str, Path] = {}
        self.failed = 0

    def report(self, name: str, passed: bool | None, detail: str) -> None:
        """Append a check to the file; `passed` is None if it cannot run here."""
        word = {True: "ok", False: "FAILED", None: "skipped"}[passed]
        self.failed += passed is False
        self._write(f"{word:8} {name}: {detail}")

    def _write(self, line: str) -> None:
        with self._lock, self._out.open("a") as file:
            print(line, flush=True)
            file.write(line + "\n")

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a run in a process of its own; with `--resume` among the options it goes on."""
        changes = {
            "train_batch_size": self._size.batch_size,
            "d2v.schedule.steps": self._size.steps,
            "d2v.schedule.warmup_steps": self._size.steps // 6,
            # the probe at the end is none of the checks
            "d2v.probe.num_draws": 1,
            "d2v.probe.max_samples": 100,
            "d2v.probe.labels_per_class": 2,
            "d2v.run.device": self._device,
            "d2v.run.dir": self._scratch,
            "d2v.run.log_every": self._size.log_every,
            "d2v.run.save_every": self._size.save_every,
        }
        settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "d2v_fast", "train", "configs/digits.json", *settings, "--run", name, *options]
        # runs at the same time share the cores
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        path = self._scratch / f"{name}{''.join(option for option in options if option == '--resume')}.out"
        self._outputs[name] = path
        with path.open("wb") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a run's log that are complete."""
        path = self._scratch / name / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def end(self, name: str, process: subprocess.Popen[bytes]) -> str | None:
        """Wait for a run and show what it printed; return its error, or None if it ended well."""
        status = process.wait()
        lines = self.show(name).splitlines()
        if status == 0:
            return None
        errors = [line for line in lines if "error" in line.lower()]
        return f"exit status {status}: {(errors or lines or ['it printed nothing'])[-1].strip()[:300]}"

    def show(self, name: str) -> str:
        """Print what a run has printed, once, and return it."""
        path = self._outputs.pop(name, None)
        text = "" if path is None else path.read_text(errors="replace")
        with self._lock:
            print(f"---- run {name}\n{text}", flush=True)
        return text

    def show_all(self) -> None:
        """Print what the runs that have not ended have printed."""
        for name in list(self._outputs):
            self.show(name)

    def check(self) -> None:
        """Run all checks."""
        size = self._size
        if self._device == "cpu":
            gpu = SIZES["cuda"]
            self._write(
                f"on a CPU: {size.steps} steps of {size.batch_size} images (GPU: {gpu.steps} of {gpu.batch_size})"
            )
        if (error := self.end("whole", self.start("whole"))) is not None:
            self.report("train", False, error)
            return
        whole = self.log("whole")
        is_finite = math.isfinite(whole[-1]["loss"])
        self.report("train, ZeRO 0 (plain torch)", is_finite, f"loss {whole[-1]['loss']:.5f}, {_speed(whole)}")
        killed, zero = self.start("killed"), {}
        if find_spec("deepspeed") is None:
            self.report("ZeRO 1 to 3", None, "deepspeed is not installed")
        else:
            changes = {stage: ("--set", f"zero_optimization.stage={stage}") for stage in (1, 2, 3)}
            zero = {stage: self.start(f"zero{stage}", *change) for stage, change in changes.items()}
        # each check is written as it ends, whichever is first; a daemon ends with an interrupted program
        resume = threading.Thread(target=self._try_to_resume, args=(killed, whole), daemon=True)
        resume.start()
        for stage, process in zero.items():
            self._finish_zero(stage, process, whole[-1]["loss"])
        resume.join()

    def _try_to_resume(self, process: subprocess.Popen[bytes], whole: list[dict[str, Any]]) -> None:
        """Report an error of the check itself, which would end its thread unseen."""
        try:
            self._kill_and_resume(process, whole)
        except Exception as error:
            self.report("kill and resume", False, f"the check ended with {error!r}")

    def _kill_and_resume(self, process: subprocess.Popen[bytes], whole: list[dict[str, Any]]) -> None:
        """Kill a run and resume it: its log must equal that of the run that was not killed."""
        name = "kill and resume"
        while process.poll() is None and not any(e["step"] >= self._size.kill_after for e in self.log("killed")):
            time.sleep(0.02)
        was_running = process.poll() is None
        process.kill()
        error = self.end("killed", process)
        before = len(self.log("killed"))
        if not was_running:
            self.report(name, False, f"the run ended before it was killed, {error}")
            return
        resumed_run = self.start("killed", "--resume")
        printed = self._outputs["killed"]
        if (error := self.end("killed", resumed_run)) is not None:
            self.report(name, False, f"the resumed run ended with {error}")
            return
        # a run that starts over has the same log
        saved = f"resumed after step {self._size.save_every}"
        if saved not in printed.read_text(errors="replace"):
            self.report(name, False, f'the resumed run did not print "{saved}"')
            return
        resumed = {entry["step"]: _without_times(entry) for entry in self.log("killed")}
        expected = {entry["step"]: _without_times(entry) for entry in whole}
        different = [step for step, entry in expected.items() if resumed.get(step) != entry]
        detail = f"killed after {before} logged steps, {len(expected) - len(different)} of {len(expected)} bit for bit"
        self.report(name, not different, detail + (f", not steps {different}" if different else ""))

    def _finish_zero(self, stage: int, process: subprocess.Popen[bytes], expected: float) -> None:
        """Wait for a run with a ZeRO stage: its last loss must be close to that of plain torch."""
        if (error := self.end(f"zero{stage}", process)) is not None:
            self.report(f"ZeRO {stage}", False, error)
            return
        log = self.log(f"zero{stage}")
        loss = log[-1]["loss"]
        self.report(f"ZeRO {stage}", abs(loss - expected) <= RTOL * expected, f"loss {loss:.5f}, {_speed(log)}")


def _speed(log: list[dict[str, Any]]) -> str:
    # the first logged steps compile and start up
    later = sorted(entry["samples_per_s"] for entry in log[len(log) // 2 :])
    return f"{later[len(later) // 2]:,.0f} samples/s"


def _without_times(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in NOT_COMPARED}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="file to which checks are appended")
    parser.add_argument("--scratch", type=Path, help="folder of the runs (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(arguments.device, arguments.out, (arguments.scratch or Path(temporary)).resolve())
        try:
            runs.check()
        except KeyboardInterrupt:
            # at its limit; the program that started this one ends the runs
            runs.show_all()
            return 130
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
