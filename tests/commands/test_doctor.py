"""`d2v-fast doctor` reports everything that is broken in one line with its fix, without a traceback."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2v_fast.commands import doctor
from d2v_fast.commands.console import main
from d2v_fast.commands.doctor import ABSENT, BROKEN, OK, WARNING, Finding, Package
from tests.helpers.places import ROOT

LIMIT_S = 60.0
_NO_KERNELS = {"cpu": "reference", "cuda": "none"}


def add_package(folder: Path, name: str, code: str) -> None:
    """A package that runs `code` when it is imported."""
    path = folder.joinpath(*name.split("."))
    path.mkdir(parents=True, exist_ok=True)
    (path / "__init__.py").write_text(code)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the search path."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def look(name: str, *, is_needed: bool = False, timeout_s: float = LIMIT_S) -> Finding:
    return doctor.package(Package(name, "tests", "pip install it", is_needed), timeout_s)


def test_packages_good_broken_and_missing(place: Path) -> None:
    add_package(place, "good_one", "print('noise')\n__version__ = '1.2'")
    assert look("good_one") == Finding("good_one", OK, "1.2")
    add_package(place, "broken_one", "raise RuntimeError('first line\\noperator torchvision::nms does not exist')")
    found = look("broken_one")
    assert found.state == BROKEN
    assert "(operator torchvision::nms does not exist); for tests" in found.text
    assert "--force-reinstall" in found.fix
    assert look("no_such_one").state == ABSENT
    needed = look("no_such_one", is_needed=True)
    assert (needed.state, needed.is_needed, needed.fix) == (BROKEN, True, "pip install it")


def test_packages_that_crash_or_hang_are_survived(place: Path) -> None:
    add_package(place, "crashing_one", "import os; os.abort()")
    assert "killed by signal 6" in look("crashing_one").text
    add_package(place, "hanging_one", "import time; time.sleep(100)")
    start = time.monotonic()
    assert "not finished after 1 s" in look("hanging_one", timeout_s=1).text
    assert time.monotonic() - start < 20
    add_package(place, "ending_one", "import sys; sys.exit(3)")
    assert "exit status 3" in look("ending_one").text
    add_package(place, "long_one", "raise ImportError('x' * 10_000)")
    assert len(look("long_one").text) < 300


def test_apex_is_told_apart_by_its_symbols(place: Path) -> None:
    # what needs the real torch is not looked at here, and it takes seconds to import
    add_package(place, "torch", "")
    add_package(place, "apex", "from pyramid.session import UnencryptedCookieSessionFactoryConfig")
    other = doctor.apex(LIMIT_S)
    assert other.state == WARNING
    assert "not NVIDIA's, for it has no apex.optimizers.FusedAdam" in other.text
    assert "pip uninstall apex" in other.fix
    add_package(place, "apex", "")
    add_package(place, "apex.optimizers", "class FusedAdam: pass")
    assert "without its CUDA extensions (amp_C: ModuleNotFoundError" in doctor.apex(LIMIT_S).text
    add_package(place, "amp_C", "multi_tensor_adam = None")
    assert doctor.apex(LIMIT_S) == Finding("apex", OK, "NVIDIA's, with FusedAdam")


def test_torchvision_of_another_torch(place: Path) -> None:
    add_package(place, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    found = doctor.beside_torch("torchvision", LIMIT_S)
    assert found.state == WARNING
    assert "does not fit this torch (RuntimeError: operator torchvision::nms does not exist)" in found.text
    assert "pip uninstall torchvision" in found.fix


def test_broken_torch_keeps_training_from_working(place: Path) -> None:
    add_package(place, "torch", "raise OSError('libtorch_cpu.so: cannot open shared object file')")
    (found,) = doctor.torch(LIMIT_S)
    assert (found.state, found.is_needed) == (BROKEN, True)
    assert "libtorch_cpu.so" in found.text
    kernels = doctor.kernels(LIMIT_S)
    assert (kernels.state, kernels.is_needed) == (BROKEN, True)
    add_package(
        place,
        "torch",
        "__version__ = '2.1.0+cu121'\nversion = cuda = type('fake', (), {'cuda': '12.1', 'hip': None, "
        "'is_available': lambda: False, 'device_count': lambda: 0})\nget_num_threads = lambda: 1",
    )
    line, gpu = doctor.torch(LIMIT_S)
    assert "2.1.0+cu121, built for CUDA 12.1, which is too old" in line.text
    assert line.is_needed
    assert gpu.name == "gpu"


def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.gpu({"devices": ["NVIDIA H100"], "cuda": "13.0"}) == Finding("gpu", OK, "NVIDIA H100")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    assert "built without CUDA" in doctor.gpu({"devices": [], "cuda": None}).text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpu({"devices": [], "cuda": "13.0"}).fix == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "install a driver for CUDA 13.0" in doctor.gpu({"devices": [], "cuda": "13.0"}).fix
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert doctor.gpu({"devices": [], "cuda": None}).state == OK


def test_stale_locks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [found.state for found in doctor.locks()] == [OK]
    for name in ("py311_cpu/cpu_adam", "py311_cpu/fused_adam"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    old = tmp_path / "py311_cpu/cpu_adam/lock"
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    stale, fresh = doctor.locks()
    assert (stale.state, fresh.state) == (WARNING, OK)
    assert "2 hours old" in stale.text
    assert f"rm {shlex.quote(str(old))}, unless" in stale.fix
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert "none in" in doctor.locks()[0].text


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = SimpleNamespace(f_blocks=1 << 14, f_bavail=1 << 14, f_frsize=1 << 12)
    monkeypatch.setattr(doctor.os, "statvfs", lambda path: small)
    found = doctor.shared_memory()
    assert found.state == WARNING
    assert "--shm-size" in found.fix

    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(doctor.os, "statvfs", missing)
    assert "num_workers` to 0" in doctor.shared_memory().fix


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads().state == OK
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert f"export OMP_NUM_THREADS={doctor.num_cores()}" in doctor.threads().fix


def test_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo old 4.8 && exit 0\nexit 1\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    assert doctor.compiler().text == "old 4.8 cannot compile C++20: kernels cannot be built"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert doctor.compiler().state == WARNING
    monkeypatch.delenv("CXX")
    assert doctor.compiler().state in (OK, WARNING)
    monkeypatch.setattr(doctor.sys, "executable", str(old))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.cmake().state == ABSENT
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 3.10.2\n")
    (tmp_path / "cmake").chmod(0o755)
    assert "3.10.2 is older than 3.18" in doctor.cmake().text


def test_a_wheel_has_no_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever installed a package is told nothing that needs the repository."""
    assert ROOT == doctor.SOURCE_TREE
    assert f"run `pip install -e .` in {doctor.SOURCE_TREE} with a C++20 compiler" in doctor.kernels_fix()
    monkeypatch.setattr(doctor, "SOURCE_TREE", None)
    monkeypatch.setattr(
        doctor, "ask", lambda code, timeout_s: doctor.Answer({"backends": _NO_KERNELS, "said": []}, None)
    )
    monkeypatch.setenv("CXX", "/no/such/compiler")
    found = [doctor.kernels(LIMIT_S), doctor.compiler(), doctor.cmake()]
    assert [finding.state for finding in found] == [found[0].state, ABSENT, OK]
    assert found[0].state in (BROKEN, WARNING)
    assert "install a wheel of d2v_fast for this platform; or, with a C++20 compiler" in found[0].fix
    assert "DeepSpeed's optimizers cannot be built" in found[1].text
    for finding in found:
        assert not re.search(r"\bmake \w|pip install -e", str(finding)), finding


