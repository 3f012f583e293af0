"""Score a fine-tuned model on held-out samples, and find the best checkpoint and the end of progress.

Batches of held-out samples are the same for any number of processes, which share them out. So every sample is scored
once, and the metrics do not depend on the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from d2v_fast.checkpoints.best import VALID, best_of, read_validations, written
from d2v_fast.config import RunConfig
from d2v_fast.config.finetune import FinetuneConfig
from d2v_fast.data import Batch
from d2v_fast.data.listing import counted
from d2v_fast.data.order import MicroStep
from d2v_fast.distributed.world import World
from d2v_fast.errors import DataError
from d2v_fast.evaluation.metrics import confusion_matrix, scores
from d2v_fast.figures.confusion import draw_confusion
from d2v_fast.objectives.base import Objective, StepOutput
from d2v_fast.objectives.finetune import Answer, Finetune, HeldOut
from d2v_fast.teacher import Teacher
from d2v_fast.training.engine import Engine
from d2v_fast.training.run_folder import RunFolder

Entry = dict[str, Any]


class Validation:
    """The held-out samples of a run. A run without any is never validated.

    Args:
        config: The run's configuration.
        world: The processes of the run.
        held_out: The held-out samples; None if there are none.
        folder: The run folder, with the validations made so far.
        start_step: Steps already made; validations of later steps are of a lost part of the run and are dropped.
        say: Prints a line in the first process.
    Attributes:
        best: The entry of the best validation so far.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        held_out: HeldOut | None,
        folder: RunFolder,
        start_step: int,
        say: Callable[[str], None],
    ) -> None:
        self._world, self._folder, self._say = world, folder, say
        self._section = config.d2v if isinstance(config.d2v, FinetuneConfig) else None
        self._seed = config.d2v.run.seed
        self._entries: list[Entry] = []
        if held_out is None:
            return
        self._maker = held_out
        say(f"held out         {counted(self._maker.num_samples, self._maker.what)}")
        entries = [entry for entry in read_validations(folder.path) if entry["step"] <= start_step]
        self._entries = world.decide(lambda: entries)
        if world.is_first:
            folder.write_text(VALID, written(self._entries))

    @property
    def best(self) -> Entry | None:
        """The entry of the best validation so far."""
        return best_of(self._entries)

    def is_due(self, step: int, steps_per_epoch: int, num_steps: int) -> bool:
        """Return whether the held-out samples are scored after optimizer step `step`."""
        return self._section is not None and self._section.valid.is_due(step, steps_per_epoch, num_steps)

    def run(self, step: int, engine: Engine, teacher: Teacher) -> Entry:
        """Score the held-out samples with the average of the weights, or without one with the weights themselves.

        Every process calls it. The first one appends a line to `valid.jsonl`.

        Returns:
            The step, the metrics, and the `value` that decides which checkpoint is the best one.
        """
        section, model = self._section, engine.model
        assert section is not None
        assert isinstance(model, Finetune)
        found = self._world.collect(dict(self._answers(engine, model, teacher)))
        answers = {int(sample): answer for of_rank in found for sample, answer in of_rank.items()}
        in_order = [answers[sample] for sample in range(self._maker.num_samples)]

        def score() -> Entry:
            metric = section.valid.metric
            metrics = scores(model.task, in_order, self._maker.targets, section.labels)
            clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            if metric not in clean:
                raise DataError(f"`d2v.valid.metric` must be in {', '.join(clean)} for these data, but is {metric}.")
            more = section.metrics[metric]
            return {"step": step, "samples": len(in_order), **clean, "value": clean[metric], "more_is_better": more}

        entry: Entry = self._world.decide(score)
        self._entries = [*(old for old in self._entries if old["step"] < step), entry]
        if self._world.is_first:
            self._folder.write_text(VALID, written(self._entries))
            if section.labels is not None and self.best == entry:
                self._draw_confusion(step, in_order, section.labels)
        shown = "  ".join(
            f"{name} {value:.4f}"
            for name, value in entry.items()
            if isinstance(value, float) and name not in ("value", "step")
        )
        self._say(f"after step {step}, on {counted(len(in_order), f'held-out {self._maker.what}')}: {shown}")
        return entry

    def _draw_confusion(self, step: int, answers: list[Answer], labels: Sequence[str]) -> None:
        """Replace `confusion.png`, unless matplotlib is missing or the answers are no classes."""
        if not all("classes" in answer for answer in answers):
            return
        predicted = np.array([answer["classes"][0] for answer in answers], dtype=np.int64)
        counts = confusion_matrix(predicted, np.array(self._maker.targets, dtype=np.int64), len(labels))
        title = f"{counted(len(answers), f'held-out {self._maker.what}')} after step {step:,}"
        with suppress(ImportError):
            draw_confusion(counts, labels, self._folder.path / "confusion.png", title)

    def result(self) -> Entry:
        """Return what `result.json` says of the validations."""
        assert self._section is not None
        best, last = self.best, self._entries[-1]
        stopped = {"patience": self._section.valid.patience} if self.has_stalled() else {}
        return {"metric": self._section.valid.metric, "best": best, "last": last, **stopped}

    def has_stalled(self) -> bool:
        """Return whether the best validation is as many validations ago as `d2v.valid.patience` allows."""
        best = self.best
        if self._section is None or self._section.valid.patience is None or best is None:
            return False
        since = sum(entry["step"] > best["step"] for entry in self._entries)
        return since >= self._section.valid.patience

    def _answers(self, engine: Engine, model: Finetune, teacher: Teacher) -> Iterator[tuple[str, Answer]]:
        """Yield the number of each sample of this process, as text, and the answer to it."""
        assert self._section is not None
        size, world = self._section.valid.batch_size, self._world
        num_batches = -(-self._maker.num_samples // size)
        with _evaluated(engine, teacher) as run:
            for first in range(0, num_batches, world.size):
                # a process without a batch of its own takes the last one: sharded weights need all processes
                number = min(first + world.rank, num_batches - 1)
                ids = np.arange(number * size, min(self._maker.num_samples, (number + 1) * size), dtype=np.int64)
                batch = self._maker.make(MicroStep(0, ids, ids), self._seed).batch.to(world.device)
                world.arrive()
                answers = model.answers(run(batch), batch)
                if number == first + world.rank:
                    yield from zip(map(str, ids.tolist()), answers, strict=True)


@contextmanager
def _evaluated(engine: Engine, teacher: Teacher) -> Iterator[Callable[[Batch], StepOutput]]:
    """Yield a function that runs the averaged model, or without an average the model, in eval mode."""
    module = teacher.module
    with engine.evaluating(), torch.compiler.set_stance("force_eager"):
        if isinstance(module, Objective):
            average: nn.Module = module
            yield lambda batch: average(batch, None, False)
        else:
            yield lambda batch: engine.forward(batch, module, False)
