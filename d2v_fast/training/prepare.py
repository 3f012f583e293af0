"""Build everything that a run needs. The cheapest checks come first."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch

from d2v_fast.checkpoints.files import complete_steps
from d2v_fast.checkpoints.store import Checkpoints
from d2v_fast.config import BatchSplit, RunConfig
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data import BatchMaker, StepLoader, step_order, steps_per_epoch
from d2v_fast.distributed.world import World, world_size
from d2v_fast.errors import RunError, UserError
from d2v_fast.evaluation import run as evaluation
from d2v_fast.memory.peak import PeakMemory
from d2v_fast.objectives.base import Objective
from d2v_fast.objectives.build import build_objective
from d2v_fast.objectives.finetune import HeldOut, read_data
from d2v_fast.teacher import Teacher
from d2v_fast.teacher.none import NoTeacher
from d2v_fast.training import metrics
from d2v_fast.training.capture import CudaCapture
from d2v_fast.training.captured_step import CapturedStep, CaptureOptions
from d2v_fast.training.compiled_blocks import compile_blocks, reason_not_to_compile
from d2v_fast.training.engine import PlainEngine, compute_dtype, import_engine, make_engine
from d2v_fast.training.guard import Guard
from d2v_fast.training.learning_rate import LearningRate
from d2v_fast.training.metrics import Log, NoLog, RunLog
from d2v_fast.training.preflight import check_attention, check_packages, check_room, report_missing_kernels
from d2v_fast.training.resume_rules import too_short
from d2v_fast.training.run_folder import BAD_FILES, RunFolder
from d2v_fast.training.run_state import Networks, Resumed, RunState, data_identity
from d2v_fast.training.step import TrainStep
from d2v_fast.training.stepclock import CAPTURED_PARTS, StepClock
from d2v_fast.training.validation import Validation

Say = Callable[[str], None]


class Plan(NamedTuple):
    """The facts about a run that need no processes, folder or model.

    Attributes:
        config: The configuration, including values that follow from the data.
        split: How the global batch is split.
        maker: Makes the training batches.
        held_out: Makes the held-out batches of a run that fine-tunes.
        schedule: The learning rate schedule, with the length of the run.
        steps_per_epoch: Optimizer steps per pass over the data.
    """

    config: RunConfig
    split: BatchSplit
    maker: BatchMaker
    held_out: HeldOut | None
    schedule: LearningRate
    steps_per_epoch: int


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        config: The configuration, including values that follow from the data.
        world: The processes of the run.
        folder: The run folder.
        log: Writes the reports.
        schedule: The learning rate schedule.
        loader: Loads the batches.
        step: Makes a step.
        state: Saves checkpoints.
        guard: Stops the run after non-finite steps or a collapse.
        validation: Scores held-out samples.
        memory: Measures peak memory since the model was built.
        start_step: Steps made by earlier processes.
    """

    config: RunConfig
    world: World
    folder: RunFolder
    log: Log
    schedule: LearningRate
    loader: StepLoader
    step: TrainStep
    state: RunState
    guard: Guard
    validation: Validation
    memory: PeakMemory
    start_step: int


def make_plan(config: RunConfig) -> Plan:
    """Check packages and data, and compute the length of the run.

    Raises:
        ConfigError, DataError, RunError: With a message for the user.
    """
    split = config.deepspeed.batch_split(world_size())
    check_packages(config, split.world_size)
    config, maker, held_out = read_data(config)
    epoch_steps = steps_per_epoch(maker, split)
    schedule = LearningRate(config.d2v.schedule, config.deepspeed.optimizer.params.lr, epoch_steps)
    return Plan(config, split, maker, held_out, schedule, epoch_steps)


def open_world(config: RunConfig, opened: ExitStack) -> World:
    """Connect the processes of the run.

    Args:
        config: The run's configuration.
        opened: Closes the connection.
    """
    run = config.d2v.run
    world = World(run.device, config.deepspeed.needs_deepspeed(world_size()), timeout_minutes=run.timeout_minutes)
    opened.callback(world.close)
    return world


