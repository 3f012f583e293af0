"""Processes that are killed, stopped or hang, and machines with no compiler, odd paths or odd clocks."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_fast.data import loader as loader_module
from d2v_fast.files import faults
from d2v_fast.modalities.vision.digits import DigitsDataset
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, leave_out_reports, run_forked, run_here, start, start_ranks, tiny_file, wait

pytestmark = [pytest.mark.waits, pytest.mark.usefixtures("quick_runs")]

several_tests_in_a_process = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Return the log of the tiny run in one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_reports(patch.setattr)
        assert run_here("--ds_config", tiny_file(folder), "--run", "r") == 0
    return figures(folder, "r")


def at_step(step: int, act: Callable[[], object], rank: str = "0") -> Callable[[], None]:
    """Return a `before` for a forked run that makes one rank act after this step."""

    def arm() -> None:
        passed = []

        def fault_point(point: str) -> None:
            passed.append(point)
            if point == "step" and passed.count(point) == step and os.environ.get("RANK", "0") == rank:
                act()

        faults.fault_point = fault_point

    return arm


def send_myself(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@needs_deepspeed
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_other_at_once(rank: int, tmp_path: Path) -> None:
    output = tmp_path / "output"
    arguments = ["--ds_config", tiny_file(tmp_path), "--run", "r"]
    started = time.monotonic()
    statuses = run_forked(
        *arguments, output=output, num_processes=2, before=at_step(4, send_myself(signal.SIGKILL), str(rank))
    )
    assert time.monotonic() - started < 60
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1
    text = output.read_text()
    assert f"error: rank {1 - rank} has lost the connection to another process of the run" in text
    assert "Traceback" not in text


@needs_deepspeed
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_stopped_rank_is_named(rank: int, tmp_path: Path) -> None:
    output = tmp_path / "output"
    file = tiny_file(tmp_path, d2v__run__timeout_minutes=0.2)
    children = start_ranks(
        ["--ds_config", file, "--run", "r"], output, 2, at_step(4, send_myself(signal.SIGSTOP), str(rank))
    )
    try:
        [status] = wait(children[1 - rank], timeout_s=60)
    finally:
        os.kill(children[rank], signal.SIGCONT)
    text = output.read_text()
    assert status == 1, text
    named = "rank 0 (127.0.0.1:" if rank == 0 else f"rank 1 (pid {children[1]} on "
    assert f"error: rank {1 - rank} got no further for 0.2 minutes: {named}" in text
    assert "does not answer: it is stopped" in text
    # once it goes on, it finds itself alone
    assert wait(children[rank], timeout_s=60) == [1]


@pytest.mark.slow
@needs_deepspeed
def test_rank_that_is_busy_for_too_long_is_named(tmp_path: Path) -> None:
    output = tmp_path / "output"
    file = tiny_file(tmp_path, d2v__run__timeout_minutes=0.2)
    children = start_ranks(["--ds_config", file, "--run", "r"], output, 2, at_step(4, lambda: time.sleep(60), "1"))
    assert wait(*children, timeout_s=60) == [1, 1]
    assert f"rank 1 (pid {children[1]} on" in output.read_text()


TROUBLES = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "A data loader worker died"),
    "hangs": (lambda: time.sleep(600), "A data loader worker returned no batch for 3 s"),
}


@several_tests_in_a_process
@pytest.mark.parametrize("trouble", ["killed", pytest.param("hangs", marks=pytest.mark.slow)])
def test_loader_worker_in_trouble_ends_the_run(trouble: str, tmp_path: Path, undisturbed: list[tuple]) -> None:
    act, message = TROUBLES[trouble]
    output = tmp_path / "output"
    file = tiny_file(tmp_path, d2v__data__num_workers=1, d2v__run__timeout_minutes=0.05)

    def arm() -> None:
        original, calls = DigitsDataset.augmented, []

        def augmented(self, *arguments):
            calls.append(1)
            if len(calls) == 9:
                act()
            return original(self, *arguments)

        DigitsDataset.augmented = augmented  # type: ignore[method-assign]

    started = time.monotonic()
    assert run_forked("--ds_config", file, "--run", "r", output=output, before=arm) == [1]
    assert time.monotonic() - started < 60
    assert f"error: {message}" in output.read_text()
    assert "Traceback" not in output.read_text()
    assert run_forked("--ds_config", file, "--run", "r", "--resume", output=output) == [0]
    assert figures(tmp_path, "r") == undisturbed


@needs_deepspeed
def test_neither_compiler_nor_stale_locks_matter(tmp_path: Path) -> None:
    """DeepSpeed would compile extensions if it found a compiler, and wait forever for the lock of a dead build."""
    output, extensions = tmp_path / "output", tmp_path / "extensions"
    for name in ("deepspeed_shm_comm", "fused_adam", "cpu_adam"):
        (extensions / name).mkdir(parents=True)
        (extensions / name / "lock").touch()

    def take_compilers_away() -> None:
        os.environ.update(PATH=str(tmp_path), CXX="/nowhere/c++", TORCH_EXTENSIONS_DIR=str(extensions))

    file = tiny_file(tmp_path, zero_optimization__stage=1, d2v__schedule={"steps": 2})
    statuses = run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2, before=take_compilers_away)
    assert statuses == [0, 0], output.read_text()
    assert sorted(path.name for path in extensions.rglob("*") if path.is_file()) == ["lock"] * 3


def test_shared_memory_too_small_is_said_at_once(tmp_path: Path, monkeypatch, capsys) -> None:
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
    statvfs = os.statvfs
    monkeypatch.setattr(loader_module.os, "statvfs", lambda path: full if path == "/dev/shm" else statvfs(path))
    started = time.monotonic()
    assert run_here("--ds_config", tiny_file(tmp_path, d2v__data__num_workers=1), "--run", "r") == 1
    assert time.monotonic() - started < 10
    assert "must leave room in /dev/shm" in capsys.readouterr().err


def test_odd_place_odd_clock(tmp_path: Path, undisturbed: list[tuple]) -> None:
    """Train with odd surroundings: a folder with blanks, a newline and letters of three scripts, a deleted working
    directory, another time zone, a clock that jumps by days."""
    folder, gone, output = tmp_path / "a b\nc é 数 🙂", tmp_path / "gone", tmp_path / "output"
    folder.mkdir()

    def make_odd() -> None:
        os.environ["TZ"] = "Pacific/Kiritimati"
        time.tzset()
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        right, calls = time.time, []

        def jumping() -> float:
            calls.append(1)
            return right() + 86_400 * 30 * (-1) ** len(calls)

        time.time = jumping

    def make_odd_and_die() -> None:
        make_odd()
        at_step(7, send_myself(signal.SIGKILL))()

    arguments = ["--ds_config", tiny_file(folder), "--run", "r"]
    assert run_forked(*arguments, output=output, before=make_odd_and_die) == [-signal.SIGKILL], output.read_text()
    assert run_forked(*arguments, "--resume", output=output, before=make_odd) == [0], output.read_text()
    # that of step 6 may still have been written in the background
    assert re.search("resumed after step [36]", output.read_text())
    assert figures(folder, "r") == undisturbed


def test_unnamed_runs_that_start_together_get_folders_of_their_own(tmp_path: Path, undisturbed: list[tuple]) -> None:
    arguments: list[object] = ["--ds_config", tiny_file(tmp_path)]
    children = [start(arguments, tmp_path / f"output-{number}") for number in range(3)]
    assert wait(*children) == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-1", "tiny-2", "tiny-3"]
    for number in range(3):
        assert figures(tmp_path, f"tiny-{number + 1}") == undisturbed


def test_two_processes_cannot_resume_one_run_together(tmp_path: Path, undisturbed: list[tuple]) -> None:
    """One of two processes gets the run and finishes it undisturbed."""
    arguments: list[object] = ["--ds_config", tiny_file(tmp_path), "--run", "r"]
    output = tmp_path / "output"
    assert run_forked(*arguments, output=output, before=at_step(4, send_myself(signal.SIGKILL))) == [-signal.SIGKILL]
    slowly = at_step(1, lambda: time.sleep(2))
    statuses = wait(*(start([*arguments, "--resume"], output, before=slowly) for _ in range(2)))
    assert sorted(statuses) == [0, 1], output.read_text()
    assert "is training in" in output.read_text()
    assert figures(tmp_path, "r") == undisturbed


@pytest.mark.slow
@several_tests_in_a_process
@pytest.mark.parametrize(
    ("modality", "processes", "workers"),
    [
        ("images", 1, 0),
        ("text", 1, 1),
        pytest.param("speech", 2, 0, marks=needs_deepspeed),
    ],
)
def test_a_few_kills(modality: str, processes: int, workers: int, tmp_path: Path) -> None:
    from tests.soak import soak

    report = soak(tmp_path, 5, modality=modality, processes=processes, workers=workers)
    assert not report.problems
    assert report.kills >= 5
    assert (report.samples_lost, report.samples_twice) == (0, 0)


@needs_deepspeed
@several_tests_in_a_process
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, {"steps": 6, "most_stops": 2, "most_processes": 2, "modalities": ["images"]}),
        pytest.param(6, {}, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
    ids=["one", "six"],
)
def test_random_sequences_of_divisions(count: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Stop and kill runs, and resume them with other processes, stages, accumulation and workers each time."""
    from tests.helpers.soak_sequences import soak_sequences

    report = soak_sequences(tmp_path, count, **options)
    assert not report.problems, report.plans
    assert (report.sequences, report.samples_lost, report.samples_twice) == (count, 0, 0)
    assert report.starts > count
