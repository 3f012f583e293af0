"""`d2v-fast bench`: run the benchmarks of the source tree."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from d2v_fast.command_lines import tool_command
from d2v_fast.errors import OptionError
from d2v_fast.packages import install_command

ROOT = Path(__file__).resolve().parents[2]
_NEEDED = ("pytest", "pytest_benchmark")
# exit statuses of pytest: wrong -k expression, no test collected
_NONE_FOUND = (4, 5)


def run_benchmarks(*, check: bool = False, only: str | None = None, device: str = "cpu", root: Path = ROOT) -> int:
    """Run benchmarks, write table and plots to `bench/results`, and return the exit status.

    Args:
        check: write nothing, and fail if a ratio is below its goal in `bench/goals.json`.
        only: expression for the names of benchmarks, as for pytest's `-k`; their results go to `build/bench`. None runs
            all benchmarks.
        device: "cpu" or "cuda".
        root: the source tree.
    Raises:
        OptionError: no benchmark matches `only`, or `only` is combined with `check`.
        ValueError: there is no source tree, or a package is missing.
    """
    if not (root / "bench" / "report.py").is_file():
        raise ValueError(
            "the benchmarks are in the source tree of d2v_fast, and this installation has none: unpack or clone it, "
            "run `pip install -e '.[bench]'` in it (a C++20 compiler builds the kernels), and then "
            f"`{tool_command('bench')}`."
        )
    if check and only:
        raise OptionError("`--check` needs the results of all benchmarks: leave out `--only`.")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"the benchmarks need {' and '.join(missing)}: `{install_command(missing[0])}`.")
    if not only:
        # on two idle cores of a current x86 machine, including compilation
        length = "ten minutes" if check else "a quarter of an hour"
        some = tool_command("bench", "--only", "ema")
        print(f"bench: every benchmark, about {length} on two idle cores; to run some: {some}", flush=True)
    (root / "build").mkdir(exist_ok=True)
    figures = root / "build" / ("bench-check.json" if check else "bench.json")
    which = [*([] if check else ["--run-slow"]), *(["-k", only] if only else [])]
    pytest = [sys.executable, "-m", "pytest", "bench", "-q", "--device", device, *which]
    if only:
        # check first that a benchmark matches
        found = subprocess.run([*pytest, "--collect-only"], cwd=root, check=False, capture_output=True)
        if found.returncode in _NONE_FOUND:
            raise OptionError(f"`--only` must match the name of a benchmark, as for pytest -k, but is {only} instead.")
    if subprocess.run([*pytest, "--benchmark-json", str(figures)], cwd=root, check=False).returncode != 0:
        return 1
    # results of some benchmarks do not replace the table of all
    how = ["--check"] if check else ["--out", str(root / "build" / "bench")] if only else []
    report = [sys.executable, str(root / "bench" / "report.py"), str(figures), *how]
    return int(subprocess.run(report, cwd=root, check=False).returncode != 0)
