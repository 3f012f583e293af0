"""The processes of a run: rank, device, and agreement between them.

One process needs no process group. Several are connected with torch.distributed, as `torchrun` or the `deepspeed`
launcher describe them in the environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`). Decisions
of the host use their own gloo group, so that they never wait for a GPU.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from d2v_fast.distributed.watch import Watch
from d2v_fast.errors import RunError

# messages of gloo when a peer, or the network to it, is gone
_BROKEN = re.compile(r"gloo/(transport|rendezvous)|[Cc]onnection (closed|reset|refused)|connectFullMesh failed")

# the watch of the run, if it has several processes
_watch: Watch | None = None


class World:
    """This process among all processes of the run.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        grouped: Whether even one process needs a process group, as with DeepSpeed.
        timeout_minutes: Longest wait for the others, at the start and at every later point. Then this process ends
            with an error that names the missing ones.

    Attributes:
        rank: 0 to `size` - 1; only rank 0 prints and writes.
        size: Number of processes.
        device: The device that this process computes on.
    """

    def __init__(self, device: str = "auto", grouped: bool = False, timeout_minutes: float = 10.0) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), world_size()
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise RunError('`d2v.run.device` must be "cpu" or "auto" on a machine without a CUDA device.')
        if device == "cpu" or not has_gpu:
            self.device = torch.device("cpu")
        else:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        self._hosts: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        if self.size > 1 or grouped:
            self._connect(timeout_minutes)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place, on its device."""
        if self.size > 1:
            self.arrive()
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process. The hosts exchange it without waiting for a device."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        self.arrive()
        dist.all_reduce(flags, group=self._hosts)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def arrive(self) -> None:
        """Count that this process has come to a collective, its own or DeepSpeed's, and may have to wait there.

        The more often it is called, the better a timeout can name the late process.
        """
        if self._watch is not None:
            self._watch.arrived()

    def decide(self, make: Callable[[], Any]) -> Any:
        """Run `make` in the first process and return its result, which JSON must be able to express, in all of them.

        An OSError, ValueError or RuntimeError is raised there, and a RunError with the same text elsewhere.
        """
        if self.size == 1:
            return make()
        answer, failure = None, None
        if self.is_first:
            try:
                answer = make()
            except (OSError, ValueError, RuntimeError) as error:
                failure = error
        text = json.dumps({"answer": answer, "error": None if failure is None else str(failure)})
        told = json.loads(self._tell(text.encode()))
        if failure is not None:
            raise failure
        if told["error"] is not None:
            raise RunError(told["error"])
        return told["answer"]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all processes, which JSON must be able to express, in the order of ranks."""
        if self.size == 1:
            return [value]
        self.arrive()
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self._hosts)
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.nn.functional.pad(message, (0, longest - len(message)))
        dist.all_gather(texts, padded, group=self._hosts)
        pairs = zip(texts, lengths, strict=True)
        return [json.loads(text[: int(length)].numpy().tobytes()) for text, length in pairs]

    def close(self) -> None:
        """Destroy the process group; torch warns about one that is left."""
        global _watch
        if self._watch is not None:
            self._watch.close()
            _watch = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self, timeout_minutes: float) -> None:
        if self.size == 1:
            _describe_single_process()
        limit = timedelta(minutes=timeout_minutes)
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        try:
            self._meet(backend, limit)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            missing = None if self._watch is None else self._watch.missing()
            self.close()
            raise ConnectionError(_why_not_connected(error, self.rank, self.size, limit, missing)) from error
        except RuntimeError as error:
            told = lost_connection(error)
            self.close()
            if told is None:
                raise
            raise ConnectionError(told) from error
        except BaseException:
            # the caller has no object to close
            self.close()
            raise

    def _meet(self, backend: str, limit: timedelta) -> None:
        store, serves = _open_store(self.rank, self.size, limit)
        if self.size > 1:
            global _watch
            own = PrefixStore(_attempt(), store)
            _watch = self._watch = Watch(own, self.rank, self.size, limit.total_seconds(), serves=serves)
            if (absent := self._watch.wait_for_all()) is not None:
                raise ConnectionError(_not_met(self.rank, self.size, limit, absent))
        dist.init_process_group(
            backend,
            store=PrefixStore(_attempt(), store),
            rank=self.rank,
            world_size=self.size,
            # longer than the watch waits, which can name the missing process
            timeout=2 * limit,
            device_id=None if backend == "gloo" else self.device,
        )
        self._hosts = dist.new_group(backend="gloo", timeout=2 * limit)

    def _tell(self, message: bytes) -> bytes:
        """Broadcast bytes of the first process; the argument of the others is ignored."""
        self.arrive()
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=self._hosts)
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            payload = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self._hosts)
        return payload.numpy().tobytes()


def world_size() -> int:
    """Return the number of processes that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lost_connection(error: RuntimeError) -> str | None:
    """Return the message for an error that a lost process caused; None for other errors."""
    if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
        return None
    rank, reason = os.environ.get("RANK", "0"), str(error).splitlines()[0]
    missing = None if _watch is None else _watch.missing()
    if missing is None:
        missing = "it has ended or is cut off; its own message, or the launcher's, says why"
    return f"rank {rank} has lost the connection to another process of the run: {missing}. ({reason})"


def _open_store(rank: int, size: int, limit: timedelta) -> tuple[Store, bool]:
    """Return the store through which the processes connect, and whether this one serves it.

    Unlike torch's rendezvous it does not wait for all, so that a waiting process can name the missing ones.
    """
    # torchrun serves a store for its processes
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {"timeout": limit, "wait_for_workers": False, "multi_tenant": True}
    # missing in the stubs
    make: Any = dist.TCPStore  # type: ignore[attr-defined]
    return make(address, port, size, serves, **options), serves


def _attempt() -> str:
    """Return the prefix in the store.

    torchrun keeps its store across restarts, with the addresses of dead processes. On several machines every agent
    counts its own restarts, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
    """
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}" if is_shared and alone else "attempt"


def _not_met(rank: int, size: int, limit: timedelta, why: str) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"rank {rank} could not meet the other {size - 1} at {address} within {limit.total_seconds() / 60:g} minutes: "
        f"{why}. Are all started, and do their machines reach that address? With several network interfaces name the "
        "right one in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
    )


def _why_not_connected(error: Exception, rank: int, size: int, limit: timedelta, missing: str | None) -> str:
    reason = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error):
        return (
            f"the port {os.environ['MASTER_PORT']} is in use, by another run or another program: give the launcher a "
            f"free one (`--master_port`, or `--standalone` with torchrun). ({reason})"
        )
    if missing is None and rank > 0:
        missing = "rank 0, which is to answer there, does not"
    return f"{_not_met(rank, size, limit, missing or 'the store of the run does not answer')} ({reason})"


def _describe_single_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**defaults, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(name, value)
