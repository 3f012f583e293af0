"""The program behind `make gpu`: limits, order, what is kept when it is stopped, and its exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_runs
from bench.bench_step import CASES
from tests.helpers.places import ROOT

OUTCOMES = (
    "collected\t4\nfailed\t0.10\ttests/a.py::x\tassert 1 == 2\npassed\t0.10\ttests/a.py::y\t\nskipped\t0.1\tz\t\nhalf"
)


def part(name: str, code: str, *needs: str) -> gpu.Part:
    return gpu.Part(name, 1, ["-c", code], needs)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs given parts, and returns the exit status and the summary."""
    monkeypatch.setattr(gpu, "DESCRIBE", "print('the machine')")
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu, "BUILT", tmp_path / "build" / "built.json")

    def run(*todo: gpu.Part, seconds: float = 100) -> tuple[int, str]:
        monkeypatch.setattr(gpu, "parts", lambda out, device, scratch: list(todo))
        return gpu.run_all(tmp_path, "cpu", seconds, []), (tmp_path / "summary.txt").read_text()

    return run


def test_all_is_well(run) -> None:
    status, summary = run(part("build", "print('built')"), part("extra", "", "no_such_package"))
    assert status == 0
    assert "the machine" in summary
    assert "not installed: no_such_package" in summary
    assert "skipped" in summary


def test_packages_without_which_tests_are_left_out_are_named(run, tmp_path: Path, monkeypatch) -> None:
    real = gpu.find_spec
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in ("hypothesis", "pydantic") else real(name))
    (tests,) = (one for one in gpu.parts(tmp_path, "cuda", tmp_path) if one.name == "tests")
    lacking = "not installed: pydantic, hypothesis; the tests that need them are left out"
    assert tests.note == lacking
    for code, word in (("", "ok"), ("exit(1)", "FAILED")):
        _, summary = run(tests._replace(command=["-c", code], needs=()))
        (line,) = (line for line in summary.splitlines() if lacking in line)
        assert line.startswith(f"tests      {word}")


def test_failed_benchmarks_are_named(run) -> None:
    status, summary = run(
        part("kernels", "print('FAILED bench/a.py::b[c d] - assert 1 - 2\\nFAILED is not\\n'); exit(1)")
    )
    assert status == 1
    assert "see log.txt\n           bench/a.py::b[c d]\n" in summary


def test_all_ends_in_time(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that does not describe itself, a part that does not end, and tables that take long."""
    (tmp_path / "figures").write_text("")
    sleep = "import time; time.sleep(99)"
    monkeypatch.setattr(gpu, "DESCRIBE", sleep)
    make = f"open({str(tmp_path / 'figures.jsonl')!r}, 'w')"
    started, real = time.monotonic(), subprocess.run

    def slow(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return real([sys.executable, "-c", sleep] if "bench/report.py" in command else command, **options)

    monkeypatch.setattr(subprocess, "run", slow)
    status, summary = run(part("quick", make), part("slow", sleep), seconds=8)
    # the last step has five seconds at least
    assert time.monotonic() - started < 8 + 5
    assert status == 3
    assert "torch did not describe the machine" in summary
    assert [line.split()[:2] for line in summary.splitlines() if "cut short" in line] == [
        ["slow", "cut"],
        ["report", "cut"],
    ]
    assert (tmp_path / "report.tar").exists()


def test_failed_tests_come_first_and_a_later_part_still_runs(run, tmp_path: Path) -> None:
    write = f"open({str(tmp_path / 'outcomes.log')!r}, 'w').write({OUTCOMES!r}); exit(1)"
    status, summary = run(
        part("tests", write), part("runs", f"open({str(tmp_path / 'runs.txt')!r}, 'w').write('ok x')")
    )
    assert status == 1
    first, second, *rest = summary.splitlines()
    assert first == "1 tests FAILED, 1 passed, 1 skipped, 1 not reached"
    assert second == "  FAILED tests/a.py::x: assert 1 == 2"
    assert "ok x" in rest


@pytest.mark.waits
def test_part_is_cut_short_with_its_children_and_leaves_time_to_the_next(run, tmp_path: Path) -> None:
    child = f"import time; open({str(tmp_path / 'child')!r}, 'w').write(str(__import__('os').getpid())); time.sleep(99)"
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    status, summary = run(part("slow", stubborn), part("quick", ""), seconds=6)
    assert status == 3
    assert "slow       cut short" in summary
    assert "quick      ok" in summary
    assert "started" in (tmp_path / "log.txt").read_text()
    pid = int((tmp_path / "child").read_text())
    # a zombie, if this container's first process does not wait for it
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_signal_keeps_what_was_found(tmp_path: Path) -> None:
    program = (
        "import sys; from bench import gpu; "
        "gpu.DESCRIBE = 'pass'; gpu.parts = lambda *a: [gpu.Part('a', 1, ['-c', '']), "
        "gpu.Part('b', 1, ['-c', 'import time; print(1, flush=True); time.sleep(99)']), gpu.Part('c', 1, ['-c', ''])]; "
        f"sys.argv = ['gpu', '--device', 'cpu', '--out', {str(tmp_path)!r}]; sys.exit(gpu.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
    summary = tmp_path / "summary.txt"
    while not summary.exists() or "b          running" not in summary.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    lines = summary.read_text().splitlines()
    states = [next(line for line in lines if line.startswith(f"{name}  ")) for name in "abc"]
    assert ["ok" in states[0], "stopped by a signal" in states[1], "not reached" in states[2]] == [True] * 3


def test_parts_name_files_that_exist_and_options_of_the_programs(tmp_path: Path) -> None:
    for one in gpu.parts(tmp_path, "cpu", tmp_path):
        for word in one.command:
            path, _, test = word.partition("::")
            if path.endswith(".py"):
                assert (ROOT / path).exists(), word
            assert not test or test.removeprefix("bench_step[").removesuffix("]") in CASES, word


@pytest.mark.parametrize(("loss", "resumes_at", "word"), [(0.25, 10, "ok"), (0.26, 10, "FAILED"), (0.25, 0, "FAILED")])
def test_a_resumed_run_must_go_on_and_equal_the_whole_one(
    loss: float, resumes_at: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that differs in one figure, or that starts over, is a failure; one that only took another time is none."""
    runs = gpu_runs.Runs("cpu", tmp_path / "runs.txt", tmp_path)
    whole = [{"step": 14, "loss": 0.25, "seconds": 1.0, "samples_per_s": 9.0}]
    printed = f"print('resumed after step {resumes_at}')"
    real, codes = subprocess.Popen, iter(["import time; time.sleep(99)", printed])
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", next(codes)], **options)
    )
    monkeypatch.setattr(runs, "log", lambda name: [{**whole[0], "loss": loss, "seconds": 2.0}])
    runs._kill_and_resume(runs.start("killed"), whole)
    assert (tmp_path / "runs.txt").read_text().startswith(word)
    assert runs.failed == (word == "FAILED")


