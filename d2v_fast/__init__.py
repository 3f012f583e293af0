"""Fast pre-training of data2vec, and its fused operations (``d2v_fast.ops``)."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a module of this package; if a package is missing, name the extra that installs it."""
        from importlib import import_module
        from importlib.util import find_spec

        module = f"{__name__}.{name}"
        # the import system asks for names such as __path__
        if name.startswith("_") or find_spec(module) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return import_module(module)
        except ImportError as error:
            from d2v_fast.packages import MissingPackageError, import_problem

            raise MissingPackageError(import_problem(error), name=error.name, path=error.path) from error
