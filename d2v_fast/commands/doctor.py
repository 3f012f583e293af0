"""`d2v-fast doctor`: what is missing or broken on this machine, a line each, with its fix.

Nothing but the standard library is imported here, for anything else may be what is broken: every package is imported in
a process of its own, with a time limit, and with the search path of this one.
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
# None for an installed package: a wheel holds the kernels as they were built, and nothing to build them from
SOURCE_TREE = PACKAGE.parent if (PACKAGE.parent / "CMakeLists.txt").is_file() else None
MIN_PYTHON, MIN_TORCH, MIN_CMAKE = (3, 10), (2, 10), (3, 18)
# seconds: no build of an extension is at work for so long without its lock being touched
STALE_SECONDS = 600
# bytes; what Docker gives to a container that asks for nothing
SMALL_SHM = 64 << 20
MAX_REASON = 160


class Finding(NamedTuple):
    """One line.

    Attributes:
        name: what was looked at.
        state: OK, ABSENT (optional, and not installed), WARNING or BROKEN.
        text: what was found.
        fix: what to do about it.
        is_needed: whether training cannot work while it is broken.
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
    """A package that some part of this library uses, and for what."""

    name: str
    purpose: str
    fix: str
    is_needed: bool = False
    # what is imported, where it is not the package itself
    code: str = ""


PACKAGES = tuple(
    Package(name, purpose, install_command(name), is_needed, code)
    for name, purpose, is_needed, code in (
        ("numpy", "everything", True, ""),
        ("numba", "masks", True, ""),
        ("pydantic", "configurations", True, ""),
        ("safetensors", "checkpoints and exports", True, "import safetensors.torch"),
        ("PIL", "images", True, "import PIL.Image"),
        ("sklearn", "the digits and every probe", False, "import sklearn.linear_model"),
        ("soundfile", "recordings", False, ""),
        ("soxr", "recordings of another rate", False, ""),
        ("tokenizers", "text", False, ""),
        ("pyarrow", "text in .parquet files, features as a table", False, ""),
        ("deepspeed", "several processes, ZeRO, offload", False, ""),
        ("matplotlib", "curves and pictures", False, "import matplotlib.figure"),
        ("tensorboard", "TensorBoard's events", False, "import torch.utils.tensorboard"),
        ("rich", "the progress bar", False, "import rich.progress"),
        ("onnxscript", "export to ONNX", False, ""),
        ("transformers", "using what is exported", False, ""),
    )
)
# compiled against one version of torch: here by chance, used by nobody here, and able to break those who look for them
BESIDE_TORCH = ("torchvision", "torchaudio", "xformers", "flash_attn")


def examine(*, timeout_s: float = 120.0) -> int:
    """Look at everything and print a line for each; returns the exit status: 1 where training cannot work.

    Args:
        timeout_s: seconds for each package to be imported.
    """
    failed = warned = 0
    for finding in findings(timeout_s):
        print(finding, flush=True)
        failed += finding.is_needed and finding.state in (ABSENT, BROKEN)
        warned += finding.state in (WARNING, BROKEN)
    if failed:
        print(f"{failed} of these keep training from working")
    else:
        print(f"training can work here{f'; {warned} to look at' if warned else ''}")
    return int(failed > 0)


def findings(timeout_s: float = 120.0) -> Iterator[Finding]:
    """Everything, in an order that does not depend on what is found."""
    yield python()
    looks: list[Callable[[], Finding | list[Finding]]] = [lambda: torch(timeout_s), lambda: kernels(timeout_s)]
    looks += [lambda p=p: package(p, timeout_s) for p in PACKAGES]  # type: ignore[misc]
    looks += [lambda: triton(timeout_s), lambda: apex(timeout_s)]
    looks += [lambda name=name: beside_torch(name, timeout_s) for name in BESIDE_TORCH]  # type: ignore[misc]
    looks += [compiler, cmake, locks, shared_memory, threads]
    # two at a time: each of them mostly waits for the disk, and needs up to a gigabyte
    with ThreadPoolExecutor(min(2, num_cores())) as pool:
        for found in pool.map(lambda look: look(), looks):
            yield from found if isinstance(found, list) else [found]


