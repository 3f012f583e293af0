"""Signals to a starting run and to every other command: a message, a status, no partial file, no child left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from d2v_fast.commands import console
from d2v_fast.commands.console import main
from d2v_fast.data.cache import made_once
from d2v_fast.processes import signals as stop_request
from d2v_fast.processes.signals import EndOnSignal, Interrupted, StopRequest
from tests.helpers.places import ROOT
from tests.helpers.runs import fork, leave_out_reports, run_here, tiny_file, until, wait
from tests.helpers.text_files import sentences
from tests.helpers.written_runs import CONFIG, write_run

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> None:
    """Restore the default signals, which another test or the caller may have set to be ignored."""
    for number in NUMBERS:
        assert signal.getsignal(number) is not None


def raising(number: signal.Signals) -> Callable[..., None]:
    return lambda *arguments, **options: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_while_data_are_listed(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal during the listing of the data, which may take hours, stops a run at once."""
    monkeypatch.setattr("d2v_fast.training.prepare.read_data", raising(number))
    assert run_here(tiny_file(tmp_path), "--run", "r") == 128 + number
    words = f"interrupted by {number.name} before a step was made; the same command begins again"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_while_a_run_is_built(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while a run is built stops it after its first step, which is saved."""
    real = console.sys.modules["d2v_fast.objectives.build"].build_objective

    def build(*arguments: object) -> object:
        monkeypatch.setattr("d2v_fast.training.prepare.build_objective", real)
        os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr("d2v_fast.training.prepare.build_objective", build)
    assert run_here(tiny_file(tmp_path), "--run", "r") == 0
    assert [path.name for path in (tmp_path / "runs/r/checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("command", ["export", "probe", "check", "tokenize"])
def test_other_commands(
    command: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(console._WORK, command, raising(number))  # type: ignore[arg-type]
    assert main([command, "x"]) == 128 + number
    assert capsys.readouterr().err == f"interrupted by {number.name}; what was half written is removed\n"


def test_while_a_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal after the last step does not stop the export and the end of a run."""
    leave_out_reports(monkeypatch.setattr)
    monkeypatch.setattr("d2v_fast.interop.export.export_student", raising(signal.SIGTERM))
    file = tiny_file(tmp_path, d2v__schedule={"steps": 2, "warmup_steps": 1})
    assert run_here(file, "--run", "r") == 0
    assert (tmp_path / "runs/r/result.json").exists()


def test_in_the_middle_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "r", CONFIG, 1)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("d2v_fast.modalities.vision.huggingface._model_card", raising(signal.SIGTERM))
    for to in (tmp_path / "out", tmp_path / "r" / "export"):
        assert main(["export", str(tmp_path / "r"), "--to", str(to)]) == 128 + signal.SIGTERM
        assert sorted(tmp_path.rglob("*")) == before


def test_in_the_middle_of_tokens(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "tokens").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted), EndOnSignal():
        made_once(str(tmp_path), "name", make)
    assert not list(tmp_path.iterdir())


def test_signals_that_a_library_turns_into_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    """C code may replace the exception of a signal handler during an import."""

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            raise ImportError("numpy failed to import") from None

    with pytest.raises(Interrupted, match="interrupted by SIGTERM"), EndOnSignal():
        work()


def test_signal_that_a_library_swallows(tmp_path: Path) -> None:
    """The next phase notices a swallowed signal; without one, a thread ends the process."""

    def swallow() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)

    def enter_late() -> None:
        swallow()
        with StopRequest():
            raise AssertionError("began all the same")

    with pytest.raises(Interrupted), EndOnSignal():
        enter_late()

    def work() -> int:
        stop_request._PATIENCE_S = 0.2
        with EndOnSignal():
            swallow()
            time.sleep(60)
        return 0

    began = time.monotonic()
    assert wait(fork(work, tmp_path / "output")) == [128 + signal.SIGTERM]
    assert time.monotonic() - began < 30
    assert (tmp_path / "output").read_text() == "interrupted by SIGTERM\n"


