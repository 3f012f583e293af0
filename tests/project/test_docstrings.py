"""The examples in the docstrings of public functions run, and every such function has one."""

from __future__ import annotations

import doctest
import inspect
from types import ModuleType

import numpy as np
import pytest
import torch

from d2v_fast import masking, ops, teacher
from d2v_fast.config import TeacherConfig

# algorithms in plain Python that tests compare with, result types without behavior, and numba's decorator
WITHOUT_EXAMPLE = {"SeveralMasks", "TokenMasks", "compiled"}
PUBLIC = [
    (module, name)
    for module in (ops, masking, teacher)
    for name in module.__all__
    if callable(getattr(module, name)) and not name.endswith("_reference") and name not in WITHOUT_EXAMPLE
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_example(module: ModuleType, name: str) -> None:
    shown = {"torch": torch, "np": np, "TeacherConfig": TeacherConfig}
    public = {other: getattr(module, other) for other in module.__all__}
    text = inspect.getdoc(getattr(module, name))
    assert text is not None
    example = doctest.DocTestParser().get_doctest(text, shown | public, name, None, None)
    assert example.examples, f"{name} has no example"
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(example)
    assert result.attempted > 0
    assert result.failed == 0, f"run `python -m doctest` on the example of {name}"
