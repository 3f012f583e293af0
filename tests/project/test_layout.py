"""The structure that docs/architecture.md promises: the symlink, one stem per op, who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

PACKAGE = ROOT / "d2v_fast"
THIRD_PARTY = {
    "deepspeed",
    "transformers",
    "matplotlib",
    "tensorboard",
    "sklearn",
    "numba",
    "triton",
    "rich",
    "PIL",
    "soundfile",
    "soxr",
    "tokenizers",
    "pyarrow",
}

# module, or folder with everything below it -> what of this package it may import; config and the small leaves below
# it are free to all
LEAVES = {
    "d2v_fast.command_lines",
    "d2v_fast.files.atomic",
    "d2v_fast.config.schema",
    "d2v_fast.config.errors",
    "d2v_fast.config.file",
    "d2v_fast.config.deepspeed",
    "d2v_fast.config.deepspeed_sections",
    "d2v_fast.files.faults",
    "d2v_fast.files.io_errors",
    "d2v_fast.files.outputs",
    "d2v_fast.processes.idle",
    "d2v_fast.packages",
    "d2v_fast.files.paths",
    "d2v_fast.config.probe",
    "d2v_fast.processes.state",
    "d2v_fast.modalities.speech.config",
    "d2v_fast.masking.streams",
    "d2v_fast.modalities.text.config",
    "d2v_fast.files.reading",
}
MODEL = {"d2v_fast.modalities", "d2v_fast.models.encoder"}
ARROWS = {
    "d2v_fast.files.atomic": set(),
    "d2v_fast.command_lines": set(),
    "d2v_fast.config.schema": {
        "d2v_fast.config.probe",
        "d2v_fast.modalities.speech.config",
        "d2v_fast.modalities.text.config",
        "d2v_fast.modalities.vision.config",
    },
    "d2v_fast.config.errors": set(),
    "d2v_fast.config.file": set(),
    "d2v_fast.config.deepspeed": set(),
    "d2v_fast.config.deepspeed_sections": set(),
    "d2v_fast.files.io_errors": set(),
    "d2v_fast.files.outputs": set(),
    "d2v_fast.checkpoints.hold": set(),
    "d2v_fast.masking.streams": set(),
    "d2v_fast.packages": {"d2v_fast.__version__"},
    "d2v_fast.files.paths": set(),
    # options alone need no package; what reads the configuration is imported inside a function
    "d2v_fast.commands.cli": {"d2v_fast.commands.number_arguments", "d2v_fast.checkpoints.saved_config"},
    "d2v_fast.processes.state": set(),
    "d2v_fast.files.reading": set(),
    "d2v_fast.processes.idle": set(),
    "d2v_fast.kernels": set(),
    "d2v_fast.ops": {"d2v_fast.kernels"},
    "d2v_fast.masking": set(),
    "d2v_fast.data": {"d2v_fast.masking"},
    "d2v_fast.modalities": {
        "d2v_fast.models.encoder",
        "d2v_fast.models.layers",
        "d2v_fast.ops",
        "d2v_fast.models.post_norm",
        "d2v_fast.models.pre_norm",
    },
    "d2v_fast.models.encoder": set(),
    "d2v_fast.models.layers": {"d2v_fast.ops"},
    "d2v_fast.models.pre_norm": {"d2v_fast.models.layers"},
    "d2v_fast.models.post_norm": {"d2v_fast.models.encoder", "d2v_fast.models.layers"},
    "d2v_fast.objectives.data2vec": {*MODEL, "d2v_fast.ops"},
    "d2v_fast.distributed.peers": set(),
    "d2v_fast.distributed.watch": {"d2v_fast.distributed.peers"},
    "d2v_fast.distributed.world": {"d2v_fast.distributed.watch"},
    "d2v_fast.distributed.shards": {"d2v_fast.distributed.world"},
    "d2v_fast.checkpoints.shard_files": {"d2v_fast.distributed.shards", "d2v_fast.distributed.world"},
    "d2v_fast.teacher.zero": {"d2v_fast.distributed.shards"},
    "d2v_fast.teacher.average": {"d2v_fast.ops", "d2v_fast.distributed.shards", "d2v_fast.teacher.zero"},
    "d2v_fast.evaluation.features": {"d2v_fast.modalities"},
    "d2v_fast.evaluation.classifiers": {"d2v_fast.data", "d2v_fast.evaluation.features", "d2v_fast.modalities"},
    "d2v_fast.interop": {"d2v_fast.modalities"},
}
# only these may import a heavy package, and only inside a function
LAZY = {
    "deepspeed": {"d2v_fast.training.engine", "d2v_fast.teacher.zero"},
    "transformers": set(),
    "matplotlib": {"d2v_fast.figures.curves", "d2v_fast.training.metrics", "d2v_fast.figures.sheet"},
    "sklearn": {"d2v_fast.evaluation.classifiers", "d2v_fast.modalities.vision.digits"},
    "soundfile": {"d2v_fast.modalities.speech.decode"},
    "soxr": {"d2v_fast.modalities.speech.decode"},
    "tokenizers": {"d2v_fast.modalities.text.tokenizer"},
    "pyarrow": {"d2v_fast.modalities.text.parquet", "d2v_fast.modalities.text.streams", "d2v_fast.commands.embed"},
}
TOP_LEVEL_ALLOWED = {"numba": {"d2v_fast.masking"}, "triton": {"d2v_fast.kernels"}, "PIL": {"d2v_fast.data"}}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> list[Path]:
    # rglob does not follow the symlink, so the kernels are listed by their name in the package
    return sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "kernels").glob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether at its top level; under `if TYPE_CHECKING` they do not count."""
    found = []

    def visit(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 or path.parent.name == "kernels", f"{path}: relative import outside kernels/"
                if child.level == 0 and child.module == "d2v_fast":
                    found.extend((f"d2v_fast.{alias.name}", top) for alias in child.names)
                elif child.level == 0:
                    found.append((child.module or "", top))
            visit(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(path.read_text()), True)
    return found


def within(module: str, allowed: set[str]) -> bool:
    return any(module == one or module.startswith(one + ".") for one in allowed)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_arrows(path):
    name = module_name(path)
    owner = next((one for one in ARROWS if within(name, {one})), None)
    for module, top in imports(path):
        if module.startswith("d2v_fast"):
            assert module != "d2v_fast.train" or name == "d2v_fast.commands.console", f"{name} imports train"
            if owner is not None:
                assert within(module, ARROWS[owner] | LEAVES | {owner}), f"{name} must not import {module}"
        package = module.partition(".")[0]
        if package in LAZY:
            assert within(name, LAZY[package]) or package == "transformers", f"{name} must not import {package}"
            assert not top, f"{name} must import {package} inside a function"
        if package in TOP_LEVEL_ALLOWED and top:
            assert within(name, TOP_LEVEL_ALLOWED[package]), f"{name} must import {package} inside a function"
        if name == "d2v_fast.config.schema":
            assert package != "torch"


def check_link(name, pattern):
    """In a clone a folder of the package is a link; a source archive holds a copy."""
    link = PACKAGE / name
    if (ROOT / "PKG-INFO").exists():
        files = {path.name: path.read_bytes() for path in (ROOT / name).glob(pattern)}
        assert {path.name: path.read_bytes() for path in link.glob(pattern)} == files
    else:
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_kernels_is_a_link_without_init():
    check_link("kernels", "*.py")
    # with one, `import kernels` from the root would hide Hugging Face's package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_configurations_are_linked_and_shipped():
    check_link("configs", "*.json")
    # setuptools follows the link when it copies what this names
    assert '"configs/*.json"' in (ROOT / "pyproject.toml").read_text()


def test_no_module_hides_another():
    """`deepspeed d2v_fast/train.py` puts this folder first on sys.path."""
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not names & set(sys.stdlib_module_names)
    assert not names & (THIRD_PARTY | {"torch", "numpy", "pydantic", "safetensors", "pytest"})


@pytest.mark.parametrize("op", ["ema", "topk_target", "masked_loss", "data2vec_loss", "norm_gelu"])
def test_one_stem_per_op(op):
    places = ("csrc/{}.cpp", "kernels/{}.py", "d2v_fast/ops/{}.py", "tests/ops/test_{}.py", "bench/bench_{}.py")
    for place in places:
        assert (ROOT / place.format(op)).exists(), place.format(op)


@pytest.mark.alone
def test_ops_import_is_light():
    """Neither DeepSpeed nor Transformers nor numba, and at most 0.3 s more than torch itself."""
    code = """
import sys, time
import torch
start = time.perf_counter()
import d2v_fast.ops
seconds = time.perf_counter() - start
heavy = {"deepspeed", "transformers", "numba", "pydantic", "triton", "sklearn", "matplotlib"} & set(sys.modules)
print(seconds, *heavy)
"""
    best = float("inf")
    for _ in range(3):
        seconds, *heavy = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert not heavy
        best = min(best, float(seconds))
        if best <= 0.3:
            break
    assert best <= 0.3


@pytest.mark.alone
def test_help_is_quick():
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, str(PACKAGE / "train.py"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
        assert "--ds_config" in done.stdout
    assert best < 1.0


def test_no_file_grows_past_500_lines():
    others = [*ROOT.glob("csrc/*"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py")]
    for path in [*sources(), *others]:
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"
