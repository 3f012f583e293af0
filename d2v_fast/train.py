"""Pre-training: the command line and the loop.

    python d2v_fast/train.py --ds_config configs/digits.json
    deepspeed d2v_fast/train.py --ds_config configs/digits.json
    torchrun --nproc_per_node 2 d2v_fast/train.py --ds_config configs/digits.json

Everything random is a function of the seed and of counters (step, micro-step, rank, sample), and the schedules are
functions of the step number. So a checkpoint needs no state of random generators or of the loader, and a resumed run
repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # run as a file, Python looks for modules in this folder first; they are to be found by their full names only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from d2v_fast.processes.signals import end_on_import

    end_on_import()

from d2v_fast.cli.run import is_first_process, run_command
from d2v_fast.cli.train_options import config_stem, read_config, train_parser
from d2v_fast.processes.signals import StopRequest

if TYPE_CHECKING:
    from d2v_fast.config import BatchSplit, RunConfig
    from d2v_fast.data import StepLoader
    from d2v_fast.distributed.world import World
    from d2v_fast.memory.peak import PeakMemory
    from d2v_fast.objectives.data2vec import Data2Vec
    from d2v_fast.teacher import Teacher
    from d2v_fast.training.engine import Engine
    from d2v_fast.training.guard import Guard
    from d2v_fast.training.metrics import Log
    from d2v_fast.training.run_folder import RunFolder
    from d2v_fast.training.run_state import RunState
    from d2v_fast.training.schedules import LearningRate
    from d2v_fast.training.stepclock import StepClock

# of the run folder: the unreadable files of the data set, as `path: reason`
BAD_FILES = "bad_files.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; see `run_command`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = train_parser().parse_args(words)
    return run_command("train", lambda: train_command(options, words))


def train_command(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Train, with `--supervise` in child processes, and return the exit status.

    Args:
        options: as `train_parser` returns them.
        arguments: the words that they were read from, for child processes.
    Raises:
        UserError, OSError: with a message for the user.
    """
    config = read_config(options, int(os.environ.get("WORLD_SIZE", "1")))
    if options.supervise is not None and not options.dry_run:
        from d2v_fast.training.supervise import supervise

        status = supervise(config, arguments, options.supervise)
        if status is not None:
            return status
    # imported only now: a wrong file has been refused by here
    train(config, resume=options.resume, dry_run=options.dry_run, stem=config_stem(options))
    return 0


def train(config: RunConfig, *, resume: bool = False, dry_run: bool = False, stem: str = "run") -> None:
    """Train as `config` says, from the start or from the newest checkpoint of the run.

    Args:
        stem: what a run without a name is called after.
    Raises:
        ConfigError, DataError, RunError: with a message for the user.
    """
    from d2v_fast.command_lines import resume_command
    from d2v_fast.data.listing import counted
    from d2v_fast.distributed.world import RunError, lost_connection
    from d2v_fast.memory.peak import format_bytes

    with ExitStack() as opened:
        stop = StopRequest()
        run = prepare(config, resume, dry_run, stem, opened, stop)
        if run is None:
            return
        try:
            step = loop(run, stop)
        except RunError:
            # every process is here: what was being saved is worth finishing
            run.state.finish_save()
            raise
        except RuntimeError as error:
            told = lost_connection(error)
            if told is None:
                raise
            # said by every process that is left
            raise ConnectionError(f"{told} To continue: {resume_command(run.folder.path)}") from error
        run.log.close()
        if bad := run.folder.lines(BAD_FILES):
            were = "was" if len(bad) == 1 else "were"
            files = counted(len(bad), "unreadable file")
            run.log.say(f"{files} {were} replaced by others: {run.folder.path / BAD_FILES}")
        peak = format_bytes(max(run.world.collect(run.memory.bytes())))
        run.log.say(f"peak memory per process: {peak} (of the process with most, since its model was built)")
        if step < run.schedule.num_steps:
            command = resume_command(run.folder.path)
            run.log.say(f"stopped on request and saved after step {step}; to continue: {command}")
        else:
            finish(run)


