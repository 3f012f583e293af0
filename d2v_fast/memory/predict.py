"""Predict the memory per process of a run from its configuration; docs/memory.md derives the formulas.

`formulas.py` lists the parts that stay from step to step, and the phases of a step, each of which needs memory beside
them. The peak is that of the largest phase. Everything follows from shapes, so nothing is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from d2v_fast.config import RunConfig
from d2v_fast.data import Batch
from d2v_fast.memory.formulas import BUILD, PARTS, PHASES, Line, checkpoint
from d2v_fast.memory.sizes import Shapes, Sizes, shapes_of
from d2v_fast.memory.step import StepMemory, step_memory

# upper bounds that were measured: the share of a step's small blocks that malloc retains; bytes for threads and kernels
RETAINED_SHARE, LIBRARIES = 0.6, 40_000_000


class Entry(NamedTuple):
    """Bytes of a part or a phase, on the device and in host memory (offload)."""

    name: str
    device: int
    host: int
    meaning: str


class Prediction(NamedTuple):
    """Memory of the process that needs most. On a CPU all but `save` counts as the device's.

    Attributes:
        parts: what stays from step to step.
        activations: bytes that the forward pass saves for the backward pass, in every micro-step.
        phases: what each phase of a step needs on top of the parts, at most.
        build: device bytes in all while model and engine are built.
        save: host bytes of the copy that a checkpoint is written from with `background_save`.
        overhead: on a CPU, an upper bound of the resident memory besides tensors: freed blocks and libraries.
    """

    parts: tuple[Entry, ...]
    activations: int
    phases: tuple[Entry, ...]
    build: int
    save: int
    overhead: int = 0

    @property
    def device_state(self) -> int:
        """Device bytes that stay from step to step. They do not depend on the batch."""
        return sum(part.device for part in self.parts)

    @property
    def host_state(self) -> int:
        """Host bytes that stay from step to step; 0 on a CPU, where they count as the device's."""
        return sum(part.host for part in self.parts)

    @property
    def device_peak(self) -> int:
        """Device bytes in the largest phase. On a CPU this is everything but the copy of a checkpoint."""
        return max(self.build, self.device_state + max(phase.device for phase in self.phases))

    @property
    def resident_peak(self) -> int:
        """Device bytes in the largest phase; on a CPU with `overhead`."""
        return self.device_peak + self.overhead


def predict(
    config: RunConfig, num_processes: int, dtype: torch.dtype, device_type: str, like: Batch | None = None
) -> Prediction:
    """Predict the memory of a run.

    Args:
        config: the run.
        num_processes: N.
        dtype: of the forward pass, see `engine.compute_dtype`.
        device_type: "cpu" or "cuda".
        like: a micro-batch of the size to assume. `None` assumes the largest that the run can have.
    """
    split = config.deepspeed.batch_split(num_processes)
    by_deepspeed = config.deepspeed.needs_deepspeed(num_processes)
    step = step_memory(
        config.d2v,
        split.micro_batch,
        dtype,
        autocast=not by_deepspeed and dtype != torch.float32,
        device_type=device_type,
        like=like,
        captured=config.reason_not_to_capture(num_processes, device_type) is None,
    )
    return predict_from(config, num_processes, dtype, device_type, shapes_of(config), step)


def predict_from(
    config: RunConfig, num_processes: int, dtype: torch.dtype, device_type: str, shapes: Shapes, step: StepMemory
) -> Prediction:
    """Predict the memory of a run from given sizes of its parameters and of a micro-step; see `predict`."""
    sizes = Sizes.of(config, num_processes, dtype, device_type, shapes, step)
    parts = [_entry(part, sizes) for part in PARTS[sizes.layout]]
    phases = [_entry(phase, sizes) for phase in PHASES[sizes.layout]]
    copies = config.d2v.run.background_save or not sizes.cpu
    return Prediction(
        tuple(part for part in parts if part is not None and (part.device or part.host)),
        step.batch + step.saved,
        tuple(phase for phase in phases if phase is not None),
        BUILD[sizes.layout](sizes),
        checkpoint(sizes) if copies else 0,
        int(RETAINED_SHARE * step.small) + LIBRARIES if sizes.cpu else 0,
    )


def _entry(line: Line, sizes: Sizes) -> Entry | None:
    size = line.size(sizes)
    if size is None:
        return None
    moved = {"optimizer": sizes.offloads_optimizer, "parameters": sizes.offloads_parameters}
    on_host = line.home in ("host", "both") or moved.get(line.home, False)
    on_device = line.home == "both" or not on_host
    device, host = size * on_device, size * on_host
    return (
        Entry(line.name, device + host, 0, line.meaning) if sizes.cpu else Entry(line.name, device, host, line.meaning)
    )
