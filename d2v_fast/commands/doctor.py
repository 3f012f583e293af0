"""`d2v-fast doctor`: find what is missing or broken on this machine, and print a fix for each problem.

This module imports only the standard library, since anything else may be broken. Each package is imported in its own
process, with a time limit and the search path of this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from d2v_fast.packages import install_command

OK, ABSENT, WARNING, BROKEN = "ok", "absent", "warning", "broken"

PACKAGE = Path(__file__).resolve().parent.parent
# None for an installed package: a wheel holds built kernels and no sources
SOURCE_TREE = PACKAGE.parent if (PACKAGE.parent / "CMakeLists.txt").is_file() else None
MIN_PYTHON, MIN_TORCH, MIN_CMAKE = (3, 10), (2, 10), (3, 18)
# a running build of an extension touches its lock more often than this
STALE_SECONDS = 600
# bytes of /dev/shm in a Docker container by default
SMALL_SHM = 64 << 20
MAX_REASON = 160


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: subject of the check, such as a package.
        state: OK, ABSENT (optional and not installed), WARNING or BROKEN.
        text: result in words.
        fix: what the user can do; empty if nothing is needed.
        is_needed: whether training needs it.
    """

    name: str
    state: str
    text: str
    fix: str = ""
    is_needed: bool = False

    def __str__(self) -> str:
        line = f"{self.state:8}{self.name:16}{self.text}"
        return f"{line}\n{'':24}fix: {self.fix}" if self.fix else line


class Package(NamedTuple):
    """A package that some part of this library uses.

    Attributes:
        name: import name.
        purpose: what needs the package.
        fix: command that installs it.
        is_needed: whether training needs it.
        code: import statement, if it is not `import name`.
    """

    name: str
    purpose: str
    fix: str
    is_needed: bool = False
    code: str = ""


PACKAGES = tuple(
    Package(name, purpose, install_command(name), is_needed, code)
    for name, purpose, is_needed, code in (
        ("numpy", "everything", True, ""),
        ("numba", "masks", True, ""),
        ("pydantic", "configurations", True, ""),
        ("safetensors", "checkpoints and exports", True, "import safetensors.torch"),
        ("PIL", "images", True, "import PIL.Image"),
        ("sklearn", "the digits and probes", False, "import sklearn.linear_model"),
        ("soundfile", "recordings", False, ""),
        ("soxr", "recordings at other sample rates", False, ""),
        ("rapidfuzz", "error rates of transcripts", False, ""),
        ("tokenizers", "text", False, ""),
        ("pyarrow", ".parquet files of text or features", False, ""),
        ("deepspeed", "several processes, ZeRO, offload", False, ""),
        ("matplotlib", "curves and pictures", False, "import matplotlib.figure"),
        ("tensorboard", "TensorBoard's events", False, "import torch.utils.tensorboard"),
        ("rich", "the progress bar", False, "import rich.progress"),
        ("onnxscript", "export to ONNX", False, ""),
        ("transformers", "using exported models", False, ""),
    )
)
# compiled against one version of torch; not needed here, but they can break packages that import them if present
BESIDE_TORCH = ("torchvision", "torchaudio", "xformers", "flash_attn")


def examine(*, timeout_s: float = 120.0) -> int:
    """Run all checks, print their results, and return the exit status: 1 if training cannot work.

    Args:
        timeout_s: time limit for importing a package.
    """
    failed = warned = 0
    for finding in findings(timeout_s):
        print(finding, flush=True)
        failed += finding.is_needed and finding.state in (ABSENT, BROKEN)
        warned += finding.state in (WARNING, BROKEN)
    if failed:
        print(f"training cannot work until {failed} of these problems {'is' if failed == 1 else 'are'} fixed")
    else:
        print(f"training can work here{f'; {warned} warnings' if warned > 1 else '; 1 warning' if warned else ''}")
    return int(failed > 0)