@dataclass(frozen=True)
class Run:
    """Everything that the loop works with."""

    config: RunConfig
    split: BatchSplit
    world: World
    folder: RunFolder
    schedule: LearningRate
    model: Data2Vec
    teacher: Teacher
    engine: Engine
    state: RunState
    start_step: int
    loader: StepLoader
    log: Log
    guard: Guard
    clock: StepClock
    memory: PeakMemory


def prepare(
    config: RunConfig, resume: bool, dry_run: bool, stem: str, opened: ExitStack, stop: StopRequest
) -> Run | None:
    """Build everything, what is cheapest to find wrong first; None where there is nothing to train.

    Args:
        opened: takes what must be closed when the run ends, in whatever way.
        stop: entered once the data are there, which may take hours.
    """
    import torch

    from d2v_fast.checkpoints.store import Checkpoints
    from d2v_fast.data import StepLoader, batch_maker, resolved, steps_per_epoch
    from d2v_fast.data.listing import counted, print_listing
    from d2v_fast.distributed.world import RunError, World, world_size
    from d2v_fast.evaluation import run as evaluation
    from d2v_fast.memory.peak import PeakMemory
    from d2v_fast.objectives.data2vec import build_model
    from d2v_fast.processes.idle import IdleWatch
    from d2v_fast.teacher import Teacher
    from d2v_fast.training.engine import compute_dtype, import_engine, make_engine
    from d2v_fast.training.guard import Guard
    from d2v_fast.training.metrics import NoLog, RunLog, import_reports
    from d2v_fast.training.preflight import check_name, check_packages, check_room, report_missing_kernels
    from d2v_fast.training.resume_rules import too_short
    from d2v_fast.training.run_folder import RunFolder
    from d2v_fast.training.run_state import RunState, samples_of
    from d2v_fast.training.schedules import LearningRate
    from d2v_fast.training.stepclock import StepClock

    split = config.deepspeed.batch_split(world_size())
    advice = "If that is normal here, raise `d2v.run.timeout_minutes`."
    idle = opened.enter_context(IdleWatch(config.d2v.run.timeout_s, advice))
    if not dry_run:
        check_name(config, resume)
    check_packages(config, split.world_size)
    config = resolved(config)
    d2v = config.d2v
    maker = batch_maker(d2v)
    epoch_steps = steps_per_epoch(maker, split)
    schedule = LearningRate(d2v.schedule, config.deepspeed.optimizer.params.lr, epoch_steps)
    if dry_run:
        from d2v_fast.training.describe import describe

        if is_first_process():
            device = torch.device("cuda" if d2v.run.device != "cpu" and torch.cuda.is_available() else "cpu")
            print(describe(config, split, schedule, maker, compute_dtype(config.deepspeed, device), device.type))
            print("".join(f"{line}\n" for line in evaluation.check_labels(d2v)), end="")
        return None

    if is_first_process():
        print_listing(maker.listing, counted(maker.num_samples, maker.what))
    # from here on a signal is a request: one that comes while things are being built stops after the first step
    opened.enter_context(stop)
    world = World(
        d2v.run.device, config.deepspeed.needs_deepspeed(split.world_size), timeout_minutes=d2v.run.timeout_minutes
    )
    opened.callback(world.close)
    if world.size > 1:
        # a process may wait for the others as long as they work, and has a watch that asks them
        idle.close()
    labels = world.decide(lambda: evaluation.check_labels(d2v))
    say = functools.partial(print, flush=True) if world.is_first else lambda *_: None
    report_missing_kernels(world, say)
    say("importing the engine ...")
    import_engine(config.deepspeed, world)
    check_room(config, world, compute_dtype(config.deepspeed, world.device))
    folder = RunFolder.open(config, world, resume=resume, stem=stem)
    opened.callback(folder.close)
    replaced = " (the run in it ended before it saved anything)" if folder.replaced else ""
    repaired = world.decide(folder.repair) if folder.reopened else []
    say("\n".join([*labels, f"run folder: {folder.path}{replaced}", *repaired]))
    if world.is_first and not folder.reopened:
        # a run that fails before its first checkpoint can be resumed, too
        folder.write_config(config)
    for line in config.without_effect(world.size):
        say(line)
    if world.decide(lambda: is_finished(folder, schedule.num_steps, epoch_steps)):
        say("this run is finished, there is nothing left to do")
        return None

    if world.is_first:
        import_reports()
    say("building the model ...")
    memory = PeakMemory(world.device)
    torch.manual_seed(d2v.run.seed)
    model = build_model(d2v)
    if not config.deepspeed.needs_deepspeed(world.size):
        # DeepSpeed takes to the device what stays there, in its dtype
        model.to(world.device)
    # copied before an engine shards the student
    copied = copy.deepcopy(model.student.averaged)
    engine = make_engine(model, config.deepspeed, world, decay_1d=d2v.decay_1d)
    teacher = Teacher(
        model.student.averaged,
        d2v.teacher,
        compute_dtype=engine.compute_dtype,
        module=copied,
        engine=engine.deepspeed,
    )
    checkpoints = Checkpoints(folder.path / "checkpoints", d2v.run.keep, world, say)
    state = RunState(config, world, model, teacher, engine, checkpoints, maker.vocabulary, samples_of(maker, world))
    start_step = state.restore(say) if folder.reopened else 0
    if start_step > schedule.num_steps:
        saved = world.decide(checkpoints.steps)
        raise RunError(too_short(start_step, schedule.num_steps, epoch_steps, folder.path, saved))
    if world.is_first:
        folder.write_config(config)
    say("compiling the mask sampler ...")
    loader = StepLoader(
        maker,
        d2v,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        world_size=world.size,
        rank=world.rank,
        start_step=start_step,
        num_steps=schedule.num_steps,
        on_bad=lambda file: folder.add_line(BAD_FILES, file),
    )
    log = RunLog(folder, schedule.num_steps, start_step, d2v.guard) if world.is_first else NoLog()
    opened.callback(log.close)
    guard = Guard(config, world, state, folder, model, steps_per_epoch=epoch_steps, say=log.say)
    clock = StepClock(world.device, enabled=d2v.run.profile)
    clock.watch(model)
    return Run(
        config,
        split,
        world,
        folder,
        schedule,
        model,
        teacher,
        engine,
        state,
        start_step,
        loader,
        log,
        guard,
        clock,
        memory,
    )


