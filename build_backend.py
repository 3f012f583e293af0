"""PEP 517 backend: setuptools, with torch as a build requirement if the environment has none.

The C++ kernels need torch's headers. pip's isolated build finds an installed torch through `python -I`, so that no
second one is downloaded. The environment of `python -m build` has none, so the build requires one there. The kernels
use torch's stable ABI and run with any torch that is installed later.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

MIN_TORCH = (2, 10)
_PROBE = """
import importlib.metadata, importlib.util, pathlib, re
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    print("found", *re.findall(r"\\d+", version)[:2], pathlib.Path(spec.origin).parent, sep="\\n")
"""


def torch_folder() -> Path:
    """Return the folder of the installed torch to compile with, without importing it.

    Raises:
        RuntimeError: torch is not installed, or too old.
    """
    older = ""
    # -I looks past pip's build isolation; without it Python finds a torch of the user's site or of the build
    for flags in (["-I"], []):
        answer = subprocess.run([sys.executable, *flags, "-c", _PROBE], capture_output=True, text=True, check=False)
        lines = answer.stdout.splitlines()
        if answer.returncode or "found" not in lines:
            continue
        *version, folder = lines[lines.index("found") + 1 :]
        if not version or tuple(map(int, version)) >= MIN_TORCH:
            return Path(folder)
        older = f" (torch {'.'.join(version)} is too old)"
    minimum = ".".join(map(str, MIN_TORCH))
    raise RuntimeError(f"torch>={minimum} is not installed{older}")


def wants_kernels() -> bool:
    """Return whether to build the C++ kernels: `D2V_NO_CPP=1` asks for a wheel without them."""
    return os.environ.get("D2V_NO_CPP") != "1"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what building a wheel needs beyond `pyproject.toml`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable install needs beyond `pyproject.toml`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    # torch is large: do not require it for a wheel without kernels
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not wants_kernels() or not any(map(shutil.which, compilers)):
        return []
    try:
        torch_folder()
    except RuntimeError:
        return ["torch>=" + ".".join(map(str, MIN_TORCH))]
    return []