def test_a_run_that_fails_is_reported_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = gpu_runs.Runs("cpu", tmp_path / "runs.txt", tmp_path)
    real, code = subprocess.Popen, "print('error: no such key'); print('last line'); exit(2)"
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options))
    runs.check()
    assert (tmp_path / "runs.txt").read_text().splitlines()[1] == ("FAILED   train: exit status 2: error: no such key")


def test_the_library_is_built_again_whatever_the_times_of_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, sources = tmp_path / "d2v_fast" / "_C.so", tmp_path / "csrc"
    for folder in (library.parent, sources):
        folder.mkdir()
    for path in (library, sources / "a.cpp", tmp_path / "CMakeLists.txt", tmp_path / "setup.py"):
        path.write_text("1")
    built = tmp_path / "build" / "built.json"
    for name, value in (("ROOT", tmp_path), ("LIBRARY", library), ("BUILT", built)):
        monkeypatch.setattr(gpu, name, value)
    # built elsewhere
    assert gpu.must_build()
    gpu.remember_build()
    assert not gpu.must_build()
    # copied later, and unchanged
    os.utime(sources / "a.cpp")
    assert not gpu.must_build()
    # changed, and older than the library
    (sources / "a.cpp").write_text("2")
    os.utime(sources / "a.cpp", (0, 0))
    assert gpu.must_build()
    (sources / "a.cpp").write_text("1")
    # of another machine
    library.write_text("2")
    assert gpu.must_build()
    library.unlink()
    assert gpu.must_build()


def test_what_is_printed_names_all_failed_tests_in_few_characters(tmp_path: Path) -> None:
    lines = [f"failed\t1\ttests/ops/test_{n % 40}.py::test_a[{n}-bfloat16]\t{'why ' * 60}" for n in range(120)]
    (tmp_path / "outcomes.log").write_text("\n".join(["collected\t793", *lines, ""]))
    summary = gpu.Summary(tmp_path, ["tests"])
    summary.figures = "figures"
    text = summary.short(gpu.MAX_PRINTED)
    assert len(text) <= gpu.MAX_PRINTED
    assert text.startswith("120 tests FAILED, 0 passed, 0 skipped, 673 not reached\n")
    for n in range(40):
        cases = " ".join(f"[{n + i}-bfloat16]" for i in (0, 40, 80))
        assert f"FAILED tests/ops/test_{n}.py::test_a {cases}: why why" in text
    assert text.endswith("figures")
    text = summary.short(1000)
    assert len(text) == 1000
    assert text.endswith("summary.txt has all\n")
