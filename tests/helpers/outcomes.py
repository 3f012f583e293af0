"""Append the outcome of each test to a file as it comes, so that a run that is stopped leaves what it found."""

from __future__ import annotations

from pathlib import Path

import pytest

# ends the name of the file with the tracebacks
FAILURES = ".failures"
# of a traceback, so that hundreds of failures make a file of some megabytes
MOST_CHARACTERS = 10_000


class OutcomeLog:
    """A plugin of pytest that writes one line per test: outcome, seconds, name, and the message of a failure.

    Of a test whose setup, call and teardown differ, the worst outcome is the last line. With pytest-xdist, it runs in
    the main process, which receives each report at once.

    Args:
        path: Overwritten. Tracebacks are appended to a file of the same name with `.failures`.
    """

    def __init__(self, path: Path) -> None:
        path.write_text("")
        self._path, self._failures = path, path.with_name(path.name + FAILURES)
        self._failures.write_text("")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self._collected(len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, 0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # a passed setup or teardown says nothing about the test
        if report.when == "call" or not report.passed:
            self._add(report, report.duration)

    def _collected(self, count: int) -> None:
        if count:
            self._write(f"collected\t{count}")

    def _add(self, report: pytest.CollectReport | pytest.TestReport, seconds: float) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr or "")
        first = " ".join(message.split())[:300] if report.failed else ""
        self._write("\t".join([report.outcome, f"{seconds:.2f}", report.nodeid, first]))
        if report.failed:
            with self._failures.open("a") as file:
                file.write(f"==== {report.nodeid}\n{report.longreprtext[-MOST_CHARACTERS:]}\n")

    def _write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line + "\n")
