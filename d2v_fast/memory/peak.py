"""The most memory that a process has used since its model was built."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMORY = Path("/proc/meminfo")


class PeakMemory:
    """Measures from the moment when it is made: make it after the imports and before the model.

    On CUDA these are bytes of tensors (`torch.cuda.max_memory_allocated`), without what the allocator holds in reserve.
    On a CPU it is how much the resident memory of the process has grown, without mapped files, that is without the code
    of libraries: tensors, and what `malloc` keeps of freed ones.

    Args:
        device: where the process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _restart_high_water_mark()
            self._before = _resident()

    def bytes(self) -> int:
        """The peak so far. Waits for nothing."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        self._peak = max(self._peak, _resident(high_water=True) - self._before)
        # mapped files come and go: subtracted from a mark that is not much older
        _restart_high_water_mark()
        return self._peak


def available_memory() -> int | None:
    """Return the bytes of host memory that a process can still get; None where the system does not say."""
    if not _MEMORY.exists():
        return None
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def format_bytes(size: float) -> str:
    """Three digits and a decimal unit: 1.38 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _resident(high_water: bool = False) -> int:
    """Resident bytes of this process without mapped files, now or at most since the mark was restarted."""
    if not _STATUS.exists():
        # in kilobytes, on macOS in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kilobytes = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssFile"):
            kilobytes[name] = int(value.split()[0])
    return 1024 * (kilobytes["VmHWM" if high_water else "VmRSS"] - kilobytes["RssFile"])


def _restart_high_water_mark() -> None:
    # where that is not allowed, the mark is of the whole process
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
