"""The structure that docs/architecture.md promises: links, one stem per operation, allowed imports, sizes."""

from __future__ import annotations

import ast
import functools
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_fast import config
from tests.helpers.common import run_python
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
    "rapidfuzz",
    "flashlight",
}

PAGE = (ROOT / "docs" / "architecture.md").read_text()
MAX_LINES, MAX_PARAMETERS = 80, 8
# operator schemas are flat, and numba kernels accept only arrays and numbers: neither can take a record
FLAT = (
    "d2v_fast.ops.",
    "d2v_fast.kernels.",
    "d2v_fast.masking.",
    "d2v_fast.modalities.speech.conv_stack.",
    "d2v_fast.modalities.text.packing._fill",
    # Transformers wants every key of a configuration as a parameter
    *(f"d2v_fast.modalities.{one}.remote.configuration_" for one in ("vision", "speech", "text")),
)

# only these may import a heavy package, and only inside a function
LAZY = {
    "deepspeed": {"d2v_fast.distributed.deepspeed_start"},
    "transformers": set(),
    "matplotlib": {
        *("d2v_fast.figures.confusion", "d2v_fast.figures.curves", "d2v_fast.figures.sheet"),
        "d2v_fast.training.metrics",
    },
    "sklearn": {
        *("d2v_fast.evaluation.classifiers", "d2v_fast.evaluation.metrics", "d2v_fast.modalities.vision.digits"),
    },
    "scipy": {"d2v_fast.evaluation.metrics"},
    "soundfile": {"d2v_fast.modalities.speech.decode"},
    "soxr": {"d2v_fast.modalities.speech.decode"},
    "rapidfuzz": {"d2v_fast.evaluation.word_errors"},
    "flashlight": {"d2v_fast.modalities.speech.recognition"},
    "tokenizers": {"d2v_fast.modalities.text.tokenizer"},
    "pyarrow": {
        *("d2v_fast.modalities.text.parquet", "d2v_fast.modalities.text.streams"),
        "d2v_fast.commands.left_out",
    },
}
TOP_LEVEL_ALLOWED = {
    "numba": {"d2v_fast.masking"},
    "triton": {"d2v_fast.kernels"},
    "PIL": {"d2v_fast.modalities.vision"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def carried() -> list[Path]:
    """Code that exports carry and that other programs run; nothing here imports it."""
    return sorted(PACKAGE.glob("**/remote/*.py"))


def sources() -> list[Path]:
    # rglob does not follow the symlink, so the kernels are listed by their name in the package
    found = sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "kernels").glob("*.py"))
    return [path for path in found if path not in carried()]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
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

    visit(tree(path), True)
    return found


def floors() -> dict[str, set[str]]:
    """Folder or module -> what it may import, from the lowest to the highest, as docs/architecture.md shows it."""
    block = PAGE.partition("```imports\n")[2].partition("```")[0]
    lines = (line.partition(":") for line in block.splitlines())
    return {name: set(allowed.replace(",", " ").split()) for name, _, allowed in lines}


FLOORS = floors()


def floor(module: str) -> str:
    """The line of the page that owns a module."""
    name = module.removeprefix("d2v_fast").removeprefix(".")
    path = PACKAGE / name.replace(".", "/")
    if not path.is_dir() and "." in name:
        name = name.rpartition(".")[0]
    return name or "__init__"


def arrows() -> dict[tuple[str, str], list[str]]:
    """(floor, floor that it imports) -> the imports."""
    modules = {module_name(path) for path in sources()}
    found: dict[tuple[str, str], list[str]] = {}
    for path in sources():
        name = module_name(path)
        for module, _ in imports(path):
            if not module.startswith("d2v_fast"):
                continue
            target = module if module in modules else module.rpartition(".")[0]
            assert target in modules, f"{name} imports {module}"
            if floor(target) not in (floor(name), "__init__"):
                found.setdefault((floor(name), floor(target)), []).append(f"{name} -> {target}")
    return found


def test_only_a_modality_knows_its_configuration():
    """Every other module asks the modality's record, so that another modality needs no edit of it."""
    classes = {one for names in config._OF_MODALITY.values() for one in names}
    for path in sources():
        name = module_name(path)
        # trains a tokenizer, which text alone has
        if name.startswith("d2v_fast.modalities.") or name in ("d2v_fast.config", "d2v_fast.commands.tokenize"):
            continue
        named = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        assert not named & classes, f"{name} names {named & classes}"


