"""Build, test and measure on a machine with one GPU, within a time limit; `make gpu` calls it.

python bench/gpu.py --out build/gpu --device cuda --seconds 360

The parts run one after the other: build, tests that use the device, kernels, steps, small runs, compiled peers, report.
Each has a limit; the time that one leaves goes to the later ones. Everything is written as it comes, so a program that
is stopped at any moment leaves what it found, in at most eight files:

- summary.txt: failed tests first, then the state of each part and the machine; rewritten every second.
- outcomes.log, outcomes.log.failures: a line per test, and tracebacks.
- figures.jsonl: a line per benchmark, in the format that `bench/report.py` reads.
- runs.txt: a line per check of a run.
- log.txt: what all programs printed.
- report.tar: tables and plots.

The exit status is 0 if all parts ended well, 1 if something failed, and 3 if nothing failed but a limit cut a part
short. A part whose packages are missing is skipped, and the summary names them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "d2v_fast" / "_C.so"
# what the library was built from by this program
BUILT = ROOT / "build" / "gpu-library.json"
# between SIGINT and SIGKILL, so that pytest can print its summary
GRACE_S = 5.0
# kept for tables and plots, but at most a tenth of all
REPORT_S = 20.0
MAX_PROCESSES = 13
# of the summary that is printed at the end, for those who see the last 12,000 characters of the output
MAX_PRINTED = 11_000
OPERATIONS = ("host", "topk_target", "masked_loss", "data2vec_loss", "norm_gelu", "ema", "attention")
# the most telling first: each compiles its blocks, and the limit may cut the last ones
STEPS = ("base published", "speech", "text", "images 2.0", "speech 2.0", "text 2.0", "base", "small")
# a trial without a GPU: the others take minutes each on two cores
STEPS_ON_CPU, KERNELS_ON_CPU = ("trial",), "text or host"
TESTS_ON_CPU = ("tests/ops/test_ema.py", "tests/ops/test_versions.py", "tests/training/test_captured_step.py")
NEEDED_FOR_RUNS = ("pydantic", "numpy", "numba", "safetensors", "sklearn", "PIL")
# without these, `conftest.py` leaves files of tests out
NEEDED_FOR_TESTS = (*NEEDED_FOR_RUNS, "hypothesis")
# run in its own process, since this one must not hold a part of the GPU
DESCRIBE = """
import os, platform, sys, torch
print("python", platform.python_version(), "torch", torch.__version__, "cores", os.cpu_count())
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda)
try:
    import triton
    print("triton", triton.__version__)
except ImportError:
    print("triton is not installed")