def findings(timeout_s: float = 120.0) -> Iterator[Finding]:
    """Run all checks, and yield their results in a fixed order."""
    yield python()
    looks: list[Callable[[], Finding | list[Finding]]] = [lambda: torch(timeout_s), lambda: kernels(timeout_s)]
    looks += [lambda p=p: package(p, timeout_s) for p in PACKAGES]  # type: ignore[misc]
    looks += [lambda: triton(timeout_s), lambda: apex(timeout_s)]
    looks += [lambda name=name: beside_torch(name, timeout_s) for name in BESIDE_TORCH]  # type: ignore[misc]
    looks += [compiler, cmake, locks, shared_memory, threads]
    # two at a time: a check mostly waits for the disk, and needs up to 1 GB of memory
    with ThreadPoolExecutor(min(2, num_cores())) as pool:
        for found in pool.map(lambda look: look(), looks):
            yield from found if isinstance(found, list) else [found]


def python() -> Finding:
    """Check the version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    text = f"{version} in {sys.prefix}, d2v_fast in {PACKAGE}"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", BROKEN, text, "make an environment with Python 3.10 or later", True)
    return Finding("python", OK, text)


class Answer(NamedTuple):
    """The result of a child process: a value, or the reason why there is none."""

    # from JSON
    value: Any
    problem: str | None


def ask(code: str, timeout_s: float) -> Answer:
    """Run code in a new interpreter with the search path of this one, and return its result.

    Args:
        code: sets `answer` to a value that JSON can express.
        timeout_s: time limit.
    Returns:
        The value, or the reason why there is none: an exception, a crash, or the time limit.
    """
    program = (
        "import json, os, sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        # keep output of packages out of the answer
        "out = os.dup(1)\nos.dup2(2, 1)\n"
        "answer = None\n"
        f"{code}\n"
        "os.write(out, json.dumps(answer).encode())\nos._exit(0)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(None, f"not finished after {timeout_s:g} s")
    if done.returncode == 0:
        return Answer(json.loads(done.stdout or b"null"), None)
    if done.returncode < 0:
        return Answer(None, f"the process was killed by signal {-done.returncode}")
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    # the last line that is not indented names the exception
    return Answer(None, shortened(said[-1]) if said else f"exit status {done.returncode}")


def shortened(text: str) -> str:
    """Return a text on one line of at most `MAX_REASON` characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."