def within(module: str, allowed: set[str]) -> bool:
    return any(module == one or module.startswith(one + ".") for one in allowed)


def test_every_module_has_a_floor():
    assert {floor(module_name(path)) for path in sources()} == set(FLOORS)


def test_imports_point_downwards():
    names = list(FLOORS)
    for name, allowed in FLOORS.items():
        higher = {one for one in allowed if names.index(one) >= names.index(name)}
        assert not higher, f"docs/architecture.md lets {name} import what is not below it: {higher}"


def test_imports_are_those_of_the_page():
    found = arrows()
    for (name, target), examples in found.items():
        assert target in FLOORS[name], f"docs/architecture.md has no {name}: {target}; {examples}"
    shown = {(name, target) for name, allowed in FLOORS.items() for target in allowed}
    assert not shown - set(found), "docs/architecture.md shows imports that nothing does"


def test_heavy_packages_are_imported_where_they_are_needed():
    for path in sources():
        name = module_name(path)
        for module, top in imports(path):
            package = module.partition(".")[0]
            if package in LAZY:
                assert within(name, LAZY[package]), f"{name} must not import {package}"
                assert not top, f"{name} must import {package} inside a function"
            if package in TOP_LEVEL_ALLOWED and top:
                assert within(name, TOP_LEVEL_ALLOWED[package]), f"{name} must import {package} inside a function"
            if floor(name) == "config":
                assert package != "torch", name


@functools.cache
def functions() -> list[tuple[str, int, int]]:
    """Name, lines and parameters of every function."""
    found = []
    for path in [*sources(), *carried()]:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len([one for one in names if one not in ("self", "cls", "ctx")])
                found.append((f"{module_name(path)}.{node.name}", node.end_lineno - node.lineno + 1, count))
    return found


def test_functions_are_short():
    long = {name for name, lines, _ in functions() if lines > MAX_LINES and not name.startswith(FLAT)}
    assert not long


def test_functions_have_few_parameters():
    wide = {name for name, _, count in functions() if count > MAX_PARAMETERS and not name.startswith(FLAT)}
    assert not wide


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


# each import comes after those above it, in one process
LIGHT = """
import sys, time
import torch
start = time.process_time()
import d2v_fast.ops
print(time.process_time() - start)
heavy = {"deepspeed", "transformers", "sklearn", "matplotlib", "triton", "soundfile", "soxr", "cffi", "tokenizers"}
heavy |= {"pyarrow", "rich", "fairseq", "torch.distributed.fsdp"}
print("ops:", *(heavy | {"numba", "pydantic"}) & set(sys.modules))
import d2v_fast.teacher.average
print("teacher:", *(heavy | {"numba"}) & set(sys.modules))
import d2v_fast.data, d2v_fast.modalities.speech.audio, d2v_fast.modalities.text.tasks
print("data:", *heavy & set(sys.modules))
import d2v_fast.interop.huggingface, d2v_fast.interop.fairseq, d2v_fast.training.import_weights
print("formats:", *heavy & set(sys.modules))
"""


def test_imports_are_light():
    """Packages are imported at their first use, and the operations compute for at most 0.3 s more than torch itself."""
    best = float("inf")
    for _ in range(3):
        seconds, *found = run_python(LIGHT).splitlines()
        assert found == ["ops:", "teacher:", "data:", "formats:"]
        best = min(best, float(seconds))
        if best <= 0.3:
            break
    assert best <= 0.3


def computed_s() -> float:
    """Seconds of computing of the processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_quick():
    for program in ([str(PACKAGE / "train.py")], ["-m", "d2v_fast"]):
        best = float("inf")
        for _ in range(3):
            start = computed_s()
            done = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, check=True)
            best = min(best, computed_s() - start)
            assert done.stdout.startswith("usage: ")
            if best < 1.0:
                break
        assert best < 1.0


def test_no_file_grows_past_500_lines():
    others = [*ROOT.glob("csrc/*"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py")]
    for path in [*sources(), *others]:
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"
