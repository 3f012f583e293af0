"""`d2v-fast bench`: the benchmarks of the source tree, which no installed package has."""

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
# of pytest: words that it does not take, and that no name matches
_NONE_FOUND = (4, 5)


def run_benchmarks(*, check: bool = False, only: str | None = None, device: str = "cpu", root: Path = ROOT) -> int:
    """Measure, then write table and plots to `bench/results`; returns the exit status.

    Args:
        check: write nothing, and fail where a ratio is below what `bench/goals.json` expects.
        only: words that the names of benchmarks are to match, as of pytest's `-k`, with results in `build/bench`; None
            runs all.
        device: "cpu" or "cuda".
        root: of the source tree.
    Raises:
        ValueError: there is no source tree, a package is missing, no benchmark has such a name, or `check` is for all.
    """
    if not (root / "bench" / "report.py").is_file():
        raise ValueError(
            "the benchmarks are in the source tree of d2v_fast, and this installation has none: unpack or clone it, "
            "`pip install -e '.[bench]'` in it (it builds the C++ kernels, with a C++20 compiler), and run "
            f"`{tool_command('bench')}` there."
        )
    if check and only:
        raise OptionError("`--check` looks at every goal, and so at every benchmark: leave out `--only`.")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"the benchmarks need {' and '.join(missing)}: `{install_command(missing[0])}`.")
    if not only:
        # what two idle cores of a current x86 machine take, with compilation and what is not timed
        length = "ten minutes" if check else "a quarter of an hour"
        some = tool_command("bench", "--only", "ema")
        print(f"bench: every benchmark, about {length} on two idle cores; to run some: {some}", flush=True)
    (root / "build").mkdir(exist_ok=True)
    figures = root / "build" / ("bench-check.json" if check else "bench.json")
    which = [*([] if check else ["--run-slow"]), *(["-k", only] if only else [])]
    pytest = [sys.executable, "-m", "pytest", "bench", "-q", "--device", device, *which]
    if only:
        # asked first: without a benchmark there are no figures, which is an error of another kind
        found = subprocess.run([*pytest, "--collect-only"], cwd=root, check=False, capture_output=True)
        if found.returncode in _NONE_FOUND:
            raise OptionError(f"`--only` must match the name of a benchmark, as of pytest's -k, but is {only} instead.")
    if subprocess.run([*pytest, "--benchmark-json", str(figures)], cwd=root, check=False).returncode != 0:
        return 1
    # of some only, beside the figures: the table of all of them stays what it is
    how = ["--check"] if check else ["--out", str(root / "build" / "bench")] if only else []
    report = [sys.executable, str(root / "bench" / "report.py"), str(figures), *how]
    return int(subprocess.run(report, cwd=root, check=False).returncode != 0)
