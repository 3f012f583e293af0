"""No source file calls a function that executes or unpickles what it reads, and every test in SECURITY.md exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.project.source_calls import FUNCTIONS, full_name, imported

# to import one of these is to mean it
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve", "code"}
# a call needs this argument, written out
NEEDED = {"torch.load": ("weights_only", True), "torch.serialization.load": ("weights_only", True)}
# no call may have this argument but with this value, written out
FORBIDDEN = {"shell": False, "allow_pickle": False, "trust_remote_code": False}
# a text that switches the protection of torch.load off
TEXTS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}


def sources() -> list[Path]:
    found = [*ROOT.glob("*.py")]
    for folder in ("d2v_fast", "kernels", "bench"):
        found += (ROOT / folder).rglob("*.py")
    return sorted(found)


def dangers(text: str) -> Iterator[str]:
    """`line: what` for every danger in a source text."""
    tree = ast.parse(text)
    names = dict(imported(tree))
    excused = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = full_name(node.func, names)
            if name in NEEDED:
                argument, value = NEEDED[name]
                given = [keyword.value for keyword in node.keywords if keyword.arg == argument]
                if given and is_constant(given[0], value):
                    excused.add(node.func)
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN and not is_constant(keyword.value, FORBIDDEN[keyword.arg]):
                    yield f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in modules(node):
                if module.partition(".")[0] in MODULES:
                    yield f"{node.lineno}: import of {module}"
        elif isinstance(node, ast.Constant) and node.value in TEXTS:
            yield f"{node.lineno}: {node.value}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            name = full_name(node, names)
            if name in FUNCTIONS:
                yield f"{node.lineno}: {name}"
            elif name in NEEDED and node not in excused:
                yield f"{node.lineno}: {name} without {NEEDED[name][0]}={NEEDED[name][1]}"


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module and node.level == 0 else []


def is_constant(node: ast.AST, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_sources_execute_nothing_that_they_read() -> None:
    for path in sources():
        assert list(dangers(path.read_text(encoding="utf-8"))) == [], path


def test_all_sources_are_walked() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources()}
    assert {
        "setup.py",
        "conftest.py",
        "d2v_fast/training/engine.py",
        "d2v_fast/modalities/vision/decode.py",
        "d2v_fast/ops/ema.py",
    } <= found
    assert {"kernels/ema.py", "bench/report.py"} <= found


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=safe)",
        "import torch\ntorch.load(path, **options)",
        "import torch\nread = torch.load",
        "from torch import load as read\nread(path)",
        "import torch as t\nt.serialization.load(path)",
        "import pickle",
        "from pickle import loads",
        "def f():\n    import cloudpickle.compat",
        "eval(text)",
        "list(map(eval, texts))",
        "exec(text)",
        "__import__(name)",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as f\nf(text)",
        "import yaml\nyaml.load(file, yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "run(command, shell=wanted)",
        "import os\nos.system(command)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import os\nos.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'",
    ],
)
def test_dangers_are_found(text: str) -> None:
    # an import that is never used does nothing, and linters refuse it
    used = f"{text}\nunsafe_load" if "unsafe_load" in text else text
    assert len(list(dangers(used))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "model.eval()\nmodel.compile()",
        "class Config:\n    compile: bool = False\n    eval = 3",
        "import torch, re\ntorch.compile(f)\nre.compile('a')",
        "import json\njson.load(file)\njson.loads(text)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['a', text], check=True, shell=False)",
        "import numpy as np\nnp.load(path)\nnp.load(path, allow_pickle=False)",
        "from . import pickle_free",
    ],
)
def test_what_is_harmless_passes(text: str) -> None:
    assert list(dangers(text)) == []


def test_security_page_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    functions = {}
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / file).read_text())
        functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {""}
    for file, function in named:
        assert function in functions[file], f"{file}::{function}"