def is_installed(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return True


def package(wanted: Package, timeout_s: float) -> Finding:
    """Check that a package can be imported."""
    name, purpose, fix, is_needed, code = wanted
    if not is_installed(name):
        return Finding(name, BROKEN if is_needed else ABSENT, f"not installed; for {purpose}", fix, is_needed)
    version = f"answer = getattr(sys.modules[{name!r}], '__version__', None) if {name!r} in sys.modules else None"
    answer = ask(f"{code or f'import {name}'}\n{version}", timeout_s)
    if answer.problem is not None:
        again = f"{fix.replace('install', 'install --force-reinstall', 1)}, or `pip uninstall` it if nothing needs it"
        return Finding(name, BROKEN, f"cannot be imported ({answer.problem}); for {purpose}", again, is_needed)
    return Finding(name, OK, str(answer.value or "installed"))


_TORCH = """
import torch
answer = {
    "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available() else [],
    "threads": torch.get_num_threads(),
}
"""


def torch(timeout_s: float) -> list[Finding]:
    """Check torch, and whether it can use the GPUs of this machine."""
    if not is_installed("torch"):
        return [Finding("torch", BROKEN, "not installed", "pip install torch (see pytorch.org for CUDA builds)", True)]
    answer = ask(_TORCH, timeout_s)
    if answer.problem is not None:
        fix = "pip install --force-reinstall torch (see pytorch.org for CUDA builds)"
        return [Finding("torch", BROKEN, f"cannot be imported ({answer.problem})", fix, True)]
    found = answer.value
    built = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
    line = Finding("torch", OK, f"{found['version']}, {built}")
    if numbers(found["version"]) < MIN_TORCH:
        line = Finding("torch", BROKEN, f"{line.text}, which is too old", "pip install 'torch>=2.10'", True)
    return [line, gpu(found)]


def gpu(found: dict[str, Any]) -> Finding:
    """Compare the GPUs that torch finds with those of the system.

    Args:
        found: answer to `_TORCH`.
    """
    if found["devices"]:
        return Finding("gpu", OK, ", ".join(found["devices"]))
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Finding("gpu", OK, "none: training runs on the CPU")
    if found["cuda"] is None:
        fix = "install a CUDA build of torch, see pytorch.org"
        return Finding("gpu", WARNING, "this machine has one, but this torch is built without CUDA", fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Finding("gpu", WARNING, "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    fix = (
        f"install a driver for CUDA {found['cuda']}, or a torch built for an older CUDA; `nvidia-smi` shows what "
        "the driver supports"
    )
    return Finding("gpu", WARNING, "this machine has one, but torch cannot use it", fix)


_KERNELS = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from d2v_fast import ops
    answer = {"backends": ops.backends(), "said": [str(one.message) for one in said]}
"""


def kernels(timeout_s: float) -> Finding:
    """Check that the C++ kernels of this library are built and can be loaded."""
    if not is_installed("torch"):
        return Finding("C++ kernels", ABSENT, "need torch")
    answer = ask(_KERNELS, timeout_s)
    if answer.problem is not None:
        fix = "install d2v_fast again"
        return Finding("C++ kernels", BROKEN, f"d2v_fast.ops cannot be imported ({answer.problem})", fix, True)
    cpu, cuda = answer.value["backends"]["cpu"], answer.value["backends"]["cuda"]
    if cpu != "reference":
        return Finding("C++ kernels", OK, f"{cpu} on the CPU, {cuda} on CUDA")
    library, fix = PACKAGE / "_C.so", kernels_fix()
    if library.exists():
        reason = shortened(" ".join(answer.value["said"]) or "no reason given")
        return Finding("C++ kernels", BROKEN, f"{library} cannot be loaded, so the slow reference runs: {reason}", fix)
    return Finding("C++ kernels", WARNING, "not built, so the slow reference runs on the CPU", fix)


def kernels_fix() -> str:
    """Return how to install the C++ kernels, with or without a source tree."""
    if SOURCE_TREE is not None:
        return f"run `pip install -e .` in {SOURCE_TREE} with a C++20 compiler (in its .venv: `make build`)"
    return (
        "install a wheel of d2v_fast for this platform; or, with a C++20 compiler and GNU make, build it from a source "
        "archive or clone: pip install --force-reinstall --no-deps PATH"
    )


def triton(timeout_s: float) -> Finding:
    """Check Triton, which only CUDA needs."""
    wanted = Package("triton", "the kernels on CUDA", "pip install 'triton>=3.6'")
    return package(wanted, timeout_s)


def apex(timeout_s: float) -> Finding:
    """Check whether apex is NVIDIA's and complete; another project on PyPI has the same name."""
    if not is_installed("apex"):
        return Finding("apex", OK, "not installed and not needed")
    answer = ask("from apex.optimizers import FusedAdam", timeout_s)
    if answer.problem is not None:
        text = f"not NVIDIA's, for it has no apex.optimizers.FusedAdam ({answer.problem}); the one on PyPI is another"
        return Finding("apex", WARNING, text, "pip uninstall apex: nothing here needs it, but DeepSpeed imports it")
    answer = ask("import torch, amp_C\namp_C.multi_tensor_adam", timeout_s)
    if answer.problem is not None:
        text = f"NVIDIA's, built without its CUDA extensions (amp_C: {answer.problem})"
        return Finding(
            "apex", WARNING, text, 'build it again with its CUDA extensions, or use `optimizer.type` "AdamW"'
        )
    return Finding("apex", OK, "NVIDIA's, with FusedAdam")


def beside_torch(name: str, timeout_s: float) -> Finding:
    """Check a package that is compiled against torch and that other packages import if present."""
    if not is_installed(name):
        return Finding(name, OK, "not installed and not needed")
    answer = ask(f"import {name}\nanswer = getattr({name}, '__version__', None)", timeout_s)
    if answer.problem is not None:
        text = f"does not fit this torch ({answer.problem}); nothing here needs it, but Transformers imports it"
        return Finding(name, WARNING, text, f"pip uninstall {name}, or install the version for this torch")
    return Finding(name, OK, str(answer.value or "installed"))


def compiler() -> Finding:
    """Check for a C++20 compiler, which builds the kernels and some optimizers of DeepSpeed."""
    named = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    path = next((found for name in named if (found := shutil.which(name.split()[0]))), None)
    fix = "install g++ 11 or later (Debian, Ubuntu: apt install g++)"
    # an installed package needs no compiler for its kernels, but DeepSpeed compiles optimizers at their first use
    wanting, lost = (WARNING, "kernels") if SOURCE_TREE is not None else (ABSENT, "DeepSpeed's optimizers")
    if path is None:
        return Finding("compiler", wanting, f"none ({', '.join(named)}): {lost} cannot be built", fix)
    program = "#include <bit>\n#include <span>\nint main() { return std::popcount(0u); }\n"
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
        command = [path, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("compiler", wanting, f"{path} does not run ({shortened(str(error))})", fix)
    version = shortened((said.splitlines() or [path])[0])
    if done.returncode:
        return Finding("compiler", wanting, f"{version} cannot compile C++20: {lost} cannot be built", fix)
    return Finding("compiler", OK, version)


def cmake() -> Finding:
    """Check cmake, which `make build` needs in a source tree; pip installs its own."""
    if SOURCE_TREE is None:
        return Finding("cmake", OK, "not needed: an installed package builds no kernels")
    beside = Path(sys.executable).with_name("cmake")
    path = str(beside) if beside.exists() else shutil.which("cmake")
    fix = "pip install cmake"
    if path is None:
        return Finding("cmake", ABSENT, "not installed; rebuilding the kernels needs it", fix)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("cmake", WARNING, f"{path} does not run ({shortened(str(error))})", fix)
    version = (said.split() or ["", "", "?"])[2] if len(said.split()) > 2 else "?"
    if numbers(version) < MIN_CMAKE:
        return Finding("cmake", WARNING, f"{version} is older than 3.18", fix)
    return Finding("cmake", OK, version)


def locks() -> list[Finding]:
    """Find locks that a killed build of a torch extension left; the next build would wait for them silently."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(given) if given else cache / "torch_extensions"
    found = []
    for path in sorted(root.rglob("lock")) if root.is_dir() else []:
        try:
            age = time.time() - path.stat().st_mtime
        except OSError:
            continue
        if age > STALE_SECONDS:
            text = f"{path} is {_age(age)} old; the next build of this extension would wait for it forever"
            found.append(
                Finding("build lock", WARNING, text, f"rm {shlex.quote(str(path))}, unless a build is running")
            )
        else:
            found.append(Finding("build lock", OK, f"{path} is {_age(age)} old; a build may be running"))
    return found or [Finding("build locks", OK, f"none in {root}")]


def shared_memory() -> Finding:
    """Check the size of /dev/shm, through which data loading workers send batches."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        fix = "set `d2v.data.num_workers` to 0"
        return Finding("/dev/shm", WARNING, "missing, so data loading workers cannot send batches", fix)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    text = f"{free / 1e6:,.0f} of {size / 1e6:,.0f} MB free"
    if free <= SMALL_SHM:
        fix = "give a container more (docker run --shm-size 8g), or set `d2v.data.num_workers` to 0"
        return Finding("/dev/shm", WARNING, f"{text}, which is little for data loading workers", fix)
    return Finding("/dev/shm", OK, text)


def threads() -> Finding:
    """Compare the cores that this process may use with the threads that torch would start."""
    cores, there = num_cores(), os.cpu_count() or 1
    text = f"{cores} cores" + (f" of the machine's {there}" if cores < there else "")
    named = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(named) if named.isdecimal() else _affinity()
    if wanted > cores:
        fix = f"export OMP_NUM_THREADS={cores} (more threads than cores slow each other down)"
        return Finding("cores", WARNING, f"{text}, and {wanted} threads", fix)
    return Finding("cores", OK, f"{text}, {wanted} threads")


def num_cores() -> int:
    """Return the number of cores that affinity and the quota of the container allow this process."""
    cores = _affinity()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        # no cgroup v2
        pass
    return cores


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version: (2, 13) for "2.13.0+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _age(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} minutes"
    return f"{minutes // 60} hours" if minutes < 2880 else f"{minutes // 1440} days"