from d2v_fast import ops
print("backends", ops.backends())
"""


class Part(NamedTuple):
    """One part of the program.

    Attributes:
        name: Its name.
        share: Its share of the time, relative to the other parts.
        command: Arguments of the Python interpreter.
        needs: Modules without which it is skipped.
        note: What the summary says of it beside how it ended.
    """

    name: str
    share: float
    command: Sequence[str]
    needs: Sequence[str] = ()
    note: str = ""


class State(NamedTuple):
    """How a part ended: `word` is "ok", "FAILED", "cut short", "skipped" or "running"."""

    word: str
    detail: str
    seconds: float = 0.0


class Stopped(Exception):
    """A signal ended the program."""


class Summary:
    """The file that names the failed tests, the state of every part, and the machine.

    Args:
        out: Folder of the results.
        names: Names of all parts, in order.
    """

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self._out = out
        self.states = {name: State("not reached", "") for name in names}
        self.machine = self.figures = ""

    def write(self) -> None:
        """Rewrite the file; it is complete at every moment."""
        aside = self._out / ".summary.txt"
        counts, failed = self._tests()
        lines = [counts, *(f"  FAILED {name}: {message}" for name, message in failed.items()), *self._rest()]
        aside.write_text("\n".join(lines) + "\n")
        aside.replace(self._out / "summary.txt")

    def short(self, limit: int) -> str:
        """Return the summary in at most `limit` characters: the cases of a failed test in one line, messages cut."""
        counts, failed = self._tests()
        rest = "\n".join(self._rest())
        cases: dict[str, list[str]] = {}
        for name in failed:
            function, bracket, case = name.partition("[")
            cases.setdefault(function, []).append(bracket + case)
        names = {function: f"  FAILED {function} {' '.join(those)}".rstrip() for function, those in cases.items()}
        room = limit - len(counts) - len(rest) - sum(len(line) + 3 for line in names.values())
        message = max(0, room) // max(1, len(names))
        lines = [
            f"{line}: {failed[function + cases[function][0]]}"[: len(line) + message]
            for function, line in names.items()
        ]
        text = "\n".join([counts, *lines, rest])
        cut = "\n... cut here; summary.txt has all\n"
        return text if len(text) <= limit else text[: limit - len(cut)] + cut

    def _tests(self) -> tuple[str, dict[str, str]]:
        """Return a line with the numbers of tests by outcome, and the messages of those that failed."""
        collected, outcomes = read_outcomes(self._out / "outcomes.log")
        failed = {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"}
        numbers = {word: sum(word == o for o, _ in outcomes.values()) for word in ("passed", "skipped")}
        missing = max(0, collected - len(outcomes))
        passed, skipped = numbers["passed"], numbers["skipped"]
        return f"{len(failed)} tests FAILED, {passed} passed, {skipped} skipped, {missing} not reached", failed

    def _rest(self) -> Iterator[str]:
        yield ""
        for name, state in self.states.items():
            yield f"{name:10} {state.word:12} {state.seconds:6.1f} s  {state.detail}".rstrip()
        runs = self._out / "runs.txt"
        if runs.exists():
            yield from ("", "runs:", runs.read_text().rstrip())
        yield from ("", self.machine)
        if self.figures:
            yield from ("", self.figures.rstrip())


def read_outcomes(path: Path) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return how many tests were collected, and outcome and message of each that has ended."""
    collected, outcomes = 0, dict[str, tuple[str, str]]()
    for line in path.read_text().splitlines() if path.exists() else []:
        # the last line may be half written
        fields = line.split("\t")
        if fields[0] == "collected" and len(fields) == 2:
            collected = int(fields[1])
        elif len(fields) == 4 and outcomes.get(fields[2], ("", ""))[0] != "failed":
            outcomes[fields[2]] = fields[0], fields[3]
    return collected, outcomes


def parts(out: Path, device: str, scratch: Path) -> list[Part]:
    """Return the parts, in order; the report is not one of them, because it is made of what they leave."""
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", "--device", device]
    processes = min(MAX_PROCESSES, max(1, (os.cpu_count() or 1) - 2))
    several = ["-n", str(processes), "--dist", "worksteal", "-p", "no:benchmark"] if find_spec("xdist") else []
    is_trial = device == "cpu"
    tests = [
        *(TESTS_ON_CPU if is_trial else ["tests"]),
        "--only-device",
        "--outcomes",
        str(out / "outcomes.log"),
        "--continue-on-collection-errors",
    ]
    figures = ["--figures", str(out / "figures.jsonl")]
    kernels = [f"bench/bench_{name}.py" for name in OPERATIONS]
    measure = [*pytest, "-q", *kernels, *figures, *(["-k", KERNELS_ON_CPU] if is_trial else [])]
    trial = f'on a CPU only the cases that match "{KERNELS_ON_CPU}"' if is_trial else ""
    cases = STEPS_ON_CPU if is_trial else STEPS
    steps = ["--run-slow", *(f"bench/bench_step.py::bench_step[{case}]" for case in cases)]
    some = [f"on a CPU only {len(TESTS_ON_CPU)} files"] if is_trial else []
    if lacking := absent(NEEDED_FOR_TESTS):
        some.append(f"not installed: {', '.join(lacking)}; the tests that need them are left out")
    note = "on a CPU only a small case" if is_trial else ""
    needs = ("pytest", "pytest_benchmark", "numpy")
    runs = ["bench/gpu_runs.py", "--device", device, "--out", str(out / "runs.txt"), "--scratch", str(scratch)]
    # the other parts need it, and have what it leaves
    build = [Part("build", 12, ["setup.py", "--quiet", "build_ext", "--inplace", "--force"], ("setuptools", "torch"))]
    return [
        *(build if must_build() else []),
        Part("tests", 12, [*pytest, *several, "-q", *tests], ("pytest", "torch"), "; ".join(some)),
        Part("kernels", 7, [*measure, "--compiled-peers", "without"], needs, trial),
        Part(
            "steps", 10, [*pytest, "-q", *steps, *figures], (*NEEDED_FOR_RUNS, "pytest_benchmark", "transformers"), note
        ),
        Part("runs", 7, runs, NEEDED_FOR_RUNS),
        # compiles for seconds per case, so it takes what time is left
        Part("compiled", 2, [*measure, "--compiled-peers", "only"], needs, trial),
    ]


