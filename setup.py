"""Build the C++ kernels: setuptools calls CMake, which builds one library, ``d2v_fast/_C.so``.

* The library uses torch's stable ABI and no Python header. One wheel, tagged py3-none-PLATFORM, therefore serves every
  Python and every torch from 2.10 on.
* The library names ``libtorch_cpu.so`` without a folder and is linked without ``find_package(Torch)``, which fails for
  a CUDA build of torch on a machine without the CUDA toolkit. ``build_backend.py`` finds the torch to compile with.
* Without a compiler or torch the build continues, since every operation has a PyTorch reference, and the wheel is
  py3-none-any. ``D2V_REQUIRE_CPP=1`` makes this an error; ``D2V_NO_CPP=1`` asks for such a wheel.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from build_backend import torch_folder, wants_kernels

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Build with CMake, or continue without kernels."""

    has_kernels = False

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        # setuptools hides `inplace` while it builds
        in_place = "--inplace" in sys.argv or getattr(self, "editable_mode", False)
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        if not in_place:
            # remove the library of an earlier build: a wheel holds only its own
            (prefix / "d2v_fast" / "_C.so").unlink(missing_ok=True)
        try:
            self.build_with_cmake(prefix)
            self.has_kernels = True
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("D2V_REQUIRE_CPP") == "1":
                raise
            print(f"d2v_fast: no C++ kernels, the PyTorch reference is used ({error})", file=sys.stderr)

    def build_with_cmake(self, prefix: Path) -> None:
        if not wants_kernels():
            raise RuntimeError("D2V_NO_CPP=1")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is not installed")
        # setuptools owns the rest of build/; keeping the tree makes the next build fast
        tree = ROOT / "build" / "cmake"
        if self.force:
            # it compares times of files, which a copy of the sources may change
            shutil.rmtree(tree, ignore_errors=True)
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
            # a tree of another cmake, or of a removed compiler, cannot be configured again
            shutil.rmtree(tree, ignore_errors=True)
            subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(tree), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run([cmake, "--install", str(tree), "--prefix", str(prefix)], check=True)

    def copy_extensions_to_source(self) -> None:
        # CMake installed it there already
        pass

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """Tag the wheel for any Python: for this platform if it has kernels, else for all."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and not self.get_finalized_command("build_ext").has_kernels:
            self.root_is_pure = True
            # install the rest as pure Python
            self.distribution.ext_modules = []

    def get_tag(self) -> tuple[str, str, str]:
        # the kernels are built for one architecture, even with a universal2 Python
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


setup(
    ext_modules=[Extension("d2v_fast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
