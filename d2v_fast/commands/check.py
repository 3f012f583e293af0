"""`d2v-fast check`: describe a run and measure a few of its steps.

Nothing is written except the cached tokens of text, and no run folder is made.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from d2v_fast.config import BatchSplit, D2VConfig, RunConfig, load_config
from d2v_fast.config.data2vec2 import num_masks_of
from d2v_fast.config.deepspeed_sections import OptimizerConfig, ZeroConfig
from d2v_fast.data import Batch, BatchMaker, step_order, steps_per_epoch
from d2v_fast.data.bad_files import BadFiles
from d2v_fast.data.progress import duration
from d2v_fast.distributed.world import World, world_size
from d2v_fast.errors import RunError
from d2v_fast.evaluation import run as evaluation
from d2v_fast.memory.peak import PeakMemory, available_memory, format_bytes
from d2v_fast.memory.predict import predict
from d2v_fast.modalities import modality_of
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.finetune import read_data
from d2v_fast.teacher import Teacher
from d2v_fast.teacher.none import NoTeacher
from d2v_fast.training.describe import describe
from d2v_fast.training.engine import PlainEngine, compute_dtype, import_engine
from d2v_fast.training.learning_rate import LearningRate
from d2v_fast.training.preflight import check_attention, check_packages
from d2v_fast.training.step import TrainStep

# steps to try, the time after which that is enough, and the time after which no further step begins
MIN_STEPS, MAX_STEPS = 3, 30
ENOUGH_SECONDS, MAX_SECONDS = 2.0, 30.0


def check(file: str | Path, overrides: Sequence[str] = (), *, num_processes: int | None = None) -> bool:
    """Validate a configuration, run a few steps in one process, and print the results.

    Args:
        file: the configuration file; see `load_config`.
        overrides: values that replace those of the file; see `load_config`.
        num_processes: number of processes of the planned run. None: as many as the launcher started, or 1.
    Returns:
        Whether the loss is finite.
    Raises:
        ConfigError: the configuration is invalid.
        DataError: there is nothing to train on.
        RunError: a package is missing, or the memory does not suffice.
    """
    processes = world_size() if num_processes is None else num_processes
    config = load_config(file, overrides, processes)
    print(f"configuration   {file} is valid", flush=True)
    check_packages(config, processes)
    config, maker, held_out = read_data(config)
    split = config.deepspeed.batch_split(processes)
    schedule = LearningRate(config.d2v.schedule, config.deepspeed.optimizer.params.lr, steps_per_epoch(maker, split))
    world = World(config.d2v.run.device)
    dtype = compute_dtype(config.deepspeed, world.device)
    check_attention(config, world, dtype, print)
    print(describe(config, split, schedule, maker, dtype, world.device.type, held_out), flush=True)
    print("".join(f"{line}\n" for line in evaluation.check_labels(config.d2v)), end="", flush=True)
    plain = _without_deepspeed(config, split)
    _require_memory(plain, dtype, world.device)

    print(f"trying          {MIN_STEPS} to {MAX_STEPS} steps ...", flush=True)
    found = _try(plain, world, maker, split, schedule)
    print(_about(found.batches, config.d2v, maker.what))

    compute = split.accumulation * found.micro_seconds + found.update_seconds
    data = split.accumulation * found.data_seconds
    workers = config.d2v.data.num_workers
    seconds = max(compute, data / workers) if workers else compute + data
    beside = f"made by {workers} workers meanwhile" if workers else "made in between"
    print(_about_memory(found, plain, dtype, world.device.type))
    print(
        f"micro-step      {_span(found.micro_seconds)} forward and backward, update {_span(found.update_seconds)} "
        f"({_device(world.device)}, {str(dtype)[6:]}); its batch {_span(found.data_seconds)}, {beside}"
    )
    print(
        f"step            {_span(seconds)}: {split.accumulation} x micro-step + update"
        + (", or its batches, which take longer: more `d2v.data.num_workers`" if seconds > compute and workers else "")
        + (", without the exchange between processes" if config.deepspeed.needs_deepspeed(processes) else "")
    )
    if (note := _about_capture(config, processes, world.device.type)) is not None:
        print(note)
    length = duration(schedule.num_steps * seconds)
    print(f"whole run       {length} for {schedule.num_steps:,} steps, without checkpoints and probes")
    if not math.isfinite(found.loss):
        print(f"problem: the loss must be finite, but is {found.loss} in the first step: lower the learning rate?")
        return False
    print("nothing was started, and no run folder was made")
    return True


def _without_deepspeed(config: RunConfig, split: BatchSplit) -> RunConfig:
    """Return the configuration of one process's share of the batch, for plain torch."""
    deepspeed = config.deepspeed
    changes: dict[str, object] = {
        "train_batch_size": split.micro_batch * split.accumulation,
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "zero_optimization": ZeroConfig(),
        "optimizer": OptimizerConfig(params=deepspeed.optimizer.params),
    }
    return config.model_copy(update={"deepspeed": deepspeed.model_copy(update=changes)})


