"""The `d2v-fast` command, called in this process."""

from __future__ import annotations

import pytest

from d2v_fast.commands.console import main
from tests.helpers.runs import failure_status


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object, status: int | None = None) -> str:
    """Run a command that must fail; return its error message after checking its form and exit status."""
    found, captured = main([str(argument) for argument in arguments]), capsys.readouterr()
    assert found == (failure_status(captured.err) if status is None else status)
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err
