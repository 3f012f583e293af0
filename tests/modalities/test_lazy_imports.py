"""Packages that only one kind of file needs are imported when such a file is read."""

from __future__ import annotations

from tests.helpers.common import run_python


def test_packages_are_imported_when_a_file_is_read() -> None:
    code = """
import sys
import d2v_fast.data, d2v_fast.modalities.speech.audio, d2v_fast.modalities.text.tasks
print(*{"soundfile", "soxr", "cffi", "tokenizers", "pyarrow", "rich"} & set(sys.modules))
"""
    assert run_python(code).split() == []
