"""Build of the C++ kernels: setuptools calls CMake, CMake makes one library, ``d2v_fast/_C.so``.

Why it looks like this:

* torch is no build requirement. An isolated build would download a second one and compile against that. The torch of
  the environment is asked for its folder instead; ``python -I`` sees it through pip's build isolation.
* The library uses torch's stable ABI and no Python header: it needs a C++20 compiler, and one build serves every
  Python.
* It is linked to ``libtorch_cpu.so`` by path rather than through ``find_package(Torch)``, which fails for a CUDA build
  of torch on a machine without the CUDA toolkit.
* Without a compiler or torch the install goes on: every operation has a PyTorch reference. ``D2V_REQUIRE_CPP=1`` makes
  it an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_folder() -> Path:
    """The folder of the installed torch: with ``-I`` past pip's isolation, without it for a user-site install."""
    probe = "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"
    for flags in (["-I"], []):
        answer = subprocess.run([sys.executable, *flags, "-c", probe], capture_output=True, text=True)
        if answer.returncode == 0:
            return Path(answer.stdout.strip().splitlines()[-1])
    raise RuntimeError("torch is not installed: `pip install torch` first, then install d2v_fast again")


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_with_cmake()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("D2V_REQUIRE_CPP") == "1":
                raise
            print(
                f"d2v_fast: installed without its C++ kernels, the PyTorch reference is used ({error})",
                file=sys.stderr,
            )

    def build_with_cmake(self) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        # setuptools owns the rest of build/; a kept tree makes the second build a matter of seconds
        tree = ROOT / "build" / "cmake"
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(tree),
            "-G",
            "Unix Makefiles",
            f"-DD2V_TORCH_FOLDER={torch_folder()}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            # a tree made by another cmake or compiler that is gone cannot be configured again
            shutil.rmtree(tree, ignore_errors=True)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(tree), "--parallel", str(os.cpu_count() or 1)], check=True)
        # setuptools hides `inplace` while it builds
        in_place = "--inplace" in sys.argv or getattr(self, "editable_mode", False)
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        subprocess.run([cmake, "--install", str(tree), "--prefix", str(prefix)], check=True)

    def copy_extensions_to_source(self) -> None:
        # CMake installed it there already
        pass

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("d2v_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
