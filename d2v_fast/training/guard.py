"""When a run stops itself: steps that are not finite, a collapse; and what it tells of a loss that jumps.

A step whose loss or gradient is not finite on any process changes nothing on all of them (`engine.py`). What is decided
here is how many of them a run bears, and what it leaves behind for whoever looks for the cause.
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
from d2v_fast.config import GuardConfig, RunConfig
from d2v_fast.data import Batch
from d2v_fast.distributed.deepspeed_internals import is_partitioned
from d2v_fast.distributed.world import RunError, World
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.training.metrics import Entry, read_log
from d2v_fast.training.run_folder import RunFolder
from d2v_fast.training.run_state import RunState

DUMP = "nonfinite.json"

# logged losses that a spike is measured against: at most, and at least
SPIKE_WINDOW, SPIKE_HISTORY = 100, 10

# a run is judged after this share of it at the latest, and after so many steps at the soonest
LATEST_JUDGED, FEWEST_JUDGED = 2 / 3, 20
# steps of the shortest runs that were published
USUAL_STEPS = 5000


class _Step(NamedTuple):
    """What is kept of a step until it is known to have been finite; the flags are 0-d bool on the device."""

    step: int
    sample_ids: list[Tensor]
    applied: Tensor
    loss_finite: Tensor
    gradient_finite: Tensor


class Guard:
    """Follows the steps of a run, and stops it when too many in a row were not finite.

    Nothing is read from the device before `check`, which the loop calls where it waits for the device anyway.

    Args:
        say: prints a line.
        steps_per_epoch: optimizer steps.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        state: RunState,
        folder: RunFolder,
        model: Data2Vec,
        *,
        steps_per_epoch: int,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._world, self._state, self._folder = config, world, state, folder
        self._steps_per_epoch, self._say = steps_per_epoch, say
        self._patience = _patience(config)
        # as many as can pass between two looks at the device
        self._steps: deque[_Step] = deque(maxlen=self._patience + config.d2v.run.log_every)
        self._loss_finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._gradient_finite = self._loss_finite.clone()
        self._model = model
        self._watched: set[Tensor] = set()
        if world.size > 1:
            # where every gradient that went wrong on its way through the layers ends up
            self._watch(model.student.get_submodule(model.student.entrance_name).parameters())
        # from the log, so that a resumed run finds the same spikes; the first process alone writes and reads it
        logged = read_log(folder.path) if world.is_first else []
        self._has_varied = world.any(any(has_varied(entry, config.d2v.guard) for entry in logged))
        losses = (entry["loss"] for entry in logged if entry["loss"] is not None)
        self._losses: deque[float] = deque(losses, maxlen=SPIKE_WINDOW)

    def see_loss(self, loss: Tensor) -> None:
        """Take note of the loss of one micro-step of this process, 0-d."""
        self._loss_finite &= loss.detach().isfinite()

    def end_step(self, step: int, micro_batches: Sequence[Batch], applied: Tensor) -> None:
        """Take note of a whole step: number, samples of this process, and whether it changed anything (0-d bool)."""
        ids = [batch.sample_ids for batch in micro_batches]
        self._steps.append(_Step(step, ids, applied, self._loss_finite, self._gradient_finite))
        self._loss_finite = torch.ones_like(self._loss_finite)
        self._gradient_finite = torch.ones_like(self._gradient_finite)

    def check(self, step: int) -> None:
        """Waits for the device; every process calls it.

        Raises:
            RunError: more steps in a row than `d2v.guard` allows changed nothing. `nonfinite.json` tells of them.
        """
        longest = int(self._state.longest_streak)
        if longest >= self._patience:
            self._dump(step)
            raise RunError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}: "
                f"nothing was changed in these steps. {self._folder.path / DUMP} names processes and samples. Look at "
                "the data of these steps, lower `optimizer.params.lr`, or set `gradient_clipping`. The checkpoints "
                "before are as they were."
            )
        if longest > 0 and self._world.size > 1:
            # something is wrong: from now on one look at every gradient, to name the process it comes from
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
        """Raise a RunError in every process where this step is one of a collapsed run; see `check_collapse`."""
        check_collapse(entry, self._config.d2v.guard, num_steps, self._has_varied)
        self._has_varied |= has_varied(entry, self._config.d2v.guard)

    def _watch(self, parameters: Iterable[Tensor]) -> None:
        """Look at the gradients of this process before they are averaged over all."""
        for parameter in parameters:
            # not at those that ZeRO-3 has taken apart, which have no gradient of this process alone
            if parameter not in self._watched and not is_partitioned(parameter):
                self._watched.add(parameter)
                parameter.register_hook(self._see_gradient)

    def _see_gradient(self, gradient: Tensor) -> None:
        self._gradient_finite &= gradient.isfinite().all()

    def _dump(self, step: int) -> None:
        """Write what is needed to make the steps again, as the first process, with what all of them know."""
        steps = [one for one in self._steps if not bool(one.applied)]
        flags = torch.zeros(self._world.size, len(steps), 2, dtype=torch.int64, device=self._world.device)
        ids = torch.stack([torch.stack(one.sample_ids) for one in steps]).to(self._world.device)
        all_ids = torch.zeros(self._world.size, *ids.shape, dtype=torch.int64, device=self._world.device)
        all_ids[self._world.rank] = ids
        for i, one in enumerate(steps):
            # one process needs no hook to know whose gradient it was
            wrong_gradient = ~one.gradient_finite if self._world.size > 1 else torch.tensor(True)
            flags[self._world.rank, i] = torch.stack(
                [~one.loss_finite, wrong_gradient.to(one.loss_finite.device)]
            ).long()
        self._world.sum(flags)
        self._world.sum(all_ids)
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
                    "steps": [self._describe(one.step, flags[:, i], all_ids[:, i]) for i, one in enumerate(steps)],
                },
            )

    def _describe(self, step: int, flags: Tensor, ids: Tensor) -> dict[str, Any]:
        """One step: flags int64 `[processes, 2]`, sample ids int64 `[processes, micro-steps, B]`."""
        loss, gradient = (flags[:, i].nonzero()[:, 0].tolist() for i in (0, 1))
        return {
            "step": step,
            "epoch": (step - 1) // self._steps_per_epoch,
            "ranks_with_loss_not_finite": loss,
            "ranks_with_gradient_not_finite": gradient,
            "sample_ids_by_rank_and_micro_step": ids.tolist(),
        }