def must_build() -> bool:
    """Return whether the library of C++ kernels is missing, or another than this program built from these sources.

    Times of files are not compared: copying a tree changes them, and a library that was copied with it may be of
    another machine.
    """
    with contextlib.suppress(OSError, ValueError):
        return bool(json.loads(BUILT.read_text()) != fingerprint())
    return True


def remember_build() -> None:
    """Record what the library is made of."""
    with contextlib.suppress(OSError):
        BUILT.parent.mkdir(exist_ok=True)
        BUILT.write_text(json.dumps(fingerprint()))


def fingerprint() -> dict[str, str]:
    """Return what the library is made of: digests of its file and of its sources, the machine, and torch's version."""
    sources = [ROOT / "CMakeLists.txt", ROOT / "setup.py", *sorted((ROOT / "csrc").iterdir())]
    files = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in [LIBRARY, *sources]}
    return files | {"machine": " ".join(os.uname()[1:]), "torch": version("torch")}


def run_part(part: Part, limit_s: float, log: Path, environment: dict[str, str], summary: Summary) -> State:
    """Run a part for at most `limit_s` seconds with its end, and rewrite the summary every second meanwhile."""
    if lacking := absent(part.needs):
        return State("skipped", f"not installed: {', '.join(lacking)}")
    started, patience_s = time.monotonic(), max(0.5 * limit_s, limit_s - GRACE_S)
    with log.open("a") as file:
        file.write(f"\n==== {part.name}, at most {limit_s:.0f} s: {' '.join(part.command)}\n")
        file.flush()
        begin = file.tell()
        command = [sys.executable, *part.command]
        # a session of its own, so that its children end with it
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() - started < patience_s:
                summary.states[part.name] = State("running", "", time.monotonic() - started)
                summary.write()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
            cut_short = process.poll() is None
        finally:
            end(process)
    seconds = time.monotonic() - started
    if process.returncode == 0 and not cut_short:
        return State("ok", part.note, seconds)
    rest = f"; {part.note}" * bool(part.note) + failures(log, begin)
    if cut_short:
        return State("cut short", f"at its limit of {limit_s:.0f} s; what it had found is kept{rest}", seconds)
    return State("FAILED", f"exit status {process.returncode}; see log.txt{rest}", seconds)


def absent(modules: Sequence[str]) -> list[str]:
    """Return the modules that are not installed."""
    return [name for name in modules if find_spec(name) is None]


def failures(log: Path, begin: int) -> str:
    """Return the names of the tests and benchmarks that pytest reports as failed from a place in the log on."""
    with log.open(errors="replace") as file:
        file.seek(begin)
        names = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", file.read(), re.MULTILINE)
    return "".join(f"\n{'':11}{name}" for name in names)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: first by SIGINT, then by SIGKILL."""
    for number, patience_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=patience_s)
    # children that outlive it
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def brief(out: Path) -> str:
    """Return the figures there are as a short table."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from bench import report as tables

    try:
        return tables.brief(tables.read_rows(out / "figures.jsonl"))
    except (OSError, ValueError):
        # none yet
        return ""


