"""The probes of curves: which of five frequencies the first wave has, or a user's own labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from d2v_fast.data.labels import LabeledSet, labeled_files
from d2v_fast.evaluation.classifiers import ProbeReport, Task, score
from d2v_fast.evaluation.features import patch_features
from d2v_fast.evaluation.inputs import Rows, Sample, Source
from d2v_fast.evaluation.probing import Labeled, Probed, Probing
from d2v_fast.models.student import Student
from tests.fake_modality.batches import CurvesBatches
from tests.fake_modality.config import CurvesConfig
from tests.fake_modality.embed import KINDS, Curves

RAW = "raw points"


def _run(probed: Probed, config: CurvesConfig) -> ProbeReport:
    ids = np.arange(config.data.num_samples)
    curves = CurvesBatches(config).curves(ids)
    task = Task(ids % 5, ids[::2], ids[1::2])
    features = {name: patch_features(model, curves, 1).mean(1).cpu().numpy() for name, model in probed.encoders.items()}
    features[RAW] = curves.flatten(1).numpy()
    scores = {name: score(rows, task, config.probe) for name, rows in features.items()}
    return ProbeReport(scores, config.probe, "held-out curves")


def _labeled(config: CurvesConfig) -> Labeled:
    def find(key: str) -> LabeledSet:
        return labeled_files(str(config.probe.path), KINDS, config.probe.max_samples, follow_outside=False, key=key)

    def read(model: Student, found: LabeledSet) -> tuple[Source, Iterator[Sample | str]]:
        source = Curves(model, "", Path(found.root), config, [sample.name for sample in found.samples])
        return source, source.samples()

    def points(sample: Sample) -> Rows:
        return sample.parts[0].flatten().numpy()

    return Labeled(
        "curve", find, read, lambda rows: rows.mean(0), RAW, points, lambda described, task: np.stack(described)
    )


PROBING = Probing("waves", _run, _labeled, ("--data", "FOLDER"), "curves whose sub-folders are classes")
