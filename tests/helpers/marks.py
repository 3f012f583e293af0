"""Marks of tests that not every machine can run."""

from importlib.util import find_spec

import pytest

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
