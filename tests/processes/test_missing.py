"""When one of several processes ends or stops, all others name it, wherever they notice."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from d2v_fast.distributed.world import World, lost_connection
from d2v_fast.files import faults
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import fork, free_port, leave_out_reports, start_ranks, tiny_file, wait

pytestmark = pytest.mark.waits


# seconds
TIMEOUT = 4.0


class Ranks:
    """Forked processes that form a world and meet again and again.

    Args:
        act: called with the rank and the number of a collective before each one.
        begin: called with the rank before the first collective.
    """

    def __init__(
        self,
        count: int,
        folder: Path,
        act: Callable[[int, int], None],
        begin: Callable[[int], None] = lambda rank: None,
    ) -> None:
        described = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._folder = folder

        def work(rank: int) -> int:
            os.environ.update({**described, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            torch.set_num_threads(1)
            begin(rank)
            world = None
            try:
                world = World("cpu", timeout_minutes=TIMEOUT / 60)
                for meeting in range(60):
                    act(rank, meeting)
                    # the kinds of meetings of a run: of the host, of what is trained, of a decision, of values
                    if meeting % 4 == 0:
                        world.any(False)
                    elif meeting % 4 == 1:
                        world.sum(torch.ones(1000))
                    elif meeting % 4 == 2:
                        world.decide(lambda: 1)
                    else:
                        world.collect(rank)
            except ConnectionError as error:
                print(f"error: {error}")
                return 1
            except RuntimeError as error:
                print(f"error: {lost_connection(error)}")
                return 1
            finally:
                if world is not None:
                    world.close()
            return 0

        self.pids = [fork(lambda rank=rank: work(rank), folder / f"{rank}.out") for rank in range(count)]

    def messages(self, missing: int, timeout_s: float = 60) -> dict[int, str]:
        """Return the output of the other ranks after checking that each has ended with status 1."""
        others = [rank for rank in range(len(self.pids)) if rank != missing]
        statuses = wait(*(self.pids[rank] for rank in others), timeout_s=timeout_s)
        texts = {rank: (self._folder / f"{rank}.out").read_text() for rank in others}
        assert statuses == [1] * len(others), texts
        return texts


def at(rank: int, meeting: int, act: Callable[[], object]) -> Callable[[int, int], None]:
    def maybe(own: int, number: int) -> None:
        if (own, number) == (rank, meeting):
            act()

    return maybe


def send_myself(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def named(text: str, own: int) -> set[int]:
    """Return the ranks that a message reports as missing."""
    (line,) = re.findall("^error: .*$", text, re.MULTILINE)
    assert line.startswith(f"error: rank {own} ")
    return {int(rank) for rank in re.findall(r"rank (\d+)", line.removeprefix(f"error: rank {own} "))}


# at the first meeting of every kind, and later
@pytest.mark.parametrize(("rank", "meeting"), [(0, 8), (1, 5), (2, 6), (2, 7), (1, 0)])
def test_killed_rank_of_three_is_named(rank: int, meeting: int, tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path, at(rank, meeting, send_myself(signal.SIGKILL)))
    started = time.monotonic()
    for own, text in ranks.messages(rank).items():
        assert named(text, own) == {rank}, text
        assert f"rank {rank} (pid {ranks.pids[rank]} on " in text
        assert "has ended" in text
    assert time.monotonic() - started < 30
    assert wait(ranks.pids[rank]) == [-signal.SIGKILL]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_stopped_rank_of_three_is_named(rank: int, tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path, at(rank, 6, send_myself(signal.SIGSTOP)))
    try:
        for own, text in ranks.messages(rank).items():
            assert named(text, own) == {rank}, text
            assert "does not answer" in text
    finally:
        os.kill(ranks.pids[rank], signal.SIGCONT)
    # it finds itself alone, and says why
    assert wait(ranks.pids[rank], timeout_s=60) == [1]
    assert "this process was stopped for about" in (tmp_path / f"{rank}.out").read_text()


def test_killed_rank_of_four_is_named_by_one_that_was_busy(tmp_path: Path) -> None:
    """A busy rank reaches the next collective long after the others have ended."""

    def act(rank: int, meeting: int) -> None:
        if meeting == 6 and rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if meeting == 6 and rank == 1:
            time.sleep(3)

    ranks = Ranks(4, tmp_path, act)
    for own, text in ranks.messages(3).items():
        assert named(text, own) == {3}, text


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_rank_that_never_comes_is_named(rank: int, tmp_path: Path) -> None:
    def begin(own: int) -> None:
        if own == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(3, tmp_path, lambda own, meeting: None, begin)
    for own, text in ranks.messages(rank).items():
        assert named(text, own) == {rank}, text
        assert "could not meet the other 2" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_between_store_and_group_is_named(rank: int, tmp_path: Path) -> None:
    def begin(own: int) -> None:
        if own == rank:
            dist.init_process_group = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)

    ranks = Ranks(3, tmp_path, lambda own, meeting: None, begin)
    for own, text in ranks.messages(rank).items():
        assert named(text, own) == {rank}, text


def test_all_stopped_together_go_on(tmp_path: Path) -> None:
    """All processes may be stopped for longer than the timeout, as by Ctrl-Z or on a machine that sleeps."""
    ranks = Ranks(3, tmp_path, lambda rank, meeting: time.sleep(0.05))
    time.sleep(1.0)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(TIMEOUT + 1)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGCONT)
    assert wait(*ranks.pids, timeout_s=60) == [0, 0, 0]


def test_id_that_belongs_to_another_process_is_no_sign_of_life() -> None:
    from d2v_fast.distributed import peers

    about = {"pid": os.getpid(), "start": 1, "place": peers._place()}
    assert peers._is_dead(about)
    assert not peers._is_dead({**about, "place": "elsewhere/1"})


@needs_deepspeed
@pytest.mark.parametrize(
    ("rank", "point", "count"),
    [
        (2, "step", 4),
        pytest.param(0, "step", 4, marks=pytest.mark.slow),
        pytest.param(1, "save.copy", 1, marks=pytest.mark.slow),
        pytest.param(2, "save.tensors", 1, marks=pytest.mark.slow),
        pytest.param(0, "save.rename", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_rank_of_a_run_is_named(rank: int, point: str, count: int, tmp_path: Path, monkeypatch) -> None:
    leave_out_reports(monkeypatch.setattr)

    def arm() -> None:
        passed: list[str] = []

        def fault_point(name: str) -> None:
            passed.append(name)
            if name == point and passed.count(point) == count and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), signal.SIGKILL)

        from d2v_fast.checkpoints import store

        faults.fault_point = store.fault_point = fault_point

    file = tiny_file(tmp_path, d2v__run__timeout_minutes=0.5)
    output = tmp_path / "output"
    pids = start_ranks(["--ds_config", file, "--run", "r"], output, 3, arm)
    statuses = wait(*pids)
    text = output.read_text()
    assert statuses == [-signal.SIGKILL if own == rank else 1 for own in range(3)], text
    lines = re.findall("^error: .*$", text, re.MULTILINE)
    assert len(lines) == 2, text
    for line in lines:
        assert f"lost the connection to another process of the run: rank {rank} (pid {pids[rank]} on " in line
        assert {int(one) for one in re.findall(r"rank (\d+) \(pid", line)} == {rank}
        assert "--resume" in line
    assert "Traceback" not in text