def is_finished(folder: RunFolder, num_steps: int, steps_per_epoch: int) -> bool:
    """Whether the run in this folder was brought to the end of its schedule.

    Raises:
        RunError: it was brought to the end of a longer one.
    """
    from d2v_fast.checkpoints.files import complete_steps
    from d2v_fast.distributed.world import RunError
    from d2v_fast.training.resume_rules import too_short

    saved, finished = complete_steps(folder.path / "checkpoints"), folder.finished_steps()
    if finished > num_steps:
        raise RunError(too_short(finished, num_steps, steps_per_epoch, folder.path, saved))
    # a finished run may have been extended and interrupted
    return finished == num_steps and max(saved, default=0) <= num_steps


def loop(run: Run, stop: StopRequest) -> int:
    """Train until the end of the schedule or until asked to stop; returns the number of steps made."""
    import torch

    from d2v_fast.files.faults import fault_point
    from d2v_fast.training.metrics import Speed, loss_and_deviations

    section, width = run.config.d2v.run, run.config.d2v.model.width
    divisor = run.config.d2v.loss.divisor(width)
    probe_every = run.config.d2v.probe.every_epochs * run.loader.steps_per_epoch
    speed = Speed(run.loader.samples_after(run.start_step))
    step = run.start_step
    run.log.say("making the first batch ...")
    for step, micro_batches in enumerate(run.clock.each(run.loader, "data"), start=run.start_step + 1):
        is_last = step == run.schedule.num_steps
        is_logged = step % section.log_every == 0 or step == 1 or is_last
        num_rows = max(1, micro_batches[0].global_rows or 0)
        totals = torch.zeros(1 + 4 * width, device=run.world.device)

        for micro_step, batch in enumerate(micro_batches):
            batch = batch.to(run.world.device, non_blocking=True)
            run.world.arrive()
            torch.manual_seed(dropout_seed(section.seed, step, micro_step, run.world.rank))
            output = run.engine.forward(batch, run.teacher.module)
            run.guard.see_loss(output.loss_sum)
            with run.clock.part("backward"):
                run.engine.backward(output.loss_sum, num_rows * divisor)
            if is_logged:
                totals += torch.cat((output.loss_sum.detach().view(1), output.moments.flatten()))

        with run.clock.part("optimizer"):
            applied = run.engine.step(run.schedule.at(step - 1))
        with run.clock.part("EMA"):
            run.state.follow(step, applied)
        run.guard.end_step(step, micro_batches, applied)
        run.clock.end_step()
        run.log.advance(step)

        if is_logged:
            # host sync: the only one of the loop on a GPU
            summed = run.world.sum(totals).cpu()
            entry = {
                "step": step,
                "epoch": round(step / run.loader.steps_per_epoch, 3),
                **loss_and_deviations(summed, num_rows, width, divisor),
                "lr": run.schedule.at(step - 1),
                "decay": run.teacher.decay(step),
                "grad_norm": run.engine.grad_norm.item(),
                "skipped": int(run.state.skipped),
                "samples": run.loader.samples_after(step),
                **speed.since_last(run.loader.samples_after(step)),
                "peak_memory_bytes": max(run.world.collect(run.memory.bytes())),
            }
            run.guard.mark_spike(entry)
            run.log.write(entry)
            if not is_last:
                # the last step is saved first, and judged by `finish`
                run.guard.check_collapse(entry, run.schedule.num_steps)
        if is_logged or run.world.device.type == "cpu":
            run.guard.check(step)
        asked_to_stop = run.world.any(stop.requested)
        if probe_every and step % probe_every == 0 and not is_last:
            with speed.paused():
                run_probe(run, step)
        if step % section.save_every == 0 or is_last or asked_to_stop:
            with speed.paused():
                run.state.save(step, wait=is_last or asked_to_stop)
                run.log.draw_curves()
        run.state.advance_save()
        fault_point("step")
        if asked_to_stop:
            break
    return step


