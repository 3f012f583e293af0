"""The section `"d2v.guard"`: when a run stops itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from d2v_fast.config.errors import MAX_STEPS, Section


class StepGuardConfig(Section):
    """When a run stops itself.

    Attributes:
        nonfinite: A NaN or infinite loss or gradient: "skip" leaves the step out, "stop" ends the run. Neither changes
            any weight.
        nonfinite_patience: With "skip": so many such steps in a row end the run.
        loss_spike: Log a warning when the loss exceeds this multiple of its running median; null disables the check.
    """

    nonfinite: Literal["skip", "stop"] = "skip"
    nonfinite_patience: int = Field(default=3, ge=1, le=10**6)
    loss_spike: float | None = Field(default=None, gt=1, le=1e6)

    @property
    def limits(self) -> dict[str, float]:
        """The logged deviations that show a collapse, and the limit of each; empty if none is checked."""
        return {}


class GuardConfig(StepGuardConfig):
    """When a run stops itself. Runs of fewer than 20 steps are not judged for collapse.

    Attributes:
        after_steps: Optimizer steps before a run is judged for collapse; a shorter run is judged after two thirds, and
            every run at its end.
        min_target_std: The run has collapsed when the standard deviation of the targets is below; 0 disables the check.
        min_prediction_std: The same for the predictions.
    """

    after_steps: int = Field(default=5000, ge=0, le=MAX_STEPS)
    min_target_std: float = Field(default=0.1, ge=0, le=1e6)
    min_prediction_std: float = Field(default=0.01, ge=0, le=1e6)

    @property
    def limits(self) -> dict[str, float]:
        """See `StepGuardConfig`."""
        return {"target": self.min_target_std, "prediction": self.min_prediction_std}
