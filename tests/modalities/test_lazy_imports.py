"""Packages that only one kind of file or format needs are imported at its first use."""

from __future__ import annotations

from tests.helpers.common import run_python

CODE = """
import sys
import d2v_fast.data, d2v_fast.modalities.speech.audio, d2v_fast.modalities.text.tasks
print("data:", *{"soundfile", "soxr", "cffi", "tokenizers", "pyarrow", "rich"} & set(sys.modules))
import d2v_fast.interop.huggingface, d2v_fast.interop.fairseq, d2v_fast.training.import_weights
print("formats:", *{"transformers", "fairseq", "tokenizers"} & set(sys.modules))
"""


def test_packages_are_imported_at_their_first_use() -> None:
    assert run_python(CODE).splitlines() == ["data:", "formats:"]
