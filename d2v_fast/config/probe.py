"""The section `"d2v.probe"`: how features are evaluated, and on which labels."""

from __future__ import annotations

from pydantic import Field

from d2v_fast.config.errors import MAX_SAMPLES, PathText, Section


class ProbeConfig(Section):
    """k-nearest-neighbor and linear probe of frozen features on labeled data.

    Attributes:
        every_epochs: epochs between probes; 0 probes at the end only.
        labels_per_class: labels per class for the probe with few labels.
        num_draws: random draws of those labels.
        neighbours: k of the k-nearest-neighbor probe.
        path: folder with one sub-folder for each class; None uses the labels of the sample data.
        test_fraction: fraction of each class that is held out.
        max_samples: most samples to use, spread as evenly over the classes as they allow.
    """

    every_epochs: int = Field(default=0, ge=0, le=10**6)
    labels_per_class: int = Field(default=10, ge=1, le=MAX_SAMPLES)
    num_draws: int = Field(default=5, ge=1, le=1000)
    neighbours: int = Field(default=20, ge=1, le=MAX_SAMPLES)
    path: PathText | None = None
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_samples: int = Field(default=2000, ge=4, le=MAX_SAMPLES)
