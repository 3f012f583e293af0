"""A process that has waited too long for the others names those that are missing."""

from __future__ import annotations

import json
import os
import queue
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from d2v_fast.distributed.watch import Watch
from d2v_fast.distributed.world import World, lost_connection
from tests.helpers.runs import fork, free_port, wait

pytestmark = pytest.mark.waits

LIMIT_S = 1.0


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


class Watched:
    """Watches that put their messages into a queue instead of ending the process."""

    def __init__(self) -> None:
        self.messages: queue.Queue[str] = queue.Queue()
        self._watches: list[Watch] = []

    def add(self, store: dist.Store, rank: int, size: int = 2) -> Watch:
        self._watches.append(Watch(store, rank, size, LIMIT_S, self.messages.put))
        return self._watches[-1]

    def close(self) -> None:
        for watch in self._watches:
            watch.close()


@pytest.fixture
def watched() -> Iterator[Watched]:
    result = Watched()
    yield result
    result.close()


def test_one_that_is_silent_is_named(store: dist.TCPStore, watched: Watched) -> None:
    store.set("watch/1", json.dumps({"pid": 42, "host": "elsewhere", "arrivals": 7, "sign": 3}))
    started = time.monotonic()
    watched.add(store, 0).arrived()
    message = watched.messages.get(timeout=20 * LIMIT_S)
    assert time.monotonic() - started >= LIMIT_S
    assert "rank 0 got no further" in message
    assert "rank 1 (pid 42 on elsewhere) does not answer" in message
    assert "d2v.run.timeout_minutes" in message


def test_one_that_is_behind_is_named(store: dist.TCPStore, watched: Watched) -> None:
    ahead, behind = watched.add(store, 0), watched.add(store, 1)
    for watch in (ahead, behind, ahead):
        watch.arrived()
    # the one that is behind finds the same about itself
    for _ in range(2):
        message = watched.messages.get(timeout=20 * LIMIT_S)
        assert f"rank 1 (pid {os.getpid()} on " in message
        assert "is alive, but does not come to where the others wait" in message


def test_nobody_is_named_where_nobody_can_be(store: dist.TCPStore, watched: Watched) -> None:
    for rank in range(2):
        watched.add(store, rank)
    assert "neither did any other: all are alive" in watched.messages.get(timeout=20 * LIMIT_S)


def test_progress_and_closing_keep_it_quiet(store: dist.TCPStore, watched: Watched) -> None:
    first, second = watched.add(store, 0), watched.add(store, 1)
    second.close()
    for _ in range(30):
        first.arrived()
        time.sleep(LIMIT_S / 10)
    assert watched.messages.empty()


def test_a_store_that_is_gone(watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    def serve() -> int:
        kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        time.sleep(60 + 0 * kept.port)
        return 0

    server = fork(serve, tmp_path / "output")
    try:
        watched.add(dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=30)), 1)
        time.sleep(LIMIT_S / 4)
        # stopped, not ended: the connection stays open, and every question waits
        os.kill(server, signal.SIGSTOP)
        message = watched.messages.get(timeout=20 * LIMIT_S)
        assert f"rank 0 (127.0.0.1:{port}) does not answer" in message
    finally:
        os.kill(server, signal.SIGKILL)
        wait(server)


def test_port_in_use_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    described = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.port)}
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=f"the port {taken.port} is in use.*`--master_port`"):
        World("cpu", timeout_minutes=1)
    assert time.monotonic() - started < 10


def test_missing_process_is_said_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConnectionError, match=r"rank 0 could not meet the other 1 at 127.0.0.1:\d+ within 0.02 minutes"
    ):
        World("cpu", timeout_minutes=0.02)


def test_lost_connection_is_told_from_other_errors() -> None:
    assert lost_connection(RuntimeError("shape mismatch")) is None
    for text in (
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2652",
        "[/src/gloo/transport/tcp/pair.cc:537] Read error [192.0.2.2]:28810: Connection timed out.",
    ):
        told = lost_connection(RuntimeError(text))
        assert told is not None
        assert "has lost the connection to another process of the run" in told
