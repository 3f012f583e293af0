"""Reports of missing processes through the store of a run."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from d2v_fast.distributed.peers import Missing, Peers
from tests.helpers.runs import free_port


def test_the_store_stays_until_a_slow_process_has_read_the_report() -> None:
    """A process that lost its connection reads late: the first one, which serves the store, must not end before."""
    store = _store()
    server, other = Peers(store, 0, 2, 2.0, serves=True), Peers(store, 1, 2, 2.0, serves=False)
    for peer in (server, other):
        peer.say(0, 0)
    server.hear()
    store.set("left/1", "")
    found, heard = Missing([7], "rank 7 has ended"), []

    def read_late() -> None:
        time.sleep(0.5)
        heard.append(other.find_missing())

    reader = threading.Thread(target=read_late)
    reader.start()
    assert server.report(found) == found
    assert store.check(["heard/1"])
    reader.join()
    assert heard == [found]


def test_a_second_report_is_the_first_one_and_counts_as_read() -> None:
    store = _store()
    first, second = Peers(store, 1, 3, 2.0, serves=False), Peers(store, 2, 3, 2.0, serves=False)
    found = Missing([0], "rank 0 has ended")
    assert first.report(found) == found
    assert second.report(Missing([1], "rank 1 has ended")) == found
    assert store.check(["heard/1", "heard/2"])


def _store() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", free_port(), is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False
    )