def test_versions() -> None:
    assert doctor.numbers("2.13.0+cpu") == (2, 13)
    assert doctor.numbers("2.10.0a0+git") == (2, 10)
    assert doctor.numbers("3.18-rc1") == (3, 18)


def test_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a few packages, in the whole command: a line each, and the status that follows from what is needed."""
    add_package(place, "good_one", "__version__ = '1.2'")
    add_package(place, "broken_one", "raise ImportError('undefined symbol')")
    good, broken = Package("good_one", "tests", "x"), Package("broken_one", "tests", "pip install x")
    monkeypatch.setattr(doctor, "BESIDE_TORCH", ())
    monkeypatch.setattr(doctor, "torch", lambda timeout_s: [Finding("torch", OK, "there")])
    monkeypatch.setattr(doctor, "kernels", lambda timeout_s: Finding("C++ kernels", OK, "there"))
    monkeypatch.setattr(doctor, "triton", lambda timeout_s: Finding("triton", OK, "there"))
    monkeypatch.setattr(doctor, "PACKAGES", (good, broken))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "ok      good_one        1.2\n" in said
    assert "broken  broken_one      cannot be imported (ImportError: undefined symbol); for tests\n" in said
    assert "fix: pip install --force-reinstall x" in said
    assert re.search(r"training can work here; (1 warning|\d+ warnings)\n$", said)
    monkeypatch.setattr(doctor, "PACKAGES", (broken._replace(is_needed=True),))
    assert main(["doctor", "--timeout", "30"]) == 1
    assert "training cannot work until 1 of these problems is fixed" in capsys.readouterr().out


def test_every_finding_that_is_wrong_has_a_fix() -> None:
    for finding in doctor.kernels(LIMIT_S), doctor.triton(LIMIT_S), *doctor.torch(LIMIT_S), doctor.python():
        assert finding.fix or finding.state in (OK, ABSENT), finding
