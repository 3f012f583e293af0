"""Without a package, every command that needs it names the extra that installs it, and the others work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast import packages
from d2v_fast.commands import doctor
from d2v_fast.interop.export import export_run
from tests.helpers.places import ROOT
from tests.helpers.runs import fork, leave_out_reports, run_here, tiny_file, wait

TRAIN = (
    *("numpy", "numba", "pydantic", "PIL", "safetensors", "sklearn", "deepspeed", "tensorboard", "matplotlib"),
    *("rich", "soundfile", "soxr", "rapidfuzz", "tokenizers"),
)
OTHERS = ("pyarrow", "onnx", "onnxscript", "transformers", "pytest", "pytest_benchmark")
# as modules of Python's own import system do, so that a hidden package is one that is not installed
HIDE = """
import sys

class Hiding:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)

def hide(names):
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, images, text and the file of a configuration."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        file = tiny_file(folder, d2v__schedule={"steps": 1}, d2v__run__save_every=1)
        assert run_here(file, "--run", "r") == 0
    (folder / "images").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "words.txt").write_text("some words to read\n" * 50)
    export_run(folder / "runs" / "r")
    return folder


COMMANDS = {
    "train": "train tiny.json --run {name} --set d2v.run.dir={new}",
    "check": "check tiny.json",
    "check several": "check tiny.json --processes 2",
    "probe": "probe runs/r",
    "embed": "embed runs/r images --to {new}.npy",
    "embed a table": "embed runs/r images --to {new}.parquet",
    "export": "export runs/r --to {new}",
    "export onnx": "export runs/r --to {new}.onnx --format onnx",
    "import": "import runs/r/export --to {new} --ds_config tiny.json",
    "tokenize": "tokenize words.txt --train --vocab-size 270 --to {new}",
    "draw": "draw runs/r --count 2 --out {new}.png",
    "presets": "presets",
}


def run_without(names: Sequence[str], commands: Sequence[str], place: Path, tmp_path: Path) -> list[tuple[int, str]]:
    """Status and output of commands in a process that has none of these packages."""
    result = tmp_path / "result.json"

    def work() -> int:
        space: dict[str, Any] = {}
        exec(HIDE, space)
        space["hide"](names)
        # the operations stay, which PyTorch cannot register again; they need none of these
        kept = ("d2v_fast.ops", "d2v_fast.kernels")
        for module in list(sys.modules):
            top = module.partition(".")[0]
            if top in names or (top == "d2v_fast" and not module.startswith(kept)):
                del sys.modules[module]
        os.chdir(place)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        from d2v_fast.commands.console import main

        found = []
        for number, command in enumerate(commands):
            words = command.format(new=tmp_path / f"{number}", name=f"n{number}").split()
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
                try:
                    status = main(words)
                except SystemExit as error:
                    status = int(error.code or 0)
            found.append((status, out.getvalue()))
        result.write_text(json.dumps(found))
        return 0

    output = tmp_path / "output"
    assert wait(fork(work, output), timeout_s=250) == [0], output.read_text()
    found: list[tuple[int, str]] = json.loads(result.read_text())
    return found


DATA = ["train", "check", "check several", "probe", "embed", "embed a table", "import", "tokenize", "draw"]
# the commands that a package keeps from working
NEEDED = {
    "pydantic": list(COMMANDS),
    "numpy": DATA,
    "numba": DATA,
    # the other commands read no image file
    "PIL": [name for name in DATA if name not in ("probe", "import", "tokenize")],
    "safetensors": [name for name in DATA if name != "tokenize"] + ["export", "export onnx"],
    "sklearn": ["train", "check", "probe", "draw"],
    "matplotlib": ["draw"],
    "deepspeed": ["check several"],
    "tokenizers": ["tokenize"],
    "pyarrow": ["embed a table"],
    "onnx": ["export onnx"],
    "onnxscript": ["export onnx"],
}


@pytest.mark.parametrize("package", NEEDED)
def test_commands_name_the_extra(package: str, place: Path, tmp_path: Path) -> None:
    pytest.importorskip(package)
    names = NEEDED[package]
    found = run_without([package], [COMMANDS[name] for name in names], place, tmp_path)
    command = packages.install_command(package)
    for name, (status, said) in zip(names, found, strict=True):
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (name, said)
        (error,) = errors
        assert command in error, (name, said)
        assert re.search(package.replace("sklearn", "sklearn|scikit-learn").replace("deepspeed", "DeepSpeed"), error)
        assert status == 1, (name, said)
        assert "Traceback" not in said


