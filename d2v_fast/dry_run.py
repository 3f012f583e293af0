"""What a run would be: parameters, memory and length, without a step of it."""

from __future__ import annotations

import torch
from torch import nn

from d2v_fast.config import BatchSplit, RunConfig
from d2v_fast.data2vec import build_model
from d2v_fast.schedules import LearningRate


def describe(config: RunConfig, split: BatchSplit, schedule: LearningRate, num_samples: int, dtype: torch.dtype) -> str:
    """The lines that `--dry-run` prints.

    Args:
        num_samples: images in the data set.
        dtype: of the forward pass.
    """
    with torch.device("meta"):
        model = build_model(config.d2v)
    student, head = _count(model.student), _count(model.head)
    steps_per_epoch = num_samples // split.global_batch
    lines = [
        f"parameters      student {student:,}, head {head:,}, teacher {student:,}",
        *_memory(config, split, student, head, dtype),
        f"data            {num_samples:,} images",
        f"global batch    {split.global_batch:,} = {split.micro_batch} per micro-step x {split.accumulation} "
        f"micro-steps x {split.world_size} processes",
        f"length          {schedule.num_steps:,} optimizer steps, {steps_per_epoch:,} per epoch, "
        f"{schedule.num_steps / steps_per_epoch:.1f} epochs",
        f"learning rate   {schedule.peak:g} after {schedule.warmup_steps:,} steps of warm-up, then "
        f"{config.d2v.schedule.kind} to {schedule.at(schedule.num_steps - 1):.3g}",
    ]
    return "\n".join(lines)


def _memory(config: RunConfig, split: BatchSplit, student: int, head: int, dtype: torch.dtype) -> list[str]:
    """Bytes per process of everything whose size does not depend on the batch."""
    trained = student + head
    stage = config.deepspeed.zero_optimization.stage
    by_deepspeed = config.deepspeed.needs_deepspeed(split.world_size)
    shards = split.world_size
    # plain torch computes in bf16 under autocast and stores fp32; DeepSpeed stores both
    low = 2 if by_deepspeed and dtype != torch.float32 else 4
    sizes = {
        "parameters": low * trained,
        "gradients": low * trained // (shards if stage >= 2 else 1),
        "optimizer": 8 * trained // (shards if stage >= 1 else 1),
        "teacher": 4 * student,
    }
    if low == 2:
        sizes["fp32 parameters"] = 4 * trained // (shards if stage >= 1 else 1)
    if dtype != torch.float32:
        sizes["teacher's working copy"] = 2 * student
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in sizes.items())
    return [
        f"memory          {_bytes(sum(sizes.values()))} per process without activations, {str(dtype)[6:]}",
        f"                {parts}",
    ]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
