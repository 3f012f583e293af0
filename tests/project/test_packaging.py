"""Source archive and wheels of `python -m build` are complete, and work outside of a clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import build_backend
from d2v_fast import __version__
from tests.helpers.places import ROOT
from tests.helpers.runs import tiny_file

NAME = f"d2v_fast-{__version__}"
FOLDERS = (".ci", ".github", "bench", "configs", "csrc", "d2v_fast", "docs", "kernels", "tests")
FILES = (
    *("CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("CITATION.cff", "CODE_OF_CONDUCT.md", "mkdocs.yml", ".pre-commit-config.yaml"),
    *("SECURITY.md", "build_backend.py", "conftest.py", "constraints.txt", "pyproject.toml", "requirements.lock"),
    *("setup.py", ".clang-format"),
)
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
# what a machine of the manylinux policies has, and torch
SYSTEM = re.compile(r"lib(c|m|gcc_s|stdc\+\+|dl|pthread|rt|torch_cpu)\.so(\.\d+)?|ld-linux.*\.so\.\d+")

needs_build = pytest.mark.skipif(find_spec("build") is None, reason="needs build")
# the first test that asks for the wheel waits for its build
pytestmark = pytest.mark.timeout(900)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command and return what it printed, with the tools of this environment on the search path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("D2V_")}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**clean, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def build(what: str, source: Path, to: Path, **environment: str) -> tuple[Path, str]:
    """Run `python -m build` without isolation, which would need a network; the file and what was printed."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(to), str(source)]
    said = run(command, source, **environment)
    (made,) = to.iterdir()
    return made, said