def test_every_extra_is_the_one_that_has_the_package() -> None:
    extras = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    published = {"PIL": "pillow", "sklearn": "scikit-learn", "pytest_benchmark": "pytest-benchmark"}
    for package in (*TRAIN, *OTHERS):
        (extra,) = re.findall(r"pip install 'd2v_fast\[(\w+)\]'", packages.install_command(package))
        names = [re.split(r"[><=;]", text)[0] for text in extras["optional-dependencies"][extra]]
        assert published.get(package, package) in names
    assert packages.install_command("torch") == "pip install torch"
    assert {package.name for package in doctor.PACKAGES} <= {*TRAIN, *OTHERS}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of processes that have torch, and no package of any extra."""
    (tmp_path / "path").mkdir()
    names = (*TRAIN, *OTHERS)
    (tmp_path / "path" / "sitecustomize.py").write_text(f"{HIDE}\nhide({names!r})\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "path")}


def run_bare(bare: dict[str, str], tmp_path: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_help_and_version_need_no_extra(bare: dict[str, str], tmp_path: Path) -> None:
    """They import neither torch nor anything else outside the standard library."""
    code = f"""
import contextlib, io, sys
from d2v_fast import train
from d2v_fast.commands import console
for words in [["--help"], ["--version"], *([name, "--help"] for name in console._WORK)]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for main in (console.main, train.main) if len(words) == 1 else (console.main,):
            try:
                main(words)
            except SystemExit as error:
                assert not error.code, words
    assert out.getvalue().startswith(("usage: ", "d2v_fast ")), words
print({{*{(*TRAIN, *OTHERS, "torch")!r}}} & {{*sys.modules}})
"""
    assert run_bare(bare, tmp_path, "-c", code) == (0, "set()\n", "")
    status, said, _ = run_bare(bare, tmp_path, "-m", "d2v_fast", "--version")
    assert (status, said) == (0, f"{packages.version_line()}\n")


def test_every_entry_names_the_extra(bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    needs = "error: pydantic cannot be imported: No module named 'pydantic'. `pip install 'd2v_fast[train]'` installs"
    file = str(ROOT / "d2v_fast" / "train.py")
    for entry in (["-m", "d2v_fast", "train"], [file, "--ds_config"], ["-m", "d2v_fast.train"]):
        status, said, error = run_bare(bare, tmp_path, *entry, "x.json")
        assert (status, said) == (1, "")
        assert error.startswith(needs)
        assert error.count("\n") == 1


def test_modules_of_the_package_name_the_extra(bare: dict[str, str], tmp_path: Path) -> None:
    code = """
import d2v_fast
assert d2v_fast.ops.backends()
for name in ("config", "teacher", "masking", "data", "nothing"):
    try:
        exec(f"from d2v_fast import {name}")
    except ImportError as error:
        print(f"{type(error).__name__}: {error}")
"""
    status, said, error = run_bare(bare, tmp_path, "-W", "ignore", "-c", code)
    assert (status, error) == (0, "")
    *missing, nothing = said.splitlines()
    assert len(missing) == 4
    for line in missing:
        assert re.match(r"MissingPackageError: \w+ cannot be imported: .* `pip install 'd2v_fast\[train\]'`", line)
    assert nothing.startswith("ImportError: cannot import name 'nothing' from 'd2v_fast'")


def test_version_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise packages.metadata.PackageNotFoundError(name)

    line = packages.version_line()
    assert re.match(r"d2v_fast \d+\.\d+\S* \(torch 2\.\S+, (no )?C\+\+ kernels, Python 3\.\d+\.\d+\)$", line)
    monkeypatch.setattr(packages.metadata, "version", absent)
    monkeypatch.setattr(packages, "__file__", str(tmp_path / "packages.py"))
    assert "(no torch, no C++ kernels, Python" in packages.version_line()
    (tmp_path / "_C.so").touch()
    assert "(no torch, C++ kernels, Python" in packages.version_line()