def run_probe(run: Run, step: int) -> str | None:
    """Probe in the first process while the others wait; the table, and `probe.json` in the run folder.

    A probe that fails is reported and stops nothing.
    """
    from d2v_fast.evaluation import run as evaluation

    d2v, is_last = run.config.d2v, step == run.schedule.num_steps
    if not evaluation.has_labels(d2v):
        if is_last:
            run.log.say(evaluation.advice(d2v, run.folder.path))
        return None

    run.log.say("probing the features ...")
    encoders = run.state.whole_encoders()

    def probe() -> str | None:
        assert encoders is not None
        try:
            report = evaluation.probe(d2v, *encoders)
        except (ValueError, OSError) as error:
            run.log.say(f"no probe after step {step}: {error}")
            return None
        run.folder.append_json("probe.json", {"step": step, **report.to_dict()})
        run.log.say(f"after step {step}:\n{report}")
        run.log.draw_curves()
        return str(report)

    table: str | None = run.world.decide(probe)
    return table


def finish(run: Run) -> None:
    """Judge the run, then report where its time went, export, probe, and name the folder.

    Raises:
        RunError: the run has collapsed.
    """
    from d2v_fast.interop.export import export_student
    from d2v_fast.training.guard import judge_end

    unknown = run.world.decide(lambda: judge_end(run.folder.path, run.config.d2v.guard, run.schedule.num_steps))
    if unknown is not None:
        run.log.say(unknown)
    if run.clock.enabled and run.world.is_first:
        run.folder.write_json("profile.json", run.clock.report())
        run.log.say(str(run.clock))
    step = run.schedule.num_steps
    run.log.say("exporting the student ...")
    run.world.decide(lambda: run.log.say(export_student(run.folder.path)))
    table = run_probe(run, step)
    if run.world.is_first:
        # its presence says that the run is finished
        run.folder.write_json("result.json", {"step": step, "probe": table})
    run.log.say(f"run folder: {run.folder.path}")


def dropout_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed of torch's generator for one forward pass, in [0, 2**63)."""
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_step, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


if __name__ == "__main__":
    sys.exit(main())
