"""The processes of a run: which one this is, where it computes, and how they agree.

One process needs no process group. Several are connected with torch.distributed as `torchrun` or the
`deepspeed` launcher describe them in the environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
`MASTER_PORT`). Decisions of the host travel over a gloo group of their own, so that no one waits for a GPU.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RunError(RuntimeError):
    """A run cannot start or go on, for a reason that its user can do something about."""


class World:
    """This process among all processes of the run.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        grouped: whether a process group is needed even for one process, as DeepSpeed does.

    Attributes:
        rank: 0 to `size` - 1; only rank 0 prints and writes.
        size: number of processes.
        device: where this process computes.
    """

    def __init__(self, device: str = "auto", grouped: bool = False) -> None:
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
        if self.size > 1 or grouped:
            self._connect()

    @property
    def is_first(self) -> bool:
        """True in the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, on its device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True in every process where it is true in one. Between hosts: no device is waited for."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, group=self._hosts)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait for the other processes."""
        self.any(False)

    def decide(self, make: Callable[[], Any]) -> Any:
        """Run `make` in the first process and hand its result, which JSON can express, to all of them.

        An OSError, ValueError or RuntimeError is raised in every process: the same there, as RunError elsewhere.
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
        """What every process passes, which JSON can express, in the order of their ranks; in every process."""
        if self.size == 1:
            return [value]
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
        """Take the process group down; torch warns about one that is left."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _connect(self) -> None:
        if self.size == 1:
            _describe_single_process()
        # the variable, in minutes, is DeepSpeed's; a rank that is stuck costs the others this long
        timeout = timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "10")))
        backend = "gloo" if self.device.type == "cpu" else "nccl"
        dist.init_process_group(backend, timeout=timeout, device_id=None if backend == "gloo" else self.device)
        self._hosts = dist.new_group(backend="gloo", timeout=timeout)

    def _tell(self, message: bytes) -> bytes:
        """Broadcast bytes of the first process; what the others pass is ignored."""
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=self._hosts)
        payload = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_first:
            payload = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self._hosts)
        return payload.numpy().tobytes()


def world_size() -> int:
    """Number of processes that the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _describe_single_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**defaults, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(name, value)