def prepare(plan: Plan, world: World, opened: ExitStack, *, resume: bool, stem: str) -> Run | None:
    """Build a run; every process calls it.

    Args:
        plan: The run's plan.
        world: The processes of the run.
        opened: Closes the run's resources.
        resume: Continue the run that the configuration names.
        stem: Start of the name of a run without a name.
    Returns:
        The run, or None if it is finished already.
    Raises:
        ConfigError, DataError, RunError: With a message for the user.
    """
    say: Say = functools.partial(print, flush=True) if world.is_first else lambda text: None
    folder = _open_folder(plan, world, opened, say, resume=resume, stem=stem)
    if world.decide(lambda: is_finished(folder, plan)):
        say("this run is finished, there is nothing left to do")
        return None
    if world.is_first:
        # imported now, so that their memory does not count as the run's
        metrics.import_reports()
    say("building the model ...")
    memory = PeakMemory(world.device)
    networks = _build_networks(plan.config, world, folder)
    _speed_up(plan.config, world, networks, say)
    state, resumed = _restore(plan, world, folder, networks, say)
    say("compiling the mask sampler ...")
    loader = _make_loader(plan, world, folder, resumed.step)
    log = _open_log(plan, world, folder, resumed.step)
    opened.callback(log.close)
    validation = Validation(plan.config, world, plan.held_out, folder, resumed.step, log.say)
    state.protect(validation.best)
    guard = Guard(
        plan.config,
        world,
        folder,
        networks.model,
        counts=resumed.counts,
        steps_per_epoch=plan.steps_per_epoch,
        say=log.say,
    )
    return Run(
        config=plan.config,
        world=world,
        folder=folder,
        log=log,
        schedule=plan.schedule,
        loader=loader,
        step=_make_step(plan.config, world, networks, say),
        state=state,
        guard=guard,
        validation=validation,
        memory=memory,
        start_step=resumed.step,
    )


def is_finished(folder: RunFolder, plan: Plan) -> bool:
    """Return whether the run in this folder has reached the end of its schedule.

    Raises:
        RunError: It has reached the end of a longer schedule.
    """
    num_steps = plan.schedule.num_steps
    saved, finished = complete_steps(folder.path / "checkpoints"), folder.finished_steps()
    if finished > num_steps:
        raise RunError(too_short(finished, num_steps, plan.steps_per_epoch, folder.path, saved))
    d2v = plan.config.d2v
    if isinstance(d2v, FinetuneConfig) and 0 < finished < num_steps:
        # the run has ended early, and would end again with as little patience
        ended_with = folder.stalled_with()
        return ended_with is not None and d2v.valid.patience is not None and d2v.valid.patience <= ended_with
    # a finished run may have been extended and interrupted
    return finished == num_steps and max(saved, default=0) <= num_steps


def _open_folder(plan: Plan, world: World, opened: ExitStack, say: Say, *, resume: bool, stem: str) -> RunFolder:
    """Make or reopen the run folder, after everything that can be checked without it."""
    config = plan.config
    labels = world.decide(lambda: evaluation.check_labels(config.d2v))
    report_missing_kernels(world, say)
    say("importing the engine ...")
    import_engine(config.deepspeed, world)
    dtype = compute_dtype(config.deepspeed, world.device)
    check_attention(config, world, dtype, say)
    check_room(config, world, dtype)
    folder = RunFolder.open(config, world, resume=resume, stem=stem)
    opened.callback(folder.close)
    replaced = " (the run in it ended before it saved anything)" if folder.replaced else ""
    repaired = world.decide(folder.repair) if folder.reopened else []
    say("\n".join([*labels, f"run folder: {folder.path}{replaced}", *repaired]))
    if world.is_first and not folder.reopened:
        # so that a run that fails before its first checkpoint can be resumed
        folder.write_config(config)
    for line in config.without_effect(world.size):
        say(line)
    return folder


def _build_networks(config: RunConfig, world: World, folder: RunFolder) -> Networks:
    """Build student, engine and teacher with initial weights, or those that a new run begins with."""
    d2v = config.d2v
    torch.manual_seed(d2v.run.seed)
    model = build_objective(d2v)
    if not world.decide(lambda: bool(complete_steps(folder.path / "checkpoints"))):
        _begin(model)
    if not config.deepspeed.needs_deepspeed(world.size):
        # DeepSpeed moves what it needs on the device itself, in its dtype
        model.to(world.device)
    # copied before an engine shards the student
    copied = None if model.teacher_config is None else copy.deepcopy(model.averaged)
    engine = make_engine(model, config.deepspeed, world, decay_1d=d2v.decay_1d, rates=model.rates())
    if model.teacher_config is None:
        return Networks(model, NoTeacher(), engine)
    teacher = Teacher(
        model.averaged,
        model.teacher_config,
        compute_dtype=engine.compute_dtype,
        module=copied,
        engine=engine.deepspeed,
    )
    return Networks(model, teacher, engine)


