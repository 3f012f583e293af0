"""`--supervise`: training starts again after a fault, from the newest good checkpoint.

The process that was started becomes an elastic agent of torch (the part of torchrun that starts and restarts), and
trains in a child process. Under a launcher each of its processes does so, and the agents meet again, wherever they
are, before all of them start the next attempt: a fault of one process restarts them all, with a store and addresses
of their own. The first attempt begins or resumes as the command line says and marks the run folder; later ones find
that mark and resume.

Not started again: a run that is finished or was stopped on request (both end with 0), a wrong configuration (2), and
one that fails again and again without a new checkpoint in between.
"""

from __future__ import annotations

import ctypes
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
from d2v_fast.training.run_folder import find_supervised

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
_LONGEST_PAUSE_S = 60
# the agent ends when we say so, by `_Ended`
_UNLIMITED = 10**9
_PR_SET_PDEATHSIG = 1


def supervise(config: RunConfig, arguments: Sequence[str], limit: int) -> int | None:
    """Train in a child process, and again after a fault.

    Args:
        config: what `arguments` ask for, checked.
        arguments: of the command line; the child process gets the same.
        limit: restarts in a row without a new checkpoint.

    Returns:
        The exit status; None in the child process, which is to train.
    """
    if SUPERVISION in os.environ:
        # without its supervisor, however that ended, it saves and ends as on any SIGTERM
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
        return None
    # no addresses of the attempt before; and no handlers of the agent: a signal is passed on, see `_Agent.pass_on`
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "none"}
    pass_on_command()
    # it reports every fault in a screenful; ours are said in a line
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
        _say(f"this process does not meet the others of the run any more, or not yet: {error}")
        return 1
    return 0


class _Ended(Exception):
    """No further attempt; the process ends with `status`."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Agent(LocalElasticAgent):
    """Restarts its worker as `supervise` promises."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, root: Path, limit: int) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=30)
        self._root, self._limit = root, limit
        self._mark: str | None = None
        self._newest, self._in_a_row = -1, 0
        self._stopping = False

    def pass_on(self, number: int, frame: object) -> None:
        """Signal handler: the worker decides what a request to stop means; there is no attempt after it."""
        self._stopping = True
        if self._worker_group.state != WorkerState.HEALTHY or self._pcontext is None:
            raise _Ended(0)
        # a worker knows these three, see `StopRequest`
        known = number if number in (signal.SIGINT, signal.SIGUSR1) else signal.SIGTERM
        for pid in self._pcontext.pids().values():
            os.kill(pid, known)

    def leave(self) -> None:
        """Tell the agents that wait for another attempt that there is none."""
        self._rdzv_handler.shutdown()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        store = worker_group.store
        assert store is not None
        if self._mark is None:
            # unique, so that a later supervision of a run of the same name is another one
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
                _say("a wrong configuration stays wrong: there is no restart")
                raise _Ended(2)
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        # also called, in a process whose worker is well, because that of another process is not
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
                f"giving up after {self._in_a_row} restarts from {where}: none came to a new checkpoint. "
                f"The messages above say why.{_how_to_continue(folder)}"
            )
            raise _Ended(1)
        pause_s = min(2**self._in_a_row, _LONGEST_PAUSE_S)
        self._in_a_row += 1
        _say(f"restart {self._in_a_row} of {self._limit} in {pause_s} s, from {where}")
        time.sleep(pause_s)


def _worker(config: RunConfig, arguments: Sequence[str]) -> WorkerSpec:
    """One process that trains, and where the agents of all of them meet."""
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
        # the others come when they have found out that their workers hang, have ended them, and have paused
        join_timeout=str(patience_s + 60 + _LONGEST_PAUSE_S),
    )
    # an agent counts its own workers only, so it would give each of them the first GPU
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
    """The address of this machine that the others see: that of the interface toward `master`. Sends nothing."""
    family, kind, protocol, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _newest_step(folder: Path | None, known: int) -> int:
    """Step of the newest checkpoint; `known` where the folder cannot be listed, 0 where there is none."""
    if folder is None:
        return 0
    try:
        return max(complete_steps(folder / "checkpoints"), default=0)
    except OSError:
        # a file system that does not answer says nothing about checkpoints
        return known


def _how_to_continue(folder: Path | None) -> str:
    return "" if folder is None else f" To continue when that is mended: {resume_command(folder)}"


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)