def report(out: Path, log: Path, environment: dict[str, str], limit_s: float) -> State:
    """Make tables and plots of the figures there are, and pack them into one file."""
    figures = out / "figures.jsonl"
    if not figures.exists():
        return State("skipped", "no benchmark has ended")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as file:
        command = [sys.executable, "bench/report.py", str(figures), "--out", folder]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit_s)
            state = State("ok", "") if done.returncode == 0 else State("FAILED", "see log.txt")
        except subprocess.TimeoutExpired:
            state = State("cut short", "`python bench/report.py figures.jsonl --out .` makes it later")
        with tarfile.open(out / "report.tar", "w") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.add(path, path.name)
    return state._replace(seconds=time.monotonic() - started)


def describe(device: str, environment: dict[str, str], limit_s: float) -> str:
    """Return the versions, the device and the commit."""
    command = [sys.executable, "-c", DESCRIBE, device]
    limit_s = max(1.0, min(60.0, limit_s))
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
        machine = f"{done.stdout}{done.stderr[-2000:]}"
    except subprocess.TimeoutExpired:
        machine = f"torch did not describe the machine within {limit_s:.0f} s\n"
    commit = "unknown"
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or commit
    return f"{machine}commit {commit}, {time.strftime('%Y-%m-%d %H:%M')}"


def run_all(out: Path, device: str, seconds: float, only: Sequence[str]) -> int:
    """Run the parts named in `only`, or all if it is empty; return the exit status."""
    end_of_all = time.monotonic() + seconds
    deadline = end_of_all - min(REPORT_S, 0.1 * seconds)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("outcomes.log", "outcomes.log.failures", "figures.jsonl", "runs.txt", "log.txt", "report.tar"):
        (out / name).unlink(missing_ok=True)
    log = out / "log.txt"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        # a failed build is a failure
        "D2V_REQUIRE_CPP": "1",
        "TRITON_INTERPRET": "0" if device == "cuda" else "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        todo = [part for part in parts(out, device, Path(scratch)) if not only or part.name in only]
        summary = Summary(out, [*(part.name for part in todo), "report"])
        try:
            for position, part in enumerate(todo):
                if position == 0 and part.name != "build":
                    summary.machine = describe(device, environment, 0.2 * (deadline - time.monotonic()))
                share = part.share / sum(later.share for later in todo[position:])
                limit_s = max(1.0, share * (deadline - time.monotonic()))
                summary.states[part.name] = run_part(part, limit_s, log, environment, summary)
                summary.figures = brief(out)
                if part.name == "build":
                    if summary.states["build"].word == "ok":
                        remember_build()
                    # only now: it makes the C++ kernels, which the description names
                    summary.machine = describe(device, environment, 0.2 * (deadline - time.monotonic()))
                state = summary.states[part.name]
                print(f"{part.name} {state.word}, {state.seconds:.0f} s", flush=True)
        except Stopped:
            running = [name for name, state in summary.states.items() if state.word == "running"]
            for name in running:
                summary.states[name] = State("cut short", "stopped by a signal", summary.states[name].seconds)
        finally:
            summary.write()
        summary.figures = brief(out)
        summary.states["report"] = report(out, log, environment, max(5.0, end_of_all - time.monotonic()))
        summary.write()
    print(summary.short(MAX_PRINTED))
    words = {state.word for state in summary.states.values()}
    return 1 if "FAILED" in words else 3 if words & {"cut short", "not reached"} else 0


def _stop(number: int, frame: object) -> None:
    # a second signal must not end the clean-up
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)
    raise Stopped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program without a GPU")
    parser.add_argument("--seconds", type=float, default=360, help="limit of all parts together (default: 360)")
    parser.add_argument("--only", nargs="*", default=[], help="names of the parts to run (default: all)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    return run_all(arguments.out.resolve(), arguments.device, arguments.seconds, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