def _begin(model: Objective) -> None:
    """Load the weights that a new run begins with.

    Raises:
        RunError: They are damaged, or do not fit the model.
    """
    try:
        model.begin()
    except UserError:
        raise
    except ValueError as error:
        # a fault of the source that the user has named, not of the run
        raise RunError(str(error)) from error


def _restore(plan: Plan, world: World, folder: RunFolder, networks: Networks, say: Say) -> tuple[RunState, Resumed]:
    """Load the newest checkpoint of a reopened run, and write the configuration that the run uses from now on."""
    config = plan.config
    checkpoints = Checkpoints(folder.path / "checkpoints", config.d2v.run.keep, world, say)
    state = RunState(config, world, networks, checkpoints, data_identity(plan.maker, world))
    resumed = state.restore(say) if folder.reopened else Resumed()
    if resumed.step > plan.schedule.num_steps:
        saved = world.decide(checkpoints.steps)
        raise RunError(too_short(resumed.step, plan.schedule.num_steps, plan.steps_per_epoch, folder.path, saved))
    if world.is_first:
        folder.write_config(config)
    return state, resumed


def _make_loader(plan: Plan, world: World, folder: RunFolder, start_step: int) -> StepLoader:
    d2v = plan.config.d2v
    order = step_order(
        plan.maker,
        plan.split,
        rank=world.rank,
        seed=d2v.run.seed,
        start_step=start_step,
        num_steps=plan.schedule.num_steps,
    )
    return StepLoader(
        plan.maker,
        order,
        d2v.data,
        pin_memory=world.device.type == "cuda",
        device=world.device,
        timeout_s=d2v.run.timeout_s,
        on_bad=functools.partial(folder.add_line, BAD_FILES),
    )


def _open_log(plan: Plan, world: World, folder: RunFolder, start_step: int) -> Log:
    if not world.is_first:
        return NoLog()
    return RunLog(folder, plan.schedule.num_steps, start_step, plan.config.d2v.guard)


def _speed_up(config: RunConfig, world: World, networks: Networks, say: Say) -> None:
    """Compile the blocks and decide whether to capture steps, and report what a GPU, or the file, expects in vain."""
    run, engine, on_gpu = config.d2v.run, networks.engine, world.device.type == "cuda"
    if run.compile is True or (run.compile == "auto" and on_gpu):
        reason = reason_not_to_compile(engine, world.device)
        if reason is None:
            compile_blocks(networks.model, networks.teacher.module)
            engine.compiled = True
            say("the blocks are compiled in the first steps (`d2v.run.compile`)")
        else:
            say(f"the blocks are not compiled (`d2v.run.compile`): {reason}")
    reason = config.reason_not_to_capture(world.size, world.device.type)
    if reason is None:
        engine.captured = True
    elif run.cuda_graph is True or (run.cuda_graph == "auto" and on_gpu):
        say(f"steps are not captured (`d2v.run.cuda_graph`): {reason}")


def _make_step(config: RunConfig, world: World, networks: Networks, say: Say) -> TrainStep:
    d2v, engine, model = config.d2v, networks.engine, networks.model
    divisor, seed = model.divisor, d2v.run.seed
    if engine.captured:
        assert isinstance(engine, PlainEngine)
        options = CaptureOptions(
            CudaCapture(world.device), d2v.run.cuda_graph_shapes, d2v.run.kept_samples != "drawn", say
        )
        clock = StepClock(world.device, enabled=d2v.run.profile, parts=CAPTURED_PARTS)
        return CapturedStep(engine, networks.teacher, world, options, divisor=divisor, seed=seed, clock=clock)
    clock = StepClock(world.device, enabled=d2v.run.profile)
    model.part = clock.part
    prepare = None
    if d2v.run.kept_samples == "fixed":
        prepare = functools.partial(model.with_drawn_drops, fixed_counts=True)
    return TrainStep(engine, networks.teacher, world, divisor=divisor, seed=seed, clock=clock, prepare=prepare)
