"""Small training runs on a device: train, kill, resume bit for bit; and ZeRO 0 to 3 with the same losses.

python bench/gpu_runs.py --device cuda --out build/gpu/runs.txt

The run that is timed comes first and alone; the others run at the same time. A line per check is written as it ends.
The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# the step after which the run is killed lies between two checkpoints
STEPS, SAVE_EVERY, KILL_AFTER, LOG_EVERY = 120, 50, 70, 10
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
        self._device, self._out, self._scratch = device, out, scratch
        self.failed = 0

    def report(self, name: str, passed: bool | None, detail: str) -> None:
        """Append a check to the file; `passed` is None if it cannot run here."""
        word = {True: "ok", False: "FAILED", None: "skipped"}[passed]
        self.failed += passed is False
        line = f"{word:8} {name}: {detail}"
        print(line, flush=True)
        with self._out.open("a") as file:
            file.write(line + "\n")

    def start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a run in a process of its own; with `--resume` among the options it goes on."""
        changes = {
            "schedule.steps": STEPS,
            "schedule.warmup_steps": 20,
            # the probe at the end is none of the checks
            "probe.num_draws": 1,
            "run.device": self._device,
            "run.dir": self._scratch,
            "run.log_every": LOG_EVERY,
            "run.save_every": SAVE_EVERY,
        }
        settings = [word for key, value in changes.items() for word in ("--set", f"d2v.{key}={value}")]
        command = [sys.executable, "-m", "d2v_fast", "train", "configs/digits.json", *settings, "--run", name, *options]
        # runs at the same time share the cores
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a run's log that are complete."""
        path = self._scratch / name / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def check(self) -> None:
        """Run all checks."""
        if self.start("whole").wait() != 0:
            self.report("train", False, "the run ended with an error")
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
        self._kill_and_resume(killed, whole)
        for stage, process in zero.items():
            self._finish_zero(stage, process, whole[-1]["loss"])

    def _kill_and_resume(self, process: subprocess.Popen[bytes], whole: list[dict[str, Any]]) -> None:
        """Kill a run and resume it: its log must equal that of the run that was not killed."""
        while process.poll() is None and not any(entry["step"] >= KILL_AFTER for entry in self.log("killed")):
            time.sleep(0.02)
        was_running = process.poll() is None
        process.kill()
        process.wait()
        before = len(self.log("killed"))
        if not was_running:
            self.report("kill and resume", False, "the run ended before it was killed")
            return
        if self.start("killed", "--resume").wait() != 0:
            self.report("kill and resume", False, "the resumed run ended with an error")
            return
        resumed = {entry["step"]: _without_times(entry) for entry in self.log("killed")}
        expected = {entry["step"]: _without_times(entry) for entry in whole}
        different = [step for step, entry in expected.items() if resumed.get(step) != entry]
        detail = f"killed after {before} logged steps, {len(expected) - len(different)} of {len(expected)} bit for bit"
        self.report("kill and resume", not different, detail + (f", not steps {different}" if different else ""))

    def _finish_zero(self, stage: int, process: subprocess.Popen[bytes], expected: float) -> None:
        """Wait for a run with a ZeRO stage: its last loss must be close to that of plain torch."""
        if process.wait() != 0:
            self.report(f"ZeRO {stage}", False, "the run ended with an error")
            return
        loss = self.log(f"zero{stage}")[-1]["loss"]
        self.report(f"ZeRO {stage}", abs(loss - expected) <= RTOL * expected, f"loss {loss:.5f}")


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
        runs.check()
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
