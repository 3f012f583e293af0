"""Stop a run after too many non-finite steps or after a collapse, and mark spikes of the loss.

A step whose loss or gradient is not finite in one process changes nothing in any process; see `engine.py`. The guard
counts such steps, and writes a report about them when it stops the run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2v_fast.command_lines import resume_command
from d2v_fast.config import GuardConfig, RunConfig, StepGuardConfig
from d2v_fast.distributed.deepspeed_internals import is_partitioned
from d2v_fast.distributed.world import World
from d2v_fast.errors import RunError
from d2v_fast.objectives.base import Objective
from d2v_fast.training.metrics import Entry, read_log
from d2v_fast.training.run_folder import RunFolder
from d2v_fast.training.step import SkipCounts, StepResult

DUMP = "nonfinite.json"

# most and fewest logged losses for the median that a loss is compared with
SPIKE_WINDOW, SPIKE_HISTORY = 100, 10

# share of the run from which a collapse is checked at the latest, and the fewest steps before that
LATEST_JUDGED, FEWEST_JUDGED = 2 / 3, 20
# shorter runs may not have learned anything yet
USUAL_STEPS = 5000


class _Seen(NamedTuple):
    """A step, and whether the gradient of this process was finite (0-d bool on the device)."""

    result: StepResult
    gradient_finite: Tensor


class Guard:
    """Counts non-finite steps, and stops the run after too many in a row.

    Only `check` and `counts` wait for the device.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        folder: The run folder, with the log of the steps made so far.
        model: The model in training.
        counts: Skipped steps so far.
        steps_per_epoch: Optimizer steps per pass over the data.
        say: Prints a line.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: RunFolder,
        model: Objective,
        *,
        counts: SkipCounts,
        steps_per_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._folder = config, world, folder
        self._steps_per_epoch, self._say = steps_per_epoch, say
        self._patience = _patience(config)
        # as many as can pass between two calls of `check`
        self._steps: deque[_Seen] = deque(maxlen=self._patience + config.d2v.run.log_every)
        self._gradient_finite = torch.ones((), dtype=torch.bool, device=world.device)
        # 0-d int64 on the device; the longest streak is that of this process
        self._skipped = torch.full((), counts.skipped, dtype=torch.int64, device=world.device)
        self._streak = torch.full_like(self._skipped, counts.streak)
        self._longest_streak = torch.zeros_like(self._skipped)
        self._model = model
        self._watched: set[Tensor] = set()
        if world.size > 1:
            # the first layer's gradient: a NaN in a later layer reaches it
            self._watch(model.student.get_submodule(model.student.entrance_name).parameters())
        # from the log, so that a resumed run finds the same spikes; only the first process has a log
        logged = read_log(folder.path) if world.is_first else []
        self._has_varied = world.any(any(has_varied(entry, config.d2v.guard) for entry in logged))
        losses = (entry["loss"] for entry in logged if entry["loss"] is not None)
        self._losses: deque[float] = deque(losses, maxlen=SPIKE_WINDOW)

    def record(self, result: StepResult) -> None:
        """Count a step."""
        skipped = ~result.applied
        self._skipped += skipped
        self._streak = (self._streak + 1) * skipped
        self._longest_streak = torch.maximum(self._longest_streak, self._streak)
        # keep only a few numbers per step
        self._steps.append(_Seen(result._replace(losses=[], moments=[]), self._gradient_finite))
        self._gradient_finite = torch.ones_like(self._gradient_finite)

    def counts(self) -> SkipCounts:
        """Return the current counts; waits for the device."""
        return SkipCounts(int(self._skipped), int(self._streak))

    def check(self, step: int) -> None:
        """Stop the run after too many skipped steps in a row; waits for the device. Every process calls it.

        Raises:
            RunError: More steps in a row than `d2v.guard` allows were skipped. `nonfinite.json` describes them.
        """
        longest = int(self._longest_streak)
        if longest >= self._patience:
            self._dump(step)
            raise RunError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}. These steps changed "
                f"nothing. {self._folder.path / DUMP} lists their processes and samples. Check the data of these "
                "steps, lower `optimizer.params.lr`, or set `gradient_clipping`. Earlier checkpoints are unchanged."
            )
        if longest > 0 and self._world.size > 1:
            # from now on check every gradient, to find the process that a NaN comes from
            self._watch(self._model.parameters())

    def mark_spike(self, entry: Entry) -> None:
        """Add `loss_spike`, the ratio to the running median of the logged losses, to an entry above the limit."""
        loss, limit = entry["loss"], self._config.d2v.guard.loss_spike
        if not math.isfinite(loss):
            return
        if limit is not None and len(self._losses) >= SPIKE_HISTORY:
            median = statistics.median(self._losses)
            if loss > limit * median > 0:
                entry["loss_spike"] = round(loss / median, 3)
                self._say(f"step {entry['step']}: the loss {loss:.4g} is above {limit:g} times its median {median:.4g}")
        self._losses.append(loss)

    def check_collapse(self, entry: Entry, num_steps: int) -> None:
        """Raise a RunError, in every process, if the run has collapsed; see the function `check_collapse`."""
        check_collapse(entry, self._config.d2v.guard, num_steps, self._has_varied)
        self._has_varied |= has_varied(entry, self._config.d2v.guard)

    def _watch(self, parameters: Iterable[Tensor]) -> None:
        """Check the gradients of this process before they are averaged over all processes."""
        for parameter in parameters:
            # parameters that ZeRO-3 has partitioned have no gradient of this process alone
            if parameter not in self._watched and not is_partitioned(parameter):
                self._watched.add(parameter)
                parameter.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: Tensor) -> None:
        self._gradient_finite &= gradient.isfinite().all()

    def _dump(self, step: int) -> None:
        """Write the facts needed to repeat the skipped steps, in the first process; every process calls it."""
        steps = [one for one in self._steps if not bool(one.result.applied)]
        # lists, because micro-batches of different steps and processes may have different sizes
        own = [
            {
                "loss": not bool(one.result.loss_finite),
                # a single process has no hooks, and the gradient is its own
                "gradient": self._world.size == 1 or not bool(one.gradient_finite),
                "samples": [ids.tolist() for ids in one.result.sample_ids],
            }
            for one in steps
        ]
        of_ranks = self._world.collect(own)
        if self._world.is_first:
            split = self._config.deepspeed.batch_split(self._world.size)
            self._folder.write_json(
                DUMP,
                {
                    "stopped_at_step": step,
                    "seed": self._config.d2v.run.seed,
                    "configuration": self._config.digest(),
                    "processes": split.world_size,
                    "micro_batch": split.micro_batch,
                    "accumulation": split.accumulation,
                    "steps": [
                        self._describe(one.result.number, found)
                        for one, found in zip(steps, zip(*of_ranks, strict=True), strict=True)
                    ],
                },
            )

    def _describe(self, step: int, of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Describe one step from what each process found."""
        return {
            "step": step,
            "epoch": (step - 1) // self._steps_per_epoch,
            "ranks_with_loss_not_finite": [rank for rank, found in enumerate(of_ranks) if found["loss"]],
            "ranks_with_gradient_not_finite": [rank for rank, found in enumerate(of_ranks) if found["gradient"]],
            "sample_ids_by_rank_and_micro_step": [found["samples"] for found in of_ranks],
        }


def first_judged_step(guard: GuardConfig, num_steps: int) -> int:
    """Return the first step at which a run is checked for a collapse.

    It is `after_steps` or two thirds of the run, whichever is sooner. Two thirds count as at least `FEWEST_JUDGED`
    steps, since no run has learned anything before.
    """
    return min(guard.after_steps, max(FEWEST_JUDGED, math.ceil(num_steps * LATEST_JUDGED)))


def check_collapse(entry: Entry, guard: StepGuardConfig, num_steps: int, has_varied: bool = True) -> None:
    """Check that targets and predictions still vary between masked positions.

    Args:
        entry: A log entry. Deviations of a non-finite step are NaN or None, and are ignored.
        guard: The limits.
        num_steps: Steps of the whole run.
        has_varied: Whether the deviations were above the limits before. If not, the run may not have begun to learn,
            and is checked only from `after_steps` on or at its end.
    Raises:
        RunError: A deviation is below its limit: the run has collapsed.
    """
    if not isinstance(guard, GuardConfig):
        return
    what, step = _collapsed(entry, guard), entry["step"]
    waits = not has_varied and step < min(guard.after_steps, num_steps)
    if what is not None and step >= first_judged_step(guard, num_steps) and not waits:
        raise RunError(_about_collapse(entry, what, guard, num_steps))


def has_varied(entry: Entry, guard: StepGuardConfig) -> bool:
    """Return whether the deviations of targets and predictions of a step are known and above their limits."""
    return _collapsed(entry, guard) is None and math.isfinite(entry.get("prediction_std") or math.nan)


def judge_end(folder: Path, guard: StepGuardConfig, num_steps: int) -> str | None:
    """Check a finished run for a collapse by the last deviations in its log.

    Returns:
        A line for the user if the run cannot be judged; None if it has not collapsed.
    Raises:
        RunError: The run has collapsed. Its weights are saved, but not exported.
    """
    if not isinstance(guard, GuardConfig):
        return None
    first = first_judged_step(guard, num_steps)
    known = [entry for entry in read_log(folder) if entry.get("prediction_std") is not None]
    if known and num_steps < first:
        what = _collapsed(known[-1], guard)
        if what is None:
            return None
        return (
            f"a run of {num_steps} steps is too short to be judged, but note that the {what}s are nearly the same at "
            f"all masked positions (standard deviation {known[-1][f'{what}_std']:.4f}): nothing has been learned so far"
        )
    if not known or known[-1]["step"] < first:
        return "whether the run has collapsed is not known: no standard deviation of its last steps is finite"
    try:
        check_collapse(known[-1], guard, num_steps)
    except RunError as error:
        raise RunError(
            f"{error} The checkpoint of step {num_steps} is saved, and nothing was exported. To finish the run anyway, "
            f"lower that limit by a `--set` after this: {resume_command(folder)}"
        ) from None
    return None


def _collapsed(entry: Entry, guard: StepGuardConfig) -> str | None:
    """Return "target" or "prediction" if its deviation is below its limit, else None."""
    for what, limit in guard.limits.items():
        found = entry.get(f"{what}_std")
        if found is not None and found < limit:
            return what
    return None


def _about_collapse(entry: Entry, what: str, guard: GuardConfig, num_steps: int) -> str:
    limit = guard.limits[what]

    def show(key: str) -> str:
        return "not finite" if entry[key] is None else f"{entry[key]:.4f}"

    short = ""
    if num_steps < USUAL_STEPS:
        short = f" Or the run is too short to have learned anything in its {num_steps:,} steps (`d2v.schedule`)."
    return (
        f"the run has collapsed: at step {entry['step']} the standard deviation of the {what}s over the masked "
        f"positions is {show(f'{what}_std')}, under `d2v.guard.min_{what}_std` ({limit}) (targets "
        f"{show('target_std')}, predictions {show('prediction_std')}, loss {show('loss')}). "
        "Lower `optimizer.params.lr`, lengthen the warm-up, let the teacher follow more slowly "
        "(`d2v.teacher.decay_start`, `decay_end` nearer to 1), or set `d2v.target.layer_norm` to layer or instance."
        f"{short} Earlier checkpoints are unchanged."
    )


def _patience(config: RunConfig) -> int:
    """Return the number of non-finite steps in a row at which the run ends."""
    guard, fp16 = config.d2v.guard, config.deepspeed.fp16
    patience = 1 if guard.nonfinite == "stop" else guard.nonfinite_patience
    if fp16.enabled:
        # an initial loss scale that is too large is halved step by step
        patience += fp16.initial_scale_power + fp16.hysteresis
    return patience
