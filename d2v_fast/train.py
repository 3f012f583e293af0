"""Pre-training and fine-tuning: the command line and the loop.

    python d2v_fast/train.py --ds_config configs/digits.json
    deepspeed d2v_fast/train.py --ds_config configs/digits.json
    torchrun --nproc_per_node 2 d2v_fast/train.py --ds_config configs/digits.json

Everything random is a function of the seed and of counters (step, micro-step, rank, sample), and the schedules are
functions of the step number. So a checkpoint holds no state of random generators or of the loader, and a resumed run
gives the same results as an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # run as a file, Python would look for modules in this folder first: import them by their full names only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from d2v_fast.processes.signals import end_on_import

    end_on_import()

from d2v_fast.cli.run import is_first_process, run_command
from d2v_fast.cli.train_options import config_stem, read_config, train_parser
from d2v_fast.processes.signals import StopRequest

if TYPE_CHECKING:
    from d2v_fast.config import RunConfig
    from d2v_fast.training.metrics import Entry, Speed
    from d2v_fast.training.prepare import Plan, Run
    from d2v_fast.training.step import StepResult


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
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        # read when torch is imported: its store would print a stack trace of C++ for every request to a lost process
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = read_config(options, num_processes)
    if options.supervise is not None and not options.dry_run:
        from d2v_fast.training.supervise import supervise

        status = supervise(config, arguments, options.supervise)
        if status is not None:
            return status
    # imported only now: a wrong file has been refused by here
    train(config, resume=options.resume, dry_run=options.dry_run, stem=config_stem(options))
    return 0


def train(config: RunConfig, *, resume: bool = False, dry_run: bool = False, stem: str = "run") -> None:
    """Train from the start, or from the newest checkpoint of the run.

    Args:
        config: of the run.
        resume: whether to continue the run that `config` names.
        dry_run: whether to only print what the run would be.
        stem: the name of a run without a name, before its number.
    Raises:
        ConfigError, DataError, RunError: with a message for the user.
    """
    from d2v_fast.data.listing import counted, print_listing
    from d2v_fast.processes.idle import IdleWatch
    from d2v_fast.training.preflight import check_name
    from d2v_fast.training.prepare import make_plan, open_world, prepare

    with ExitStack() as opened:
        advice = "If that is normal here, raise `d2v.run.timeout_minutes`."
        idle = opened.enter_context(IdleWatch(config.d2v.run.timeout_s, advice))
        if not dry_run:
            check_name(config, resume)
        plan = make_plan(config)
        if dry_run:
            print_plan(plan)
            return
        if is_first_process():
            print_listing(plan.maker.listing, counted(plan.maker.num_samples, plan.maker.what))
        # from here on a signal asks the run to stop after its next step; listing the data may take hours
        stop = opened.enter_context(StopRequest())
        world = open_world(plan.config, opened)
        if world.size > 1:
            # the world's own watch can tell a process that waits for a busy one from a hung one
            idle.close()
        run = prepare(plan, world, opened, resume=resume, stem=stem)
        if run is not None:
            complete(run, stop)


def print_plan(plan: Plan) -> None:
    """Print what a run would be, in the first process."""
    import torch

    from d2v_fast.evaluation import run as evaluation
    from d2v_fast.training.describe import describe
    from d2v_fast.training.engine import compute_dtype

    if is_first_process():
        config, on_gpu = plan.config, plan.config.d2v.run.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        dtype = compute_dtype(config.deepspeed, device)
        print(describe(config, plan.split, plan.schedule, plan.maker, dtype, device.type, plan.held_out))
        print("".join(f"{line}\n" for line in evaluation.check_labels(config.d2v)), end="")


def complete(run: Run, stop: StopRequest) -> None:
    """Train to the end of the schedule or until asked to stop, and report how the run ended.

    Raises:
        RunError: the run has stopped itself, or has collapsed.
        ConnectionError: another process of the run is gone.
    """
    from d2v_fast.command_lines import resume_command
    from d2v_fast.data.listing import counted
    from d2v_fast.distributed.world import lost_connection
    from d2v_fast.errors import RunError
    from d2v_fast.memory.peak import format_bytes
    from d2v_fast.training.run_folder import BAD_FILES

    try:
        number = loop(run, stop)
    except RunError:
        # raised in every process, so a checkpoint in the background can still be finished
        run.state.finish_save()
        raise
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            inner = getattr(error, "inner_exception", error)
            reason = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
            raise RunError(
                f"the blocks cannot be compiled here: {reason}. To run without compiling, add "
                f"`--set d2v.run.compile=false` to this: {resume_command(run.folder.path)}"
            ) from error
        lost = lost_connection(error)
        if lost is None:
            raise
        # reported by every process that is left
        raise ConnectionError(f"{lost} To continue: {resume_command(run.folder.path)}") from error
    run.log.close()
    if bad := run.folder.lines(BAD_FILES):
        were = "was" if len(bad) == 1 else "were"
        files = counted(len(bad), "unreadable file")
        run.log.say(f"{files} {were} replaced by others: {run.folder.path / BAD_FILES}")
    peak = format_bytes(max(run.world.collect(run.memory.bytes())))
    run.log.say(f"peak memory per process: {peak} (maximum over the processes, since the model was built)")
    if number < run.schedule.num_steps and not run.validation.has_stalled():
        command = resume_command(run.folder.path)
        run.log.say(f"stopped on request and saved after step {number}; to continue: {command}")
    else:
        finish(run, number)


def loop(run: Run, stop: StopRequest) -> int:
    """Train to the end of the schedule or until asked to stop; returns the number of steps made."""
    from d2v_fast.evaluation import run as evaluation
    from d2v_fast.files.faults import fault_point
    from d2v_fast.training.metrics import Speed

    section, order, clock = run.config.d2v.run, run.loader.order, run.step.clock
    probe_every = evaluation.epochs_between_probes(run.config.d2v) * order.steps_per_epoch
    speed = Speed(order.samples_after(run.start_step))
    number = run.start_step
    run.log.say("making the first batch ...")
    for number, step in enumerate(clock.each(run.loader, "data"), start=run.start_step + 1):
        is_last = number == run.schedule.num_steps
        is_logged = number % section.log_every == 0 or number == 1 or is_last
        result = run.step(number, step, run.schedule.at(number - 1), moments=is_logged)
        run.guard.record(result)
        clock.end_step()
        run.log.advance(number)
        if is_logged:
            entry = log_step(run, result, speed)
            if not is_last:
                # the last step is saved first, and judged by `finish`
                run.guard.check_collapse(entry, run.schedule.num_steps)
        if is_logged or run.world.device.type == "cpu":
            run.guard.check(number)
        asked_to_stop = run.world.any(stop.requested)
        if probe_every and number % probe_every == 0 and not is_last:
            with speed.paused():
                run_probe(run, number)
        is_best = False
        if run.validation.is_due(number, order.steps_per_epoch, run.schedule.num_steps):
            with speed.paused():
                is_best = validate(run, number)
        has_stalled = run.validation.has_stalled()
        if number % section.save_every == 0 or is_last or asked_to_stop or is_best or has_stalled:
            with speed.paused():
                run.state.save(number, run.guard.counts(), wait=is_last or asked_to_stop or has_stalled)
                run.log.draw_curves()
        run.state.advance_save()
        fault_point("step")
        if asked_to_stop or has_stalled:
            break
    return number


def validate(run: Run, step: int) -> bool:
    """Score the held-out samples, and return whether this step is the best one so far; every process calls it."""
    entry = run.validation.run(step, run.step.engine, run.step.teacher)
    is_best = run.validation.best == entry
    run.state.protect(run.validation.best)
    return is_best


def log_step(run: Run, result: StepResult, speed: Speed) -> Entry:
    """Log a step, made with moments, over all processes; every process calls it.

    Only here does the loop wait for a GPU.
    """
    order, number, model = run.loader.order, result.number, run.state.model
    sums = run.world.sum(result.sums()).cpu()
    entry = {
        "step": number,
        "epoch": round(number / order.steps_per_epoch, 3),
        **model.logged(sums, result.num_rows),
        "lr": run.schedule.at(number - 1),
        "decay": run.step.teacher.decay(number) if model.teacher_config is not None else None,
        "grad_norm": result.grad_norm.item(),
        "skipped": run.guard.counts().skipped,
        "samples": order.samples_after(number),
        **speed.since_last(order.samples_after(number)),
        "peak_memory_bytes": max(run.world.collect(run.memory.bytes())),
    }
    run.guard.mark_spike(entry)
    run.log.write(entry)
    return entry


def run_probe(run: Run, step: int) -> str | None:
    """Probe the encoders in the first process while the others wait, and write the result to `probe.json`.

    A probe that fails is reported and does not stop the run.

    Returns:
        The table of the results; None without labels or if the probe failed.
    """
    import torch

    from d2v_fast.evaluation import run as evaluation

    d2v, is_last = evaluation.probed(run.config.d2v), step == run.schedule.num_steps
    if d2v is None or not evaluation.has_labels(d2v):
        if d2v is not None and is_last:
            run.log.say(evaluation.advice(d2v, run.folder.path))
        return None

    run.log.say("probing the features ...")
    encoders, head = run.state.whole_encoders(), run.state.whole_head()

    def probe() -> str | None:
        assert encoders is not None
        assert head is not None
        try:
            # other shapes than those that the blocks are compiled for
            with torch.compiler.set_stance("force_eager"):
                report = evaluation.probe(d2v, *encoders, head)
        except (ValueError, OSError) as error:
            run.log.say(f"no probe after step {step}: {error}")
            return None
        run.folder.append_json("probe.json", {"step": step, **report.to_dict()})
        run.log.say(f"after step {step}:\n{report}")
        run.log.draw_curves()
        return str(report)

    table: str | None = run.world.decide(probe)
    return table


def finish(run: Run, step: int) -> None:
    """Judge the run, report its profile, export the encoder, probe it, and mark the run as finished.

    Args:
        run: The run.
        step: Its last step, which may be earlier than that of the schedule if it has stalled.
    Raises:
        RunError: the run has collapsed.
    """
    from d2v_fast.interop.export import export_student
    from d2v_fast.training.guard import judge_end

    unknown = run.world.decide(lambda: judge_end(run.folder.path, run.config.d2v.guard, run.schedule.num_steps))
    if unknown is not None:
        run.log.say(unknown)
    if run.step.clock.enabled and run.world.is_first:
        run.folder.write_json("profile.json", run.step.clock.report())
        run.log.say(str(run.step.clock))
        if run.step.engine.captured:
            run.log.say("`--set d2v.run.cuda_graph=false` measures the parts of a graph, without one")
    best = run.validation.best
    run.log.say("exporting the student ..." if best is None else "exporting the best model ...")
    chosen = None if best is None else int(best["step"])
    run.world.decide(lambda: run.log.say(export_student(run.folder.path, step=chosen)))
    result = {"step": step, **({"probe": run_probe(run, step)} if best is None else run.validation.result())}
    if run.world.is_first:
        # marks the run as finished
        run.folder.write_json("result.json", result)
    run.log.say(f"run folder: {run.folder.path}")


if __name__ == "__main__":
    sys.exit(main())
