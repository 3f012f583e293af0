"""Packages that this library uses: the extra that installs each, and `--version`."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path

from d2v_fast import __version__

# import name -> extra of pyproject.toml, for packages outside the extra `train`
_EXTRAS = {
    "pyarrow": "parquet",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnx_ir": "onnx",
    "transformers": "hf",
    "flashlight": "lm",
    "pytest": "bench",
    "pytest_benchmark": "bench",
}


class MissingPackageError(ImportError):
    """A package that a module of this library needs cannot be imported; the message names the extra with it."""


def install_command(module: str) -> str:
    """Return the command that installs a package that this library uses.

    Args:
        module: import name of the package, such as "sklearn".
    """
    if module == "torch":
        return "pip install torch"
    return f"pip install 'd2v_fast[{_EXTRAS.get(module, 'train')}]'"


def import_problem(error: ImportError) -> str:
    """Return a message: which package cannot be imported, why, and which extra installs it."""
    from d2v_fast.command_lines import tool_command

    if isinstance(error, MissingPackageError):
        return str(error)
    name = (error.name or "a package").partition(".")[0]
    problem = f"{name} cannot be imported: {error}."
    if name == "d2v_fast":
        return problem
    return f"{problem} `{install_command(name)}` installs what is needed, and `{tool_command('doctor')}` checks it."


def version_line() -> str:
    """Return the versions of this library, torch and Python, and whether the C++ kernels are built; import nothing."""
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch"
    kernels = "C++ kernels" if Path(__file__).with_name("_C.so").exists() else "no C++ kernels"
    return f"d2v_fast {__version__} ({torch}, {kernels}, Python {platform.python_version()})"


class _ShowVersion(argparse.Action):
    """Look up and print the versions, then exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_line())
        parser.exit()


def add_version_option(parser: argparse.ArgumentParser) -> None:
    """Add `--version` to a parser."""
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
        help="print the versions of this library, torch and Python, and whether the C++ kernels are built",
    )