def first_judged_step(guard: GuardConfig, num_steps: int) -> int:
    """Return the step from which on a run is judged.

    It is `after_steps`, or two thirds of the run if that is sooner; but not before `FEWEST_JUDGED` steps unless
    `after_steps` says so, since no run has learned anything by then.
    """
    return min(guard.after_steps, max(FEWEST_JUDGED, math.ceil(num_steps * LATEST_JUDGED)))


def check_collapse(entry: Entry, guard: GuardConfig, num_steps: int, has_varied: bool = True) -> None:
    """Raise a RunError where targets or predictions have become the same everywhere.

    Args:
        entry: of the log. Deviations of a step that was not finite are NaN or None and say nothing.
        num_steps: of the whole run.
        has_varied: whether they were above the limits before. If not, a run that has not come to `after_steps` may
            not have begun to learn, and is judged at its end only.
    """
    what, step = _collapsed(entry, guard), entry["step"]
    waits = not has_varied and step < min(guard.after_steps, num_steps)
    if what is not None and step >= first_judged_step(guard, num_steps) and not waits:
        raise RunError(_about_collapse(entry, what, guard, num_steps))


def has_varied(entry: Entry, guard: GuardConfig) -> bool:
    """Return whether the deviations of targets and predictions of a step are known and above their limits."""
    return _collapsed(entry, guard) is None and math.isfinite(entry["prediction_std"] or math.nan)


def judge_end(folder: Path, guard: GuardConfig, num_steps: int) -> str | None:
    """Judge a run that has made its last step, by the last deviations in its log.

    Returns:
        A line for the user where the run cannot be judged, None where it is good.
    Raises:
        RunError: the run has collapsed. Its weights are saved, and not exported.
    """
    first = first_judged_step(guard, num_steps)
    known = [entry for entry in read_log(folder) if entry["prediction_std"] is not None]
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
            f"{error} The checkpoint of step {num_steps} is saved, and nothing was exported. To finish the run all the "
            f"same, lower that limit by a `--set` after this: {resume_command(folder)}"
        ) from None
    return None


def _collapsed(entry: Entry, guard: GuardConfig) -> str | None:
    """Return what has a deviation under its limit: "target", "prediction" or None."""
    limits = {"target": guard.min_target_std, "prediction": guard.min_prediction_std}
    found = {what: entry[f"{what}_std"] for what in limits}
    return next((what for what in limits if found[what] is not None and found[what] < limits[what]), None)


def _about_collapse(entry: Entry, what: str, guard: GuardConfig, num_steps: int) -> str:
    limit = guard.min_target_std if what == "target" else guard.min_prediction_std

    def show(key: str) -> str:
        return "not finite" if entry[key] is None else f"{entry[key]:.4f}"

    short = ""
    if num_steps < USUAL_STEPS:
        short = f" Or the run is too short to have learned anything in its {num_steps:,} steps (`d2v.schedule`)."
    return (
        f"the run has collapsed: at step {entry['step']} the standard deviation of the {what}s over the masked "
        f"positions is {show(f'{what}_std')}, under `d2v.guard.min_{what}_std` ({limit}) (targets "
        f"{show('target_std')}, predictions {show('prediction_std')}, loss {show('loss')}). "
        "What helps: a lower `optimizer.params.lr` or a longer warm-up, a teacher that follows more slowly "
        "(`d2v.teacher.decay_start`, `decay_end` nearer to 1), `d2v.target.layer_norm` layer or instance."
        f"{short} The checkpoints before this step are as they were."
    )


def _patience(config: RunConfig) -> int:
    """Steps in a row that are not finite, and end a run."""
    guard, fp16 = config.d2v.guard, config.deepspeed.fp16
    patience = 1 if guard.nonfinite == "stop" else guard.nonfinite_patience
    if fp16.enabled:
        # a loss scale that is too large at first is halved until it fits
        patience += fp16.initial_scale_power + fp16.hysteresis
    return patience