def python() -> Finding:
    """The interpreter."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    text = f"{version} in {sys.prefix}, d2v_fast in {PACKAGE}"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", BROKEN, text, "make an environment with Python 3.10 or later", True)
    return Finding("python", OK, text)


class Answer(NamedTuple):
    """What a child process said: a value, or why there is none."""

    value: Any
    problem: str | None


def ask(code: str, timeout_s: float) -> Answer:
    """Run code in a fresh interpreter with the search path of this one; it sets `answer`, which JSON can express.

    An exception, a crash and a hang are problems in words, and nothing worse.
    """
    program = (
        "import json, os, sys\n"
        f"sys.path[:] = {sys.path!r}\n"
        # what packages print must not get between
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
        return Answer(None, f"not through after {timeout_s:g} s")
    if done.returncode == 0:
        return Answer(json.loads(done.stdout or b"null"), None)
    if done.returncode < 0:
        return Answer(None, f"the process was ended by signal {-done.returncode}")
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    # the last line that is not indented names the exception
    return Answer(None, shortened(said[-1]) if said else f"exit status {done.returncode}")


def shortened(text: str) -> str:
    """A reason on one line of bearable length."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."


def is_installed(name: str) -> bool:
    """Whether there is such a package, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return True


def package(wanted: Package, timeout_s: float) -> Finding:
    """One of `PACKAGES`."""
    name, purpose, fix, is_needed, code = wanted
    if not is_installed(name):
        return Finding(name, BROKEN if is_needed else ABSENT, f"not installed; for {purpose}", fix, is_needed)
    version = f"answer = getattr(sys.modules[{name!r}], '__version__', None) if {name!r} in sys.modules else None"
    answer = ask(f"{code or f'import {name}'}\n{version}", timeout_s)
    if answer.problem is not None:
        again = f"{fix.replace('install', 'install --force-reinstall', 1)}, or `pip uninstall` it if nothing needs it"
        return Finding(name, BROKEN, f"cannot be imported ({answer.problem}); for {purpose}", again, is_needed)
    return Finding(name, OK, str(answer.value or "there"))


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
    """torch, and whether it sees the GPUs of the machine."""
    if not is_installed("torch"):
        return [
            Finding("torch", BROKEN, "not installed", "pip install torch (pytorch.org names the one for CUDA)", True)
        ]
    answer = ask(_TORCH, timeout_s)
    if answer.problem is not None:
        fix = "pip install --force-reinstall torch (pytorch.org names the one for your CUDA)"
        return [Finding("torch", BROKEN, f"cannot be imported ({answer.problem})", fix, True)]
    found = answer.value
    built = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
    line = Finding("torch", OK, f"{found['version']}, {built}")
    if numbers(found["version"]) < MIN_TORCH:
        line = Finding("torch", BROKEN, f"{line.text}, which is too old", "pip install 'torch>=2.10'", True)
    return [line, gpu(found)]


def gpu(found: dict[str, Any]) -> Finding:
    """The GPUs that torch sees, beside those that the system has."""
    if found["devices"]:
        return Finding("gpu", OK, ", ".join(found["devices"]))
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Finding("gpu", OK, "none: training runs on the CPU")
    if found["cuda"] is None:
        fix = "install the torch for CUDA that pytorch.org names"
        return Finding("gpu", WARNING, "this machine has one, and this torch is built without CUDA", fix)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return Finding("gpu", WARNING, "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
    fix = f"install a driver for CUDA {found['cuda']}, or the torch of an older CUDA; `nvidia-smi` tells the driver's"
    return Finding("gpu", WARNING, "this machine has one, and torch does not see it", fix)


_KERNELS = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from d2v_fast import ops
    answer = {"backends": ops.backends(), "said": [str(one.message) for one in said]}
"""


def kernels(timeout_s: float) -> Finding:
    """The C++ kernels of this library."""
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
        return Finding("C++ kernels", BROKEN, f"{library} cannot be loaded, the slow reference runs: {reason}", fix)
    return Finding("C++ kernels", WARNING, "not built: the slow reference runs on the CPU", fix)


def kernels_fix() -> str:
    """Say how the C++ kernels come back, with and without a source tree."""
    if SOURCE_TREE is not None:
        return f"pip install -e . again in {SOURCE_TREE}, with a C++20 compiler (make build does so in its .venv)"
    return (
        "install a wheel of d2v_fast for this platform, or, with a C++20 compiler and GNU make, d2v_fast again from "
        "its source archive or a clone: pip install --force-reinstall --no-deps PATH"
    )


def triton(timeout_s: float) -> Finding:
    """Triton, which CUDA alone needs."""
    wanted = Package("triton", "the kernels on CUDA", "pip install 'triton>=3.6'")
    return package(wanted, timeout_s)


