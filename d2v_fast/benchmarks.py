"""`d2v-fast bench`: the benchmarks of the source tree, which no installed package has."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NEEDED = ("pytest", "pytest_benchmark")
# of pytest: nothing matched the names
_NONE_FOUND = 5


def run_benchmarks(*, check: bool = False, only: str | None = None, device: str = "cpu", root: Path = ROOT) -> int:
    """Measure, then write table and plots to `bench/results`; returns the exit status.

    Args:
        check: write nothing, and fail where a ratio is below what `bench/goals.json` expects.
        only: words that the names of benchmarks are to match, as of pytest's `-k`; None runs all.
        device: "cpu" or "cuda".
        root: of the source tree.
    Raises:
        ValueError: there is no source tree, a package is missing, or no benchmark has such a name.
    """
    if not (root / "bench" / "report.py").is_file():
        raise ValueError(
            "the benchmarks are in the source tree, and this installation has none: clone the repository, "
            "`pip install -e '.[bench]'` in it, and run `d2v-fast bench` again."
        )
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"the benchmarks need {' and '.join(missing)}: `pip install 'd2v_fast[bench]'`.")
    (root / "build").mkdir(exist_ok=True)
    figures = root / "build" / ("bench-check.json" if check else "bench.json")
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--device", device, "--benchmark-json", str(figures)]
    done = subprocess.run([*command, *(["-k", only] if only else [])], cwd=root, check=False)
    if done.returncode == _NONE_FOUND:
        raise ValueError(f"`--only` must match the name of a benchmark, but is {only} instead.")
    if done.returncode != 0:
        return 1
    report = [sys.executable, str(root / "bench" / "report.py"), str(figures), *(["--check"] if check else [])]
    return int(subprocess.run(report, cwd=root, check=False).returncode != 0)
