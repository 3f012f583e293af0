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
    """Measure peak memory from construction on. Construct it after the imports and before the model.

    On CUDA the peak counts bytes of tensors (`torch.cuda.max_memory_allocated`) without the allocator's reserve. On a
    CPU it is the growth of the process's resident memory without mapped files, such as the code of libraries: tensors,
    and freed blocks that `malloc` retains.

    Args:
        device: the device of the process.
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
        """Return the peak so far, without waiting for the device."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        self._peak = max(self._peak, _resident(high_water=True) - self._before)
        # the size of mapped files changes, so the mark they are subtracted from must be recent
        _restart_high_water_mark()
        return self._peak


def available_memory() -> int | None:
    """Return the bytes of host memory that are available, or None if the system does not report them."""
    if not _MEMORY.exists():
        return None
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def format_bytes(size: float) -> str:
    """Format bytes with three digits and a decimal unit: 1.38 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _resident(high_water: bool = False) -> int:
    """Return the resident bytes of this process without mapped files: now, or the most since the mark was reset."""
    if not _STATUS.exists():
        # kilobytes, on macOS bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kilobytes = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS", "RssFile"):
            kilobytes[name] = int(value.split()[0])
    return 1024 * (kilobytes["VmHWM" if high_water else "VmRSS"] - kilobytes["RssFile"])


def _restart_high_water_mark() -> None:
    # without the permission, the mark covers the whole life of the process
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