def apex(timeout_s: float) -> Finding:
    """NVIDIA's apex, or the other project of that name: told apart by the symbols that only NVIDIA's has."""
    if not is_installed("apex"):
        return Finding("apex", OK, "not installed, and not needed")
    answer = ask("from apex.optimizers import FusedAdam", timeout_s)
    if answer.problem is not None:
        text = f"not NVIDIA's, for it has no apex.optimizers.FusedAdam ({answer.problem}); the one of PyPI is another"
        return Finding("apex", WARNING, text, "pip uninstall apex: nothing here needs it, and DeepSpeed looks for it")
    answer = ask("import torch, amp_C\namp_C.multi_tensor_adam", timeout_s)
    if answer.problem is not None:
        text = f"NVIDIA's, without its CUDA extensions (amp_C: {answer.problem})"
        return Finding(
            "apex", WARNING, text, 'build it again with its CUDA extensions, or use `optimizer.type` "AdamW"'
        )
    return Finding("apex", OK, "NVIDIA's, with FusedAdam")


def beside_torch(name: str, timeout_s: float) -> Finding:
    """A package that is compiled against torch, and that others import where they find it."""
    if not is_installed(name):
        return Finding(name, OK, "not installed, and not needed")
    answer = ask(f"import {name}\nanswer = getattr({name}, '__version__', None)", timeout_s)
    if answer.problem is not None:
        text = f"does not fit this torch ({answer.problem}); nothing here needs it, but Transformers looks for it"
        return Finding(name, WARNING, text, f"pip uninstall {name}, or install the one for this torch")
    return Finding(name, OK, str(answer.value or "there"))


def compiler() -> Finding:
    """A compiler for C++20, which the build of the kernels needs, and those of DeepSpeed."""
    named = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    path = next((found for name in named if (found := shutil.which(name.split()[0]))), None)
    fix = "install g++ 11 or later (Debian, Ubuntu: apt install g++)"
    # the kernels of an installed package are built, but some optimizers of DeepSpeed are compiled at their first use
    wanting, lost = (WARNING, "kernels") if SOURCE_TREE is not None else (ABSENT, "optimizers of DeepSpeed's own")
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
    """cmake, which builds the kernels of a source tree; pip brings its own."""
    if SOURCE_TREE is None:
        return Finding("cmake", OK, "not needed: an installed package builds no kernels")
    beside = Path(sys.executable).with_name("cmake")
    path = str(beside) if beside.exists() else shutil.which("cmake")
    fix = "pip install cmake"
    if path is None:
        return Finding("cmake", ABSENT, "not installed; for building the kernels again", fix)
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("cmake", WARNING, f"{path} does not run ({shortened(str(error))})", fix)
    version = (said.split() or ["", "", "?"])[2] if len(said.split()) > 2 else "?"
    if numbers(version) < MIN_CMAKE:
        return Finding("cmake", WARNING, f"{version} is older than 3.18", fix)
    return Finding("cmake", OK, version)


def locks() -> list[Finding]:
    """Locks that a killed build of a torch extension left behind: the next one waits for them without a word."""
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
            text = f"{path} is {_age(age)} old: whoever builds that extension would wait for it for ever"
            found.append(
                Finding("build lock", WARNING, text, f"rm {shlex.quote(str(path))}, unless a build is at work")
            )
        else:
            found.append(Finding("build lock", OK, f"{path} is {_age(age)} old: a build may be at work"))
    return found or [Finding("build locks", OK, f"none in {root}")]


def shared_memory() -> Finding:
    """/dev/shm, in which data loading workers hand over their batches."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        fix = "set `d2v.data.num_workers` to 0"
        return Finding("/dev/shm", WARNING, "there is none: data loading workers cannot hand over batches", fix)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    text = f"{free / 1e6:,.0f} of {size / 1e6:,.0f} MB free"
    if free <= SMALL_SHM:
        fix = "give a container more (docker run --shm-size 8g), or set `d2v.data.num_workers` to 0"
        return Finding("/dev/shm", WARNING, f"{text}: little for data loading workers", fix)
    return Finding("/dev/shm", OK, text)


def threads() -> Finding:
    """Cores that this process may use, beside the threads that torch would start."""
    cores, there = num_cores(), os.cpu_count() or 1
    text = f"{cores} cores" + (f" of {there} that the machine has" if cores < there else "")
    named = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(named) if named.isdecimal() else _affinity()
    if wanted > cores:
        fix = f"export OMP_NUM_THREADS={cores}: threads without a core wait for each other"
        return Finding("cores", WARNING, f"{text}, and {wanted} threads", fix)
    return Finding("cores", OK, f"{text}, {wanted} threads")


def num_cores() -> int:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    cores = _affinity()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        # no container, or one of the older kind
        pass
    return cores


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _age(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes} minutes"
        if minutes < 120
        else f"{minutes // 60} hours"
        if minutes < 2880
        else f"{minutes // 1440} days"
    )
