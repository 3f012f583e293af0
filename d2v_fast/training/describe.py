"""Describe a run before it starts: parameters, memory, data and length."""

from __future__ import annotations

import torch
from torch import nn

from d2v_fast.config import BatchSplit, RunConfig
from d2v_fast.config.data2vec2 import num_masks_of
from d2v_fast.data import BatchMaker, steps_per_epoch
from d2v_fast.data.listing import counted, describe_listing
from d2v_fast.memory.peak import format_bytes
from d2v_fast.memory.predict import predict
from d2v_fast.objectives.build import build_objective
from d2v_fast.training.learning_rate import LearningRate


def describe(
    config: RunConfig,
    split: BatchSplit,
    schedule: LearningRate,
    maker: BatchMaker,
    dtype: torch.dtype,
    device_type: str = "cpu",
    held_out: BatchMaker | None = None,
) -> str:
    """Return the lines that `--dry-run` prints.

    Args:
        config: The run's configuration.
        split: How the global batch is split.
        schedule: The learning rate schedule.
        maker: Makes the training batches.
        dtype: Dtype of the forward pass.
        device_type: "cpu" or "cuda".
        held_out: Makes the held-out batches of a run that fine-tunes.
    """
    with torch.device("meta"):
        model = build_objective(config.d2v)
    student, head = _count(model.student), _count(model.head)
    average = 0 if model.teacher_config is None else _count(model if model.averaged is model else model.student)
    epoch_steps = steps_per_epoch(maker, split)
    lines = [
        f"parameters      student {student:,}, head {head:,}" + (f", teacher {average:,}" if average else ""),
        *_memory(config, split.world_size, dtype, device_type),
        *_data(maker),
        *_held_out(held_out),
        f"global batch    {split.global_batch:,} = {split.micro_batch} per micro-step x {split.accumulation} "
        f"micro-steps x {split.world_size} processes",
        *_masks(config, split),
        f"length          {schedule.num_steps:,} optimizer steps, {epoch_steps:,} per epoch, "
        f"{schedule.num_steps / epoch_steps:.1f} epochs",
        f"learning rate   {schedule.peak:g} after {schedule.warmup_steps:,} steps of warm-up, then "
        f"{config.d2v.schedule.kind} to {schedule.at(schedule.num_steps - 1):.3g}",
    ]
    return "\n".join(lines + config.without_effect(split.world_size))


def _masks(config: RunConfig, split: BatchSplit) -> list[str]:
    """Return a line about the masks of a sample, if it has several."""
    masks = num_masks_of(config.d2v)
    if masks is None:
        return []
    return [f"masks           {masks} per sample, {masks * split.global_batch:,} masked copies per step"]


def _data(maker: BatchMaker) -> list[str]:
    """Return the lines about the data: what is used and what is left out."""
    first, *others = describe_listing(maker.listing, counted(maker.num_samples, maker.what))
    return [f"data            {first}", *(f"{'':16}{line}" for line in others)]


def _held_out(maker: BatchMaker | None) -> list[str]:
    return [] if maker is None else [f"held out        {counted(maker.num_samples, maker.what)}"]


def _memory(config: RunConfig, num_processes: int, dtype: torch.dtype, device_type: str) -> list[str]:
    """Return the lines about memory, one per part of the prediction."""
    found = predict(config, num_processes, dtype, device_type)
    on_host = found.host_state > 0

    def line(name: str, device: int, host: int, meaning: str) -> str:
        sizes = f"{format_bytes(device):>8}" + (f" {format_bytes(host):>8}" if on_host else "")
        return f"  {name:30}{sizes}  {meaning}"

    besides = ""
    if found.overhead:
        besides = f"; at most {format_bytes(found.resident_peak)} resident with the overhead of malloc and libraries"
    lines = [
        f"memory          {format_bytes(found.device_peak)} of tensors per process, predicted for the largest batch "
        f"({str(dtype)[6:]}, {num_processes} process{'es' if num_processes > 1 else ''}, {device_type}){besides}",
    ]
    if on_host:
        lines.append(f"{'':34}on {device_type}  on host")
    lines += [line(part.name, part.device, part.host, part.meaning) for part in found.parts]
    lines.append(line("stays from step to step", found.device_state, found.host_state, ""))
    lines += [line(f"+ {m.name}", m.device, m.host, m.meaning) for m in found.phases]
    lines.append(line("activations", found.activations, 0, "of which: saved for the backward pass"))
    lines.append(line("while the model is built", found.build, 0, "peak of every process, however many there are"))
    if found.save:
        meaning = "host memory of the copy that a checkpoint is written from"
        sizes = (0, found.save) if on_host else (found.save, 0)
        lines.append(line("while a checkpoint is written", *sizes, meaning))
    return lines


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