def files_below(folder: Path) -> set[str]:
    """Paths of files, also below links, without what `source` left there."""
    walk = [(Path(place), names) for place, _, names in os.walk(folder, followlinks=True)]
    found = {(place / name).relative_to(folder).as_posix() for place, names in walk for name in names}
    return {path for path in found if not path.endswith((".so", ".pyc"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, with links, and with everything that a build and a run leave in it."""
    place = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy(ROOT / name, place / name)
    for name in ("build/old/x.py", "runs/r-1/log.jsonl", ".venv/lib/x.py", "d2v_fast/_C.so", "tests/__pycache__/x.pyc"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("left here")
    return place


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    made, _ = build("sdist", source, tmp_path_factory.mktemp("sdist"))
    assert made.name == f"{NAME}.tar.gz"
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(made) as tar:
        assert all(member.isfile() or member.isdir() for member in tar)
        tar.extractall(place, filter="data")
    return place / NAME


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source archive gives on a machine with a compiler and torch."""
    return build("wheel", archive, tmp_path_factory.mktemp("wheel"), D2V_REQUIRE_CPP="1")[0]


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and of this environment the packages that it needs."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, symlinks=True)
    found = place / "bin" / "python"
    # a folder in a .pth file brings its packages, but no editable install
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(found), "install", "--no-index", "--no-deps", "--no-compile"]
    run([*pip, str(wheel)], place)
    return found


@needs_build
def test_source_archive_is_complete(source: Path, archive: Path) -> None:
    there = files_below(archive)
    assert not list(archive.rglob("*.so")) + list(archive.rglob("*.pyc"))
    for name in FOLDERS:
        wanted = files_below(source / name)
        assert {path for path in there if path.startswith(f"{name}/")} == {f"{name}/{path}" for path in wanted}, name
    rest = {path for path in there if path.split("/")[0] not in FOLDERS and not path.startswith("d2v_fast.egg-info/")}
    assert rest == {*FILES, "PKG-INFO", "setup.cfg"}
    # links in a clone, folders here
    for name in ("kernels", "configs"):
        assert files_below(archive / "d2v_fast" / name) == files_below(source / name)


@needs_build
@pytest.mark.slow
def test_wheel_with_kernels(source: Path, wheel: Path) -> None:
    assert re.fullmatch(rf"{NAME}-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        there = set(opened.namelist())
        described = opened.read(f"{NAME}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in described
    assert f"Tag: {wheel.stem.removeprefix(f'{NAME}-')}" in described
    package = {path for path in there if not path.startswith(f"{NAME}.dist-info/")}
    assert package == {"d2v_fast/_C.so", *(f"d2v_fast/{path}" for path in files_below(source / "d2v_fast"))}
    assert f"{NAME}.dist-info/licenses/LICENSE" in there


@needs_build
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_kernels_name_no_folder_and_nothing_new(wheel: Path, tmp_path: Path) -> None:
    """One library for every torch from 2.10 on: nothing of the torch that it was built with but functions of 2.10."""
    with zipfile.ZipFile(wheel) as opened:
        library = opened.extract("d2v_fast/_C.so", tmp_path)
    dynamic = run(["readelf", "--dynamic", "--wide", library], tmp_path)
    assert not re.search(r"R(UN)?PATH", dynamic)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if not SYSTEM.fullmatch(name)] == []
    symbols = [line.split() for line in run(["readelf", "--dyn-syms", "--wide", library], tmp_path).splitlines()]
    # those with a version are the system's
    wanted = {words[7] for words in symbols if words[6:7] == ["UND"] and words[4] == "GLOBAL" and "@" not in words[7]}
    there = set((ROOT / "tests" / "torch_2_10_functions.txt").read_text().split())
    assert "torch_call_dispatcher" in wanted
    assert wanted - there == set(), "torch 2.10 has no such functions"


@needs_build
@pytest.mark.slow
def test_wheel_without_kernels_is_pure(archive: Path, wheel: Path, tmp_path: Path) -> None:
    """Where a wheel with kernels was built before, whose library still lies in build/."""
    assert list(archive.glob("build/lib*/d2v_fast/_C.so"))
    pure, said = build("wheel", archive, tmp_path, D2V_NO_CPP="1")
    assert pure.name == f"{NAME}-py3-none-any.whl"
    assert "d2v_fast: no C++ kernels, the PyTorch reference is used (D2V_NO_CPP=1)" in said
    with zipfile.ZipFile(pure) as opened, zipfile.ZipFile(wheel) as other:
        assert "Root-Is-Purelib: true" in opened.read(f"{NAME}.dist-info/WHEEL").decode()
        assert set(opened.namelist()) == set(other.namelist()) - {"d2v_fast/_C.so"}


_USE = """
import torch
import d2v_fast
from d2v_fast import ops

print(d2v_fast.__file__, ops.backends()["cpu"])
teacher, student = torch.zeros(3, 5), torch.ones(3, 5)
ops.ema_update_([teacher], [student], 0.75)
assert torch.equal(teacher, torch.full((3, 5), 0.25))
x = torch.randn(4, 6, 8, requires_grad=True)
loss, moments = ops.data2vec_loss(
    x.flatten(0, 1)[:7], [torch.randn(4, 6, 8)] * 2, layer_norm="layer", final_norm="none",
    rows=torch.arange(7), beta=2.0
)
loss.backward()
assert x.grad.abs().sum() > 0
y = ops.layer_norm_gelu(x, torch.ones(8), torch.zeros(8))
torch.testing.assert_close(y, torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, (8,))))
"""


@needs_build
@pytest.mark.slow
def test_installed_wheel_works_anywhere(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    where, backend = run([str(python), "-W", "error", "-c", _USE], folder).split(maxsplit=1)
    assert Path(where).is_relative_to(python.parent.parent)
    assert backend.startswith("c++")
    tool = str(python.with_name("d2v-fast"))
    assert "300 recordings" in run([tool, "train", "speech", "--dry-run"], folder)
    file = tiny_file(tmp_path, d2v__schedule={"steps": 3}, d2v__run__save_every=2)
    said = run([tool, "train", str(file), "--run", "r"], folder)
    assert "step 3/3" in said
    assert "student" in said.partition("after step 3")[2]
    assert "not built" not in said
    assert (tmp_path / "runs" / "r" / "export" / "model.safetensors").is_file()


_TYPED = """
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from d2v_fast import ops
from d2v_fast.config import TeacherConfig, load_config
from d2v_fast.teacher import Teacher


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(2, 6, 8), torch.arange(5)


student = nn.Linear(8, 8)
teacher = Teacher(student, TeacherConfig(decay_start=0.9, decay_end=0.999, decay_steps=10))
update = ops.EmaUpdate([torch.zeros(3)], [torch.ones(3)])
decay: float = teacher.decay(1)
for step, (x, rows) in enumerate(batches(), start=1):
    layers: list[Tensor] = [teacher.module(x)]
    target: Tensor = ops.topk_target(layers, layer_norm="layer", rows=rows)
    found: ops.MaskedLoss = ops.masked_smooth_l1(student(x).flatten(0, 1)[rows], target, beta=1.0)
    loss, moments = ops.data2vec_loss(student(x).flatten(0, 1)[rows], layers, rows=rows)
    (loss + found.loss).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
    y: Tensor = ops.layer_norm_gelu(x, torch.ones(8), torch.zeros(8))
    ops.ema_update_(student.parameters(), student.state_dict().values(), 0.5)
    teacher.update(step)
    update(0.9)
width: int = load_config("digits").d2v.model.width
reveal_type(ops.backends())
"""
# what a type checker must find: an argument that does not exist, a result of another type, and a wrong type of one
_MISTYPED = """
import torch

from d2v_fast import ops

ops.topk_target([torch.zeros(1, 1, 1)], norm="layer")
number: int = ops.layer_norm_gelu(torch.ones(2), torch.ones(2), torch.ones(2))
ops.EmaUpdate([torch.ones(2)], [torch.ones(2)])("half")
"""


@needs_build
@pytest.mark.slow
@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy")
def test_scripts_of_users_are_type_checked(python: Path, tmp_path: Path) -> None:
    """`mypy --strict` with the installed wheel: `py.typed` is there, and the public names are typed."""
    for name, code in (("typed", _TYPED), ("mistyped", _MISTYPED)):
        (tmp_path / f"{name}.py").write_text(code)
    check = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable", str(python)]
    said = run([*check, "typed.py"], tmp_path)
    assert "Success: no issues found" in said
    assert 'Revealed type is "dict[str, str]"' in said.replace("builtins.", "")
    done = subprocess.run([*check, "mistyped.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=280)
    assert re.findall(r"^mistyped\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout, re.MULTILINE) == [
        ("6", "call-arg"),
        ("7", "assignment"),
        ("8", "arg-type"),
    ]


def test_torch_is_required_to_build_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = build_backend.torch_folder()
    assert (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file()
    hooks = (build_backend.get_requires_for_build_wheel, build_backend.get_requires_for_build_editable)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(build_backend.build_meta, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.setattr(build_backend.build_meta, "get_requires_for_build_editable", lambda settings: [])
    assert [hook() for hook in hooks] == [[], []]
    # an interpreter that finds no torch, and one that finds an old one
    for answer, problem in (
        ("", "is not installed$"),
        ("found\\n2\\n9\\n/old", r"not installed \(torch 2.9 is too old"),
    ):
        other = tmp_path / "python"
        other.write_text(f'#!/bin/sh\nprintf "{answer}"\n')
        other.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(other))
        with pytest.raises(RuntimeError, match=problem):
            build_backend.torch_folder()
        assert [hook() for hook in hooks] == [["torch>=2.10"], ["torch>=2.10"]]
    # nothing is downloaded for a wheel without kernels
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert [hook() for hook in hooks] == [[], []]
    monkeypatch.setenv("CXX", str(other))
    monkeypatch.setenv("D2V_NO_CPP", "1")
    assert [hook() for hook in hooks] == [[], []]
