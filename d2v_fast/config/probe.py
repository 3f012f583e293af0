"""The section `"d2v.probe"`: on which labels the features are probed, and how."""

from __future__ import annotations

from pydantic import Field

from d2v_fast.config.errors import MAX_SAMPLES, PathText, Section


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
