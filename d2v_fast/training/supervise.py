"""Restart training after a fault, from the newest good checkpoint (`--supervise`).

The process becomes one of torch's elastic agents (the part of torchrun that starts and restarts workers), and trains
in a child process. Under a launcher every process does so. The agents meet before each attempt, so that a fault of one
process restarts all of them, with a new store and new addresses. The first attempt starts or resumes a run as the
command line says, and marks the run folder; later attempts find the mark and resume.

There is no restart if the run is finished or was stopped on request (exit status 0), if the configuration is wrong
(exit status 2), or after too many faults without a new checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.command_lines import SUPERVISION, pass_on_command, resume_command
from d2v_fast.config import RunConfig
from d2v_fast.processes.parent import end_with_parent
from d2v_fast.training.run_folder import find_supervised

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
_LONGEST_PAUSE_S = 60
# `_Ended` ends the agent, not its own limit of restarts
_UNLIMITED = 10**9


def supervise(config: RunConfig, arguments: Sequence[str], limit: int) -> int | None:
    """Train in a child process, and restart it after a fault.

    Args:
        config: The checked configuration of `arguments`.
        arguments: The command line, which the child process gets as well.
        limit: Most restarts in a row without a new checkpoint.

    Returns:
        The exit status; None in the child process, which has to train.
    """
    if SUPERVISION in os.environ:
        # if the supervisor dies, this process receives SIGTERM, saves and exits
        end_with_parent()
        return None
    # do not reuse the last attempt's addresses; and let `_Agent.pass_on` handle signals, not torch's agent
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "none"}
    pass_on_command()
    # torch logs a page per fault, and we print one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="d2v_fast-") as logs:
            agent = _Agent(_worker(config, arguments), DefaultLogsSpecs(logs), Path(config.d2v.run.dir), limit)
            before = {number: signal.signal(number, agent.pass_on) for number in _STOP_SIGNALS}
            try:
                agent.run()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
                agent.leave()
    except _Ended as ended:
        return ended.status
    except RendezvousError as error:
        _say(f"this process cannot reach the other processes of the run: {error}")
        return 1
    return 0


class _Ended(Exception):
    """Raised to end supervision without another attempt; the process exits with `status`."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Agent(LocalElasticAgent):
    """An elastic agent with the restart rules of `supervise`."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, root: Path, limit: int) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=30)
        self._root, self._limit = root, limit
        self._mark: str | None = None
        self._newest, self._in_a_row = -1, 0
        self._stopping = False

    def pass_on(self, number: int, frame: object) -> None:
        """Handle a stop signal: forward it to the worker, and allow no further attempt."""
        self._stopping = True
        if self._worker_group.state != WorkerState.HEALTHY or self._pcontext is None:
            raise _Ended(0)
        # a worker handles only SIGINT, SIGUSR1 and SIGTERM; see `StopRequest`
        known = number if number in (signal.SIGINT, signal.SIGUSR1) else signal.SIGTERM
        for pid in self._pcontext.pids().values():
            os.kill(pid, known)

    def leave(self) -> None:
        """Notify agents that wait for another attempt that there is none."""
        self._rdzv_handler.shutdown()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        store = worker_group.store
        assert store is not None
        if self._mark is None:
            # unique, so that a later supervision of a run of the same name does not match
            if worker_group.group_rank == 0:
                store.set("d2v_fast/mark", uuid.uuid4().hex)
            self._mark = store.get("d2v_fast/mark").decode()
        elif worker_group.group_rank == 0:
            store.set("d2v_fast/mark", self._mark)
        os.environ[SUPERVISION] = self._mark
        workers: dict[int, Any] = super()._start_workers(worker_group)
        return workers

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        for rank, failure in result.failures.items():
            status = failure.exitcode
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
            _say(f"rank {rank} (pid {failure.pid}) {how}")
            if self._stopping:
                raise _Ended(status if status > 0 else 128 - status)
            if status == 2:
                _say("no restart, because the configuration is wrong")
                raise _Ended(2)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        # also called if only another process's worker has failed
        self._stop_workers(worker_group)
        worker_group.state = WorkerState.STOPPED
        if worker_group.group_rank == 0:
            self._wait_or_give_up()
        super()._restart_workers(worker_group)

    def _wait_or_give_up(self) -> None:
        folder = find_supervised(self._root, self._mark or "")
        newest = _newest_step(folder, self._newest)
        if newest > self._newest:
            self._newest, self._in_a_row = newest, 0
        where = f"the checkpoint step-{newest}" if newest > 0 else "the beginning"
        if self._in_a_row >= self._limit:
            _say(
                f"giving up after {self._in_a_row} restarts from {where}: none reached a new checkpoint. "
                f"The messages above say why.{_how_to_continue(folder)}"
            )
            raise _Ended(1)
        pause_s = min(2**self._in_a_row, _LONGEST_PAUSE_S)
        self._in_a_row += 1
        _say(f"restart {self._in_a_row} of {self._limit} in {pause_s} s, from {where}")
        time.sleep(pause_s)


def _worker(config: RunConfig, arguments: Sequence[str]) -> WorkerSpec:
    """Return the specification of one training process, and of the rendezvous of all agents."""
    environment = os.environ
    num_agents = int(environment.get("WORLD_SIZE", "1"))
    if num_agents == 1:
        endpoint, is_host, address = "127.0.0.1:0", True, "127.0.0.1"
    else:
        master, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        # torchrun serves a store at this address already
        is_host = environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        endpoint, address = f"{master}:{port}", _own_address(master, port)
    patience_s = int(60 * config.d2v.run.timeout_minutes)
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint=endpoint,
        run_id="d2v_fast",
        min_nodes=num_agents,
        max_nodes=num_agents,
        local_addr=address,
        is_host=str(is_host),
        # others arrive after they have detected a hang, ended their workers, and paused
        join_timeout=str(patience_s + 60 + _LONGEST_PAUSE_S),
    )
    # an agent numbers only its own workers, so that each would get the first GPU
    local = [f"{name}={environment[name]}" for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in environment]
    return WorkerSpec(
        role="d2v_fast",
        local_world_size=1,
        entrypoint="/usr/bin/env",
        args=(*local, sys.executable, str(Path(__file__).parent.with_name("train.py")), *arguments),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=_UNLIMITED,
        local_addr=address,
    )


def _own_address(master: str, port: int) -> str:
    """Return this machine's address on the interface toward `master`. Nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _newest_step(folder: Path | None, known: int) -> int:
    """Return the newest checkpoint's step, 0 if there is none, or `known` if the folder cannot be listed."""
    if folder is None:
        return 0
    try:
        return max(complete_steps(folder / "checkpoints"), default=0)
    except OSError:
        # an unavailable file system does not mean that checkpoints are gone
        return known


def _how_to_continue(folder: Path | None) -> str:
    return "" if folder is None else f" To continue after a fix: {resume_command(folder)}"


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)
