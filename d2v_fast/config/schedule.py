"""The section `"d2v.schedule"`: learning rate and length of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_STEPS, Problem, Section, refuse_if


def shorter_warmup(key: str, length: float) -> str:
    """Return a hint for a warm-up that is longer than the run, whose length is in steps or epochs."""
    tenth = int(length) // 10 if key == "warmup_steps" else round(length / 10, 6)
    return f"Shorten it with the run, for example to a tenth: `--set d2v.schedule.{key}={tenth:g}`."


class ScheduleConfig(Section):
    """Learning rate, as a factor on `optimizer.params.lr`, and length of the run. Exactly one of `epochs` and `steps`
    is given.

    Attributes:
        kind: After the warm-up, "constant" stays at 1; "cosine" falls to `final_lr_ratio` at the last step; "linear"
            falls to it on a line that ends one step after the last (fairseq's "polynomial_decay" with power 1);
            "tri_stage" holds, then falls exponentially to it.
        epochs: Length in epochs.
        steps: Length in optimizer steps.
        warmup_epochs: Length of the linear rise to 1, in epochs.
        warmup_steps: The same in optimizer steps.
        initial_lr_ratio: Factor at the start of the warm-up.
        final_lr_ratio: Factor at the last step.
        hold_ratio: With "tri_stage": share of the run that the factor stays at 1.
    """

    kind: Literal["cosine", "linear", "tri_stage", "constant"] = "cosine"
    epochs: int | None = Field(default=None, ge=1, le=10**6)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    warmup_epochs: float | None = Field(default=None, ge=0, le=10**6)
    warmup_steps: int | None = Field(default=None, ge=0, le=MAX_STEPS)
    initial_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    hold_ratio: float = Field(default=0.9, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if (self.epochs is None) == (self.steps is None):
            lengths = {"epochs": self.epochs, "steps": self.steps}
            both = "Set one of them to null, such as `--set d2v.schedule.epochs=null`." if self.epochs else ""
            problems.append(Problem("epochs", "be given, or `steps`, and not both", lengths, both))
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            warmups: dict[str, float | None] = {
                "warmup_epochs": self.warmup_epochs,
                "warmup_steps": self.warmup_steps,
            }
            problems.append(Problem("warmup_epochs", "be given, or `warmup_steps`, and not both", warmups))
        for unit in ("epochs", "steps"):
            length, warmup = getattr(self, unit), getattr(self, f"warmup_{unit}")
            if length is not None and warmup is not None and warmup > length:
                hint = shorter_warmup(f"warmup_{unit}", length)
                problems.append(Problem(f"warmup_{unit}", f"be <= `{unit}` ({length})", warmup, hint))
        if self.kind == "tri_stage" and self.final_lr_ratio == 0:
            hint = "An exponential decay never reaches 0; the published value is 0.05."
            problems.append(Problem("final_lr_ratio", "be > 0 with `kind` tri_stage", 0.0, hint))
        refuse_if(problems)
        return self