@pytest.mark.parametrize("pause_s", [0.0, 1.3])
def test_two_signals(pause_s: float, tmp_path: Path) -> None:
    """A second signal is ignored if it comes at once, and later ends everything, including children."""

    def work() -> int:
        try:
            with EndOnSignal():
                (tmp_path / "ready").touch()
                time.sleep(60)
        except Interrupted as error:
            return error.status
        return 0

    def slow_to_clean_up() -> int:
        try:
            with EndOnSignal():
                child = subprocess.Popen(["sleep", "60"])
                try:
                    (tmp_path / "ready").write_text(str(child.pid))
                    time.sleep(60)
                finally:
                    (tmp_path / "cleaning").touch()
                    time.sleep(60)
        except Interrupted:
            return 7
        return 0

    child = fork(slow_to_clean_up if pause_s else work, tmp_path / "output")
    until((tmp_path / "ready").exists)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    if pause_s:
        until((tmp_path / "cleaning").exists)
    time.sleep(pause_s)
    os.kill(child, signal.SIGINT)
    # of two at once, Python may see either first
    assert wait(child, timeout_s=30)[0] in ([130] if pause_s else [130, 143])
    if pause_s:
        grandchild = int((tmp_path / "ready").read_text())
        until(lambda: not Path(f"/proc/{grandchild}").exists() or is_dead(grandchild))


def is_dead(pid: int) -> bool:
    return ") Z " in Path(f"/proc/{pid}/stat").read_text()


def test_hang_up_under_nohup_is_ignored_and_handlers_are_restored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = [signal.getsignal(number) for number in NUMBERS[:3]]
    try:
        with EndOnSignal(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [signal.getsignal(number) for number in NUMBERS[:3]] == others
    assert signal.set_wakeup_fd(-1) == -1


def test_terminal_that_hangs_up(tmp_path: Path) -> None:
    """After a hang-up, output is dropped so that it does not end the run before it has saved."""

    def work() -> int:
        main_end, own_end = os.openpty()
        os.dup2(own_end, 1)
        os.dup2(own_end, 2)
        os.close(own_end)
        with StopRequest() as stop:
            os.close(main_end)
            os.kill(os.getpid(), signal.SIGHUP)
            print("a line", flush=True)
        (tmp_path / "requested").write_text(str(stop.requested))
        return 0

    assert wait(fork(work, tmp_path / "output")) == [0], (tmp_path / "output").read_text()
    assert (tmp_path / "requested").read_text() == "True"


def test_other_threads_change_nothing() -> None:
    results: list[object] = []

    def work() -> None:
        with EndOnSignal(), StopRequest() as stop:
            results.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]


@pytest.mark.waits
@pytest.mark.parametrize("program", ["train.py", "d2v-fast"])
def test_first_seconds_of_a_process(program: str, tmp_path: Path) -> None:
    """A signal at any moment of the imports gives its status and no traceback, and the next start works."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n\n".join(sentences(200)))
    file = tiny_file(tmp_path)
    if program == "train.py":
        command = [sys.executable, str(ROOT / "d2v_fast" / "train.py"), str(file), "--run", "r", "--dry-run"]
    else:
        code = "import sys; from d2v_fast.__main__ import main; sys.exit(main())"
        words = ["tokenize", str(tmp_path / "text"), "--train", "--vocab-size", "400", "--to", str(tmp_path / "tok")]
        command = [sys.executable, "-c", code, *words]
    for place, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        # after the interpreter's own start, whose signals are Python's
        until(partial(is_up, child))
        time.sleep(0.5 * place)
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
        assert "Traceback" not in told, told
        if child.returncode:
            assert child.returncode == 128 + number, told
            assert f"interrupted by {number.name}" in told
            assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name or path.suffix == ".part"]


def is_up(child: subprocess.Popen[str]) -> bool:
    """Return whether a process has installed signal handlers or has ended."""
    caught = [
        line.split()[1] for line in Path(f"/proc/{child.pid}/status").read_text().splitlines() if "SigCgt" in line
    ]
    return child.poll() is not None or any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in caught)