def _require_memory(config: RunConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raise a RunError if one process cannot hold the model. The system would kill it without a message."""
    needed = predict(config, 1, dtype, device.type).device_peak
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    several = (num_masks_of(config.d2v) or 1) > 1
    fewer = "take fewer masks per sample (`d2v.mask.num_masks`), " if several else ""
    if free is not None and needed > free:
        raise RunError(
            f"a step cannot be tried here, because one process needs {format_bytes(needed)}, and only "
            f"{format_bytes(free)} are free on this {device.type}. Lower `train_micro_batch_size_per_gpu`, set "
            f"`d2v.model.gradient_checkpointing`, {fewer}or shard with `zero_optimization.stage` over more processes."
        )


class _Found(NamedTuple):
    """Measurements of the steps.

    Attributes:
        loss: of the first micro-step.
        data_seconds: time to make a micro-batch.
        micro_seconds: time of a forward and backward pass.
        update_seconds: time of the update of student and teacher.
        peak_bytes: peak memory.
        batches: the micro-batches, without values.
    """

    loss: float
    data_seconds: float
    micro_seconds: float
    update_seconds: float
    peak_bytes: int
    batches: list[Batch]


def _try(config: RunConfig, world: World, maker: BatchMaker, split: BatchSplit, schedule: LearningRate) -> _Found:
    """Run steps of one micro-step each on the batches of the first process."""
    d2v, device = config.d2v, world.device
    maker.warm_up()
    import_engine(config.deepspeed, world)
    memory = PeakMemory(device)
    torch.manual_seed(d2v.run.seed)
    model = build_objective(d2v).to(device)
    copied = None if model.teacher_config is None else copy.deepcopy(model.averaged)
    engine = PlainEngine(model, config.deepspeed, world, decay_1d=d2v.decay_1d, rates=model.rates())
    # a step at rate 0 changes nothing but allocates the optimizer's moments, which a run holds beside the activations
    # from its second step on
    engine.step(0.0)
    teacher: Teacher = NoTeacher()
    if model.teacher_config is not None:
        teacher = Teacher(model.averaged, model.teacher_config, compute_dtype=engine.compute_dtype, module=copied)
    divisor = model.divisor
    train_step = TrainStep(engine, teacher, world, divisor=divisor, seed=d2v.run.seed)
    order = step_order(maker, split, seed=d2v.run.seed)
    losses, batches, times = [], [], []
    bad = BadFiles(d2v.data, maker)
    start = time.monotonic()
    for step, of_step in enumerate(islice(order, 0, None, split.accumulation), start=1):
        before = time.perf_counter()
        made = maker.make(of_step, d2v.run.seed).batch
        batch = made.to(device)
        _wait(device)
        has_data = time.perf_counter()
        num_rows = max(1, model.rows_of(batch))
        output = train_step.add_gradient(step, 0, batch, num_rows, moments=False)
        _wait(device)
        has_gradient = time.perf_counter()
        train_step.update(step, schedule.at(min(step, schedule.num_steps) - 1))
        _wait(device)
        times.append((has_data - before, has_gradient - has_data, time.perf_counter() - has_gradient))
        losses.append(float(output.loss_sum.detach()) / (num_rows * divisor))
        batches.append(_without_values(made))
        bad.add(made)
        elapsed = time.monotonic() - start
        if step == MAX_STEPS or elapsed > MAX_SECONDS or (step > MIN_STEPS and elapsed > ENOUGH_SECONDS):
            break
    # the first step allocates and compiles, so it does not count if there are others
    columns = zip(*(times[1:] or times), strict=True)
    # steps of samples of different lengths differ by nature: take the mean; others differ only by noise
    middle = statistics.median if maker.lengths is None else statistics.fmean
    data, micro_step, update = (middle(column) for column in columns)
    return _Found(losses[0], data, micro_step, update, memory.bytes(), batches)


def _about_memory(found: _Found, config: RunConfig, dtype: torch.dtype, device_type: str) -> str:
    """Compare the measured peak with the predictions for the measured batches and for the largest ones."""
    largest = max(found.batches, key=lambda batch: batch.inputs.numel())
    of_these = format_bytes(predict(config, 1, dtype, device_type, like=largest).resident_peak)
    of_any = format_bytes(predict(config, 1, dtype, device_type).resident_peak)
    beyond = "" if of_these == of_any else f", and {of_any} for the largest batch of the run"
    return (
        f"peak memory     {format_bytes(found.peak_bytes)} measured in these steps; at most {of_these} predicted for "
        f"their batches{beyond}"
    )


def _about_capture(config: RunConfig, num_processes: int, device_type: str) -> str | None:
    """Return a line that says how the steps of the run differ from the measured ones; None if they do not."""
    if config.reason_not_to_capture(num_processes, device_type) is not None:
        return None
    return (
        "captured        not in this measurement, but in the run (`d2v.run.cuda_graph`): on a GPU that waits for the "
        "host, its steps take less time"
    )


def _without_values(batch: Batch) -> Batch:
    """Return the batch without its inputs' values, which would otherwise count as memory of the run."""
    masked = None if batch.masked_inputs is None else batch.masked_inputs.to("meta")
    inputs = batch.to("meta").inputs
    return replace(batch, inputs=inputs, scale=None, masked_inputs=masked, unpadded=None, offsets=None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _about(batches: list[Batch], config: D2VConfig, what: str) -> str:
    """Return a line about the batches: samples, places, and the shares of places that are padding and masked."""
    samples = places = padding = masked = masks = 0
    for batch in batches:
        whole = len(batch.sample_ids) * config.model.num_places(batch.inputs.shape)
        samples += len(batch.sample_ids)
        places += whole
        padding += 0 if batch.lengths is None else whole - int(batch.lengths.sum())
        masked += len(batch.rows)
        masks = batch.num_masks
    names = modality_of(config).places
    hidden = f"{100 * masked / (masks * (places - padding)):.1f} % of the others masked" if masked else "none masked"
    each = "" if masks == 1 else f" in each of {masks} masks per sample"
    line = (
        f"batch           {samples / len(batches):.3g} {what}s, {places / samples:.3g} {names} each: "
        f"{100 * padding / places:.1f} % padding, {hidden}{each} "
        f"(mean of {len(batches)} micro-steps)"
    )
    bad = dict.fromkeys(file for batch in batches for file in batch.bad)
    return line + "".join(f"\n  unreadable and replaced: {file}" for file in bad)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _span(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
