"""The section `"d2v.probe"`: how features are evaluated, and on which labels."""

from __future__ import annotations

from pydantic import Field

from d2v_fast.config.errors import MAX_SAMPLES, PathText, Section


class ProbeConfig(Section):
    """Linear and nearest-neighbor probe of frozen features on labeled data.

    Attributes:
        every_epochs: Epochs between two probes; 0 probes only at the end.
        labels_per_class: Labels per class of the probe on few labels.
        num_draws: Draws of these labels, whose mean is reported.
        neighbours: Neighbors that vote in the nearest-neighbor probe.
        path: Labeled data: a folder with a sub-folder per class. Null takes the labels of a sample set.
        test_fraction: Share of each class that is held out.
        max_samples: Most samples that are used, as evenly over the classes as possible.
    """

    every_epochs: int = Field(default=0, ge=0, le=10**6)
    labels_per_class: int = Field(default=10, ge=1, le=MAX_SAMPLES)
    num_draws: int = Field(default=5, ge=1, le=1000)
    neighbours: int = Field(default=20, ge=1, le=MAX_SAMPLES)
    path: PathText | None = None
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_samples: int = Field(default=2000, ge=4, le=MAX_SAMPLES)
