"""Learning rate schedules. They depend only on the step number, so that a resumed run needs no state for them."""

from __future__ import annotations

import math

from d2v_fast.config import ConfigError, ScheduleConfig
from d2v_fast.config.errors import Problem, say
from d2v_fast.config.schedule import shorter_warmup


class LearningRate:
    """The learning rate schedule of a run.

    Args:
        config: The `d2v.schedule` section.
        peak: Highest learning rate, `optimizer.params.lr`.
        steps_per_epoch: Optimizer steps per pass over the data.
    Attributes:
        num_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps of the warm-up.
    Raises:
        ConfigError: The warm-up is longer than the run.
    """

    def __init__(self, config: ScheduleConfig, peak: float, steps_per_epoch: int) -> None:
        self.config = config
        self.peak = peak
        if config.steps is not None:
            self.num_steps = config.steps
        else:
            assert config.epochs is not None
            self.num_steps = config.epochs * steps_per_epoch
        if config.warmup_steps is not None:
            self.warmup_steps = config.warmup_steps
        else:
            self.warmup_steps = round((config.warmup_epochs or 0) * steps_per_epoch)
        if self.warmup_steps > self.num_steps:
            key = "warmup_epochs" if config.warmup_steps is None else "warmup_steps"
            length = self.num_steps / steps_per_epoch if key == "warmup_epochs" else self.num_steps
            must = f"not exceed the whole run of {self.num_steps:,} steps ({steps_per_epoch:,} per epoch)"
            hint = shorter_warmup(key, length)
            raise ConfigError([say(Problem(f"d2v.schedule.{key}", must, getattr(config, key), hint))])

    def at(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0."""
        return self.peak * self._ratio(min(step, self.num_steps - 1))

    def _ratio(self, step: int) -> float:
        config = self.config
        if step < self.warmup_steps:
            start = config.initial_lr_ratio
            # step + 1, so that the first step is above the start and the last step of the warm-up at the peak
            return start + (1 - start) * (step + 1) / self.warmup_steps
        if config.kind == "constant":
            return 1.0
        # 0 at the first step after the warm-up, 1 at the last step of the run
        after = step - self.warmup_steps
        if config.kind == "cosine":
            progress = after / max(1, self.num_steps - self.warmup_steps - 1)
            return config.final_lr_ratio + (1 - config.final_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
        if config.kind == "linear":
            left = 1 - after / (self.num_steps - self.warmup_steps)
            return config.final_lr_ratio + (1 - config.final_lr_ratio) * left
        hold_steps = min(round(config.hold_ratio * self.num_steps), self.num_steps - self.warmup_steps)
        if after < hold_steps:
            return 1.0
        decay_steps = self.num_steps - self.warmup_steps - hold_steps
        progress = (after - hold_steps + 1) / max(1, decay_steps)
        return config.final_lr_ratio**progress
