"""Full names of the functions that a source file imports and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator

# to name one of these is enough: it may be called under another name, or by somebody else
FUNCTIONS = {
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
    "numpy.lib.format.read_array",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.utils.model_zoo.load_url",
    "torch.serialization.add_safe_globals",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "yaml.add_constructor",
    *(f"yaml.{kind}" for kind in ("Loader", "UnsafeLoader", "FullLoader", "unsafe_load", "full_load")),
    *(f"yaml.{kind}" for kind in ("load", "load_all", "unsafe_load_all", "full_load_all")),
}


BUILTINS = {name.removeprefix("builtins.") for name in FUNCTIONS if name.startswith("builtins.")}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that imports bind anywhere in the file, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`torch.load` for `torch.load`, `load` and `t.load`, whatever it was imported as; empty for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id, f"builtins.{node.id}" if node.id in BUILTINS else "")
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""
