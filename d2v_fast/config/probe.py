"""The section `"d2v.probe"`: on which labels the features are probed, and how."""

from __future__ import annotations

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SAMPLES, PathText, Problem, Section, refuse_if


class ProbeConfig(Section):
    """k-nearest-neighbor and linear probe on labeled data; `every_epochs` 0 means only at the end.

    `path` is a folder of labeled data, of which every sub-folder is a class; without it, the sample sets have labels
    of their own. Of each class `test_fraction` is held out. At most `max_samples` samples are used, as evenly over the
    classes as there are enough.
    """

    every_epochs: int = Field(default=0, ge=0, le=10**6)
    labels_per_class: int = Field(default=10, ge=1, le=MAX_SAMPLES)
    num_draws: int = Field(default=5, ge=1, le=1000)
    neighbours: int = Field(default=20, ge=1, le=MAX_SAMPLES)
    path: PathText | None = None
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_samples: int = Field(default=2000, ge=4, le=MAX_SAMPLES)


class VisionProbeConfig(ProbeConfig):
    """Features are averages over the patches of each cell of a `grid` x `grid` division of the image; 1 averages over
    all patches."""

    grid: int = Field(default=1, ge=1)


class TextProbeConfig(ProbeConfig):
    """`path` may also be a file. The class of a row of .jsonl or .parquet is its `label_field`, and its text its
    `field` (None: `d2v.data.field`); the class of a .txt file is the sub-folder that it lies in."""

    field: str | None = None
    label_field: str = "label"

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = {"field": self.field, "label_field": self.label_field}
        problems = [Problem(key, "name a field or column", value) for key, value in named.items() if value == ""]
        if self.field == self.label_field:
            problems.append(Problem("label_field", "be another field than `field`", self.label_field))
        refuse_if(problems)
        return self
